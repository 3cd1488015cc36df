"""The aspirin recipe, made tiny, through both commands."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from ase.io import read

from stable_plugin.cli import main

ROOT = Path(__file__).parents[3]
PLAIN = [sys.executable, "-m", "stable_plugin.cli", "train"]
FAIRCHEM = [shutil.which("fairchem", path=str(Path(sys.executable).parent)) or "fairchem", "-c"]
NEEDS_FAIRCHEM = pytest.mark.skipif(find_spec("fairchem") is None, reason="needs fairchem")
TINY = [
    "runner.supervised.max_epochs=4",
    "runner.model.scheduler.T_max=4",
    "runner.stable.n_replicas=4",
    "runner.stable.window_ps=0.05",
    "runner.stable.schedule.max_failures_per_ns=4000",
    "runner.stable.schedule.max_windows=2",
    "runner.evaluation.n_replicas=4",
    "runner.evaluation.horizons_ps=[0.1,0.2]",
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    return folder


def run_recipe(workplace, recipe, *overrides, command=PLAIN):
    return subprocess.run(
        [*command, str(recipe), *overrides], cwd=workplace, capture_output=True, text=True, timeout=400, check=False
    )


@pytest.fixture(scope="module")
def run(workplace):
    done = run_recipe(workplace, "recipes/aspirin_mace.yaml", *TINY, "runner.control=true", "job.run_dir=runs/whole")
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (workplace / "runs" / "whole").iterdir()
    return folder, done.stdout


def test_pipeline_writes_all_results(run):
    folder, stdout = run
    report = json.loads((folder / "report.json").read_text())
    for stage in ("before", "after", "control"):
        assert {
            "replicas", "horizon_ps", "threshold", "unstable", "median_stable_ps", "failures_per_ns",
            "failures_per_ns_interval", "force_mae_mev_per_A", "energy_mae_mev_per_atom", "observables",
        } <= set(report[stage])  # fmt: skip
    assert {"settings", "windows", "wall_s", "md_steps", "optimizer_steps"} <= set(report)
    assert report["optimizer_steps"] == sum(entry["steps"] for entry in report["windows"]) > 0
    assert report["md_steps"] == 4 * 100 * len(report["windows"])
    assert stdout.rstrip().endswith(str(folder / "report.html")) and "Before:" in stdout
    assert "<svg" in (folder / "report.html").read_text()
    assert list((folder / "figures").glob("*.png"))
    for stage in ("supervised", "stable"):
        assert (folder / stage / "last.ckpt").is_file()
        assert list((folder / stage / "tensorboard").glob("events*"))
    assert "stable/unstable_fraction" in (folder / "stable" / "csv" / "version_0" / "metrics.csv").read_text()
    for path in (folder / "trajectories" / "before").glob("*.extxyz"):
        assert len(read(path, 0)) == 21


def test_learning_rates_of_all_steps_are_kept_for_the_control(run):
    """The first ones are zero, while the level of the loss is measured; then they fall from the recipe's in each cycle."""
    rates = json.loads((run[0] / "learning_rates.json").read_text())
    assert len(rates) == json.loads((run[0] / "stable_phase.json").read_text())["optimizer_steps"]
    assert rates[:20] == [0.0] * 20
    assert rates[20] == pytest.approx(0.015) and rates[-1] == pytest.approx(0.05 * 0.015)
    with (run[0] / "control" / "csv" / "version_0" / "metrics.csv").open() as file:
        assert sum(bool(row["train/loss"]) for row in csv.DictReader(file)) == len(rates)


def test_pipeline_writes_mace_models(run):
    from mace.calculators import MACECalculator

    atoms = read(ROOT / "recipes/data/aspirin_valid.extxyz")
    energies = []
    for name in ("before", "after"):
        atoms.calc = MACECalculator(str(run[0] / f"{name}.model"), device="cpu", default_dtype="float32")
        energies.append(atoms.get_potential_energy())
    assert abs(energies[0] - energies[1]) > 1e-6


