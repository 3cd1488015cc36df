"""Trainings, repairs and evaluations on a CUDA device, from the command line and from Python; needs MACE."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import recipe_tools
import torch
import yaml
from ase.io import read
from observable_tools import water_grid
from recipe_tools import ROOT
from small_training import short_callback, small_module, trainer
from toys import as_potential, tiny_mace

from stable_plugin import (
    AngleDistribution,
    AnyOf,
    BondDeviation,
    BondLengths,
    Density,
    Evaluator,
    HeatCapacity,
    HeatOfVaporization,
    IntermolecularContact,
    Langevin,
    LocalBondLengths,
    LocalContacts,
    Molecules,
    MonteCarloBarostat,
    NonFinite,
    Pressure,
    RadialDistribution,
    Stress,
    System,
)
from stable_plugin.algorithm.estimator import BoltzmannEstimator
from stable_plugin.algorithm.window_data import WindowEstimator
from stable_plugin.integrations.lightning import ExtxyzDataModule
from stable_plugin.md import Simulator
from stable_plugin.models.mace.files import save_mace

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

ASPIRIN = ROOT / "recipes" / "data" / "aspirin_train.extxyz"


def command_line(folder, *arguments):
    """Run ``stable-plugin`` in a process of its own, and return what it printed."""
    command = [sys.executable, "-m", "stable_plugin.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "cannot be captured" not in done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The file of a MACE model in double precision that was trained for a few epochs."""
    folder = tmp_path_factory.mktemp("model")
    module = small_module(dtype="float64")
    run = trainer(folder, max_epochs=5, accelerator="gpu")
    run.fit(module, ExtxyzDataModule(read(ASPIRIN, ":"), batch_size=10))
    save_mace(module.model, folder / "aspirin.model")
    return folder / "aspirin.model"


@pytest.mark.parametrize("name", ["aspirin_mace", "water_mace", "evaluate"])
def test_recipe_runs_on_the_device(name, model, tmp_path):
    recipe = recipe_tools.tiny(name, recipe_tools.small_data(tmp_path / "data"))
    if recipe.get("model") == "???":
        recipe["model"] = str(model)
    recipe["job"].update(run_dir=str(tmp_path / "runs"), device_type="CUDA")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True, sort_keys=False))
    command_line(tmp_path, "train", "recipe.yaml")
    (folder,) = (tmp_path / "runs").iterdir()
    report = json.loads((folder / "report.json").read_text())
    assert report["after" if "after" in report else "evaluation"]["replicas"] == 2


def test_repair_returns_a_file_for_any_device(model, tmp_path):
    quick = [
        "job.device_type=CUDA",
        "runner.stable.n_replicas=4",
        "runner.stable.window_ps=0.05",
        "runner.stable.schedule.max_windows=2",
        "runner.stable.schedule.max_failures_per_ns=30000",
        "runner.evaluation.n_replicas=4",
        "runner.evaluation.horizons_ps=[0.05]",
    ]
    command_line(tmp_path, "repair", model, ASPIRIN, "-o", "repaired.model", "--temperature-K", 500, *quick)
    repaired = torch.load(tmp_path / "repaired.model", weights_only=False)
    before = torch.load(model, weights_only=False)
    tensors = dict(repaired.named_parameters())
    assert all(each.device.type == "cpu" and each.dtype == torch.float64 for each in tensors.values())
    assert any(not torch.equal(each.cpu(), tensors[name]) for name, each in before.named_parameters())