def test_module_loads_from_run_checkpoint(run):
    import torch

    from stable_plugin.models.mace import MACEModule
    from stable_plugin.models.mace.files import load_mace

    module = MACEModule.load_from_checkpoint(run[0] / "supervised" / "last.ckpt", weights_only=True)
    before = load_mace(run[0] / "before.model")
    for ours, saved in zip(module.model.parameters(), before.parameters(), strict=True):
        assert torch.equal(ours, saved)


@pytest.mark.parametrize("command", [PLAIN, pytest.param(FAIRCHEM, marks=NEEDS_FAIRCHEM)], ids=["plain", "fairchem"])
def test_evaluate_recipe_agrees_with_training(run, workplace, command):
    runs = workplace / "runs" / f"alone_{len(command)}"
    done = run_recipe(
        workplace,
        "recipes/evaluate.yaml",
        f"model={run[0] / 'after.model'}",
        "runner.evaluation.n_replicas=4",
        "runner.evaluation.horizons_ps=[0.1,0.2]",
        "+runner.evaluation.seed=2",
        f"job.run_dir={runs}",
        command=command,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = runs.iterdir()
    alone = json.loads((folder / "report.json").read_text())["evaluation"]
    after = json.loads((run[0] / "report.json").read_text())["after"]
    assert alone["unstable"] == after["unstable"]
    assert alone["force_mae_mev_per_A"] == pytest.approx(after["force_mae_mev_per_A"], rel=1e-5)


@pytest.mark.parametrize(
    ("number", "command"),
    [
        (signal.SIGINT, PLAIN),
        (signal.SIGTERM, PLAIN),
        pytest.param(signal.SIGTERM, FAIRCHEM, marks=NEEDS_FAIRCHEM),
    ],
    ids=["Ctrl-C", "SIGTERM", "fairchem"],
)
def test_pipeline_resumes_after_interruption(workplace, number, command):
    runs = workplace / "runs" / f"{number.name}_{len(command)}"
    # Windows long enough to be interrupted in.
    slow = ["runner.stable.window_ps=2.0", "runner.evaluation.horizons_ps=[0.01]"]
    slow += ["+runner.evaluation.record_every_fs=5", f"job.run_dir={runs}"]
    with subprocess.Popen(
        [*command, "recipes/aspirin_mace.yaml", *TINY, *slow],
        cwd=workplace, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 240
        while not list(runs.glob("*/before.json")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        time.sleep(5.0)
        process.send_signal(number)
        output = process.communicate(timeout=120)[0]
    (folder,) = runs.iterdir()
    if command is PLAIN:
        assert process.returncode == 128 + number, output[-3000:]
        assert f"Interrupted. Resume with: stable-plugin train {folder}" in output
        source = folder
    else:
        (source,) = folder.rglob("resume_config.yaml")
        assert f"Interrupted. Resume with: fairchem -c {source}" in output
    assert not (folder / "report.json").exists()
    trained = (folder / "before.model").stat().st_mtime_ns
    done = run_recipe(workplace, source, "runner.stable.window_ps=0.05", command=command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "report.html").is_file()
    assert (folder / "before.model").stat().st_mtime_ns == trained


MISTAKES = [
    ("+runner.stable.n_replica=4", "runner.stable.n_replica=4 is not an argument of"),
    ("runner.stable.n_replicas=-4", "runner.stable: n_replicas=-4 is out of range"),
    ("runner.data.train=missing.extxyz", "runner.data: train='missing.extxyz' is not a file"),
    ("runner.stable.record_every_fs=7.0", "runner.stable: record_every=14 steps is not a multiple"),
    ("+runner.stable_trainer.log_every_n_step=1", "did you mean log_every_n_steps?"),
    ("+runner.stable.detector._target_=os.system", "runner.stable.detector._target_='os.system' is part of Python's"),
    ("job.seed=-1", "seed=-1"),
]


@pytest.mark.parametrize(("override", "message"), MISTAKES)
def test_train_names_a_mistake(workplace, monkeypatch, capsys, override, message):
    monkeypatch.chdir(workplace)
    assert main(["train", "recipes/aspirin_mace.yaml", *TINY, override, "job.run_dir=runs/mistake"]) == 1
    assert message in capsys.readouterr().err
    assert not (workplace / "runs" / "mistake").exists()


@NEEDS_FAIRCHEM
@pytest.mark.parametrize(("override", "message"), MISTAKES[2:4])
def test_fairchem_names_a_mistake(workplace, override, message):
    overrides = [*TINY, override, "job.run_dir=runs/fairchem_mistake"]
    done = run_recipe(workplace, "recipes/aspirin_mace.yaml", *overrides, command=FAIRCHEM)
    assert done.returncode != 0
    assert message in done.stderr[-2500:]
    assert {path.name for path in workplace.glob("runs/fairchem_mistake/*/*")} <= {"canonical_config.yaml", "logs"}


@NEEDS_FAIRCHEM
def test_peptide_recipe_writes_fairchem_checkpoints(workplace):
    from fairchem.core import FAIRChemCalculator
    from fairchem.core.units.mlip_unit import load_predict_unit

    done = run_recipe(workplace, "recipes/peptide_esen.yaml", "size=quick", "job.run_dir=runs/peptide")
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (workplace / "runs" / "peptide").iterdir()
    report = json.loads((folder / "report.json").read_text())
    assert report["before"]["replicas"] == report["after"]["replicas"] == 2
    assert report["optimizer_steps"] > 0
    atoms = read(ROOT / "recipes/data/peptide_valid.extxyz")
    energies = []
    for name in ("before", "after"):
        unit = load_predict_unit(folder / f"{name}.pt", device="cpu")
        atoms.calc = FAIRChemCalculator(unit, task_name="omol")
        energies.append(atoms.get_potential_energy())
    assert abs(energies[0] - energies[1]) > 1e-6

    # The result is a checkpoint like any other.
    done = run_recipe(
        workplace,
        "recipes/evaluate.yaml",
        f"model={folder / 'after.pt'}",
        "frames=recipes/data/peptide_heldout.extxyz",
        "reference=recipes/data/peptide_reference.extxyz",
        "runner.evaluation.n_replicas=2",
        "runner.evaluation.horizons_ps=[0.05]",
        "job.run_dir=runs/peptide_alone",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (alone,) = (workplace / "runs" / "peptide_alone").iterdir()
    error = json.loads((alone / "report.json").read_text())["evaluation"]["force_mae_mev_per_A"]
    assert error == pytest.approx(report["after"]["force_mae_mev_per_A"], rel=1e-5)


def test_water_recipe_compares_structure_and_motion(workplace):
    dynamics = "runner.evaluation.dynamics"
    short = [f"{dynamics}.{index}.max_lag_ps=0.02" for index in range(4)]
    done = run_recipe(
        workplace, "recipes/water_mace.yaml", "size=quick", *short, f"{dynamics}.3.fit_from_ps=0.0",
        "runner.evaluation.detector.detectors.0.threshold=50", "+runner.evaluation.detector.detectors.0.discard=50",
        "runner.evaluation.detector.detectors.1.distance=0.01",
        "+runner.evaluation.detector.detectors.1.discard_distance=0.01", "job.run_dir=runs/water",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (workplace / "runs" / "water").iterdir()
    report = json.loads((folder / "report.json").read_text())
    assert report["optimizer_steps"] > 0
    names = {
        "radial_distribution_O_O", "radial_distribution_O_H", "radial_distribution_H_H", "angle_distribution",
        "local_bond_lengths", "local_contacts", "velocity_autocorrelation", "power_spectrum_O",
        "mean_squared_displacement_O", "diffusion_coefficient_O",
    }  # fmt: skip
    for stage in ("before", "after"):
        assert set(report[stage]["observables"]) == names
        assert all(error is not None for error in report[stage]["observables"].values())
    page = (folder / "report.html").read_text()
    assert page.count("<svg") >= len(names)