@pytest.mark.parametrize("method", ["direct", "splitting"])
def test_evaluate_by_both_methods(method, model, tmp_path):
    settings = ["--replicas", 8, "--ps", 0.1, "--temperature-K", 500, "--method", method, "--labeled", ASPIRIN]
    command_line(tmp_path, "evaluate", model, ASPIRIN, *settings, "--device", "cuda", "--out", "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["evaluation"]["replicas"] == 8


def test_check_runs_on_both_devices(model, tmp_path):
    findings = {}
    for device in ("cpu", "cuda"):
        path = tmp_path / f"{device}.json"
        command_line(tmp_path, "check", model, ASPIRIN, "--temperature-K", 500, "--device", device, "--json", path)
        findings[device] = json.loads(path.read_text())
    assert findings["cuda"].keys() == findings["cpu"].keys()


@pytest.mark.parametrize("objective", ["margin", "boltzmann", "both"])
def test_callback_trains_with_every_objective(objective, tmp_path):
    callback = short_callback(objective=objective)
    module = small_module()
    run = trainer(tmp_path, callback, max_epochs=6, accelerator="gpu")
    run.fit(module, ExtxyzDataModule(read(ASPIRIN, ":10"), batch_size=5))
    assert callback.loop.simulator.capturing
    assert sum(window.steps for window in callback.windows) >= 1
    assert all(bool(parameter.isfinite().all()) for parameter in module.parameters())


def test_training_resumes_on_the_device(tmp_path):
    def fit(n_steps, **resumed):
        module, callback = small_module(), short_callback(objective="both")
        run = trainer(tmp_path, callback, max_epochs=-1, max_steps=n_steps, accelerator="gpu")
        run.fit(module, ExtxyzDataModule(read(ASPIRIN, ":10"), batch_size=10), **resumed)
        run.save_checkpoint(tmp_path / "end.ckpt")
        return callback.windows

    before = fit(3)
    after = fit(6, ckpt_path=tmp_path / "end.ckpt", weights_only=True)
    assert len(after) > len(before) or sum(each.steps for each in after) > sum(each.steps for each in before)


OBSERVABLES = {
    "bonds": lambda: BondLengths(),
    "angles": lambda: AngleDistribution(),
    "rdf": lambda: RadialDistribution(r_max=3.0, pair=("O", "H")),
    "local bonds": lambda: LocalBondLengths(),
    "local contacts": lambda: LocalContacts(),
    "pressure": lambda: Pressure(0.1, scale=0.05),
    "stress": lambda: Stress([0.1] * 6, scale=0.05),
    "heat capacity": lambda: HeatCapacity(80.0, scale=5.0),
    "heat of vaporization": lambda: HeatOfVaporization(44.0, scale=1.0, n_replicas=2),
}


@pytest.mark.parametrize("name", OBSERVABLES)
def test_gradient_of_the_estimator_equals_the_one_of_a_cpu(name):
    """In double precision, of the same frames; only the gas phase is simulated anew, with other random numbers."""
    atoms = water_grid(6.4)
    random = np.random.default_rng(0)
    frames = torch.tensor(atoms.positions + 0.05 * random.normal(size=(12, len(atoms), 3)))
    model = tiny_mace(atoms.numbers, channels=8, r_max=3.0, atomic_inter_scale=0.1)

    def estimated(device):
        potential = as_potential(copy.deepcopy(model).to(device), System.from_atoms(atoms))
        observable = OBSERVABLES[name]()
        observable.bind(potential.system, frames[:4].to(device))
        local = Molecules() if name.startswith("local") else None
        estimator = WindowEstimator(BoltzmannEstimator(potential, 300.0), [observable], local=local)
        data = estimator.collect(frames.to(device), 4, torch.Generator(device).manual_seed(0))
        with torch.no_grad():
            for parameter in potential.module.parameters():
                parameter.mul_(1.001)
        weights, _ = estimator.reweight(data)
        return estimator.estimate(data, weights)

    mine, expected = estimated("cuda"), estimated("cpu")
    if name == "heat of vaporization":
        assert mine.loss == pytest.approx(expected.loss, rel=0.2)
        return
    assert mine.loss == pytest.approx(expected.loss, rel=1e-8)
    for gradient, other in zip(mine.gradients, expected.gradients, strict=True):
        assert gradient.device.type == "cuda"
        torch.testing.assert_close(gradient.cpu(), other, rtol=1e-6, atol=1e-9)


def test_evaluation_of_observables_equals_that_of_a_cpu():
    """Trajectories are kept on the CPU, and observables of the potential are computed where it is.

    The random numbers differ, so it is cold: what is left is the difference of the start frame from the reference.
    """
    atoms = water_grid(6.4)
    reference = atoms.copy()
    reference.rattle(0.1, seed=0)
    model = tiny_mace(atoms.numbers, channels=8, r_max=2.5, atomic_inter_scale=0.01)
    names = sorted(OBSERVABLES.keys() - {"heat capacity", "heat of vaporization"})

    def evaluated(device):
        evaluator = Evaluator(
            starts=[atoms],
            reference=[reference],
            integrator=Langevin(0.01, 0.5, 0.0),
            detector=NonFinite(),
            observables=[OBSERVABLES[name]() for name in names],
            n_replicas=2,
            horizons_ps=[0.02],
            record_every_fs=5.0,
        )
        return evaluator.evaluate(copy.deepcopy(model).to(device)).summaries[0]["observables"]

    mine, expected = evaluated("cuda"), evaluated("cpu")
    assert len(expected) == len(names)
    assert mine == pytest.approx(expected, rel=0.05)


def test_window_at_constant_pressure_runs_on_the_device():
    atoms = water_grid(6.4)
    model = tiny_mace(atoms.numbers, channels=8, r_max=2.5, atomic_inter_scale=0.01).to("cuda")
    potential = as_potential(model, System.from_atoms(atoms))
    positions = torch.tensor(atoms.positions, device="cuda")[None].repeat(4, 1, 1)
    detector = AnyOf([BondDeviation(5.0, 50.0), IntermolecularContact(0.1, 0.01)])
    detector.bind(potential.system, positions)
    integrator = Langevin(300.0, 0.5, 1.0, barostat=MonteCarloBarostat(pressure_GPa=1e-4, every_fs=5.0))
    simulator = Simulator(potential, integrator, detector, check_every_fs=5.0)
    generator = torch.Generator("cuda").manual_seed(0)
    window = simulator.run(simulator.prepare(positions, generator), 100, 20, generator)
    volumes = torch.linalg.det(window.frame_cells())
    assert volumes.device.type == "cuda" and bool((volumes > 0).all())
    assert volumes.std() > 0.01 * volumes.mean()
    density = Density()
    density.bind(potential.system, window.frames(), window.frame_cells())
    assert bool(density.per_frame(window.frames(), window.frame_cells()).isfinite().all())
