"""fairchem models beyond the conformance tests: files of its own training, experts, direct forces, tasks."""

import numpy as np
import pytest
import torch
from ase.build import bulk, molecule
from fairchem.core import FAIRChemCalculator
from fairchem.core.units.mlip_unit import InferenceSettings, load_predict_unit
from fairchem_tools import native_config, network, run_fairchem, tasks, write_aselmdb

from stable_plugin import Execution, Langevin, NonFinite, System
from stable_plugin.algorithm.estimator import BoltzmannEstimator, surrogate_weights, uniform_weights
from stable_plugin.md import Simulator
from stable_plugin.md.system import stack_positions
from stable_plugin.models import find_potential, load_potential
from stable_plugin.models.fairchem.files import FairchemModel, load_fairchem, save_fairchem
from stable_plugin.models.fairchem.potential import FairchemPotential, energy_task

KINDS = ("esen", "uma", "allscaip")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, aspirin_frames):
    """Inference checkpoints; fairchem's own training wrote those of eSEN and UMA."""
    paths = {}
    for kind in ("esen", "uma"):
        folder = tmp_path_factory.mktemp(kind)
        write_aselmdb(folder / "train.aselmdb", aspirin_frames[:8])
        write_aselmdb(folder / "val.aselmdb", aspirin_frames[8:10])
        run = run_fairchem(folder, native_config(folder, kind))
        paths[kind] = run / "checkpoints" / "final" / "inference_ckpt.pt"
    for kind in ("allscaip", "direct"):
        paths[kind] = tmp_path_factory.mktemp(kind) / "inference_ckpt.pt"
        save_fairchem(FairchemModel.from_configs(network(kind), tasks(kind), task_name="omol"), paths[kind])
    return paths


def molecules(frames, n):
    chosen = []
    for frame in frames[:n]:
        copied = frame.copy()
        copied.info = {"charge": 0, "spin": 1}
        copied.calc = None
        chosen.append(copied)
    return chosen


def crystals(n):
    """Return crystals in a triclinic cell that is smaller than the cutoff."""
    rng = np.random.default_rng(1)
    frames = []
    for _ in range(n):
        atoms = bulk("NaCl", "rocksalt", a=5.6) * (2, 1, 1)
        atoms.set_cell(atoms.cell.array + np.array([[0.2, 0, 0], [0, 0, 0.1], [0, 0.3, 0]]), scale_atoms=True)
        atoms.positions += rng.normal(0, 0.4, (len(atoms), 3))
        atoms.wrap()
        frames.append(atoms)
    return frames


def expected(path, frames, dataset, dtype):
    unit = load_predict_unit(path, InferenceSettings(base_precision_dtype=dtype), device="cpu")
    calculator = FAIRChemCalculator(unit, task_name=dataset)
    energies, forces = [], []
    for frame in frames:
        atoms = frame.copy()
        atoms.calc = calculator
        energies.append(atoms.get_potential_energy())
        forces.append(atoms.get_forces())
    return np.array(energies), np.stack(forces)


def adapter(path, frames, dataset, dtype=torch.float32):
    model = load_fairchem(path, dtype=dtype, task_name=dataset)
    system = System.from_atoms(frames[0])
    potential = model.stable_potential(system)
    return potential, stack_positions(frames, system, "structures").to(dtype)


@pytest.mark.parametrize("periodic", [False, True], ids=["molecule", "crystal"])
@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"),
    [(kind, torch.float32, 1e-5) for kind in KINDS] + [(kind, torch.float64, 1e-10) for kind in ("esen", "uma")],
)
def test_trained_checkpoints_equal_calculator(checkpoints, aspirin_frames, kind, dtype, tolerance, periodic):
    dataset = "omat" if periodic else "omol"
    frames = crystals(16) if periodic else molecules(aspirin_frames, 16)
    energies, forces = expected(checkpoints[kind], frames, dataset, dtype)
    for n_replicas in (1, 16):
        potential, positions = adapter(checkpoints[kind], frames[:n_replicas], dataset, dtype)
        for context in (potential.frozen, potential.simulating):
            with context():
                energies_got, forces_got = potential.energies_and_forces(positions, potential.edges(positions))
            np.testing.assert_allclose(
                energies_got.double().numpy() + potential.constant_energy, energies[:n_replicas], rtol=tolerance
            )
            assert np.abs(forces_got.numpy() - forces[:n_replicas]).max() < tolerance * np.abs(forces).max()


@pytest.mark.parametrize("kind", KINDS)
def test_atomic_energies_are_local(checkpoints, aspirin_frames, kind):
    potential, positions = adapter(checkpoints[kind], molecules(aspirin_frames, 2), "omol")
    with potential.frozen():
        per_atom = potential.atomic_energies(positions, potential.edges(positions))
    assert per_atom.shape == (2, 21)
    assert (per_atom.abs() > 0).all(), "the whole energy is on one atom"


def test_estimator_gradient_of_merged_experts(checkpoints, aspirin_frames):
    potential, positions = adapter(checkpoints["uma"], molecules(aspirin_frames, 4), "omol", torch.float64)
    values = positions.norm(dim=-1)
    estimate = BoltzmannEstimator(potential, 500.0, chunk=2).estimate(positions, [values], [0.9 * values.mean(dim=0)])
    index = max(range(len(estimate.gradients)), key=lambda i: estimate.gradients[i].abs().max())
    parameter = potential.trainable_parameters()[index]
    where = estimate.gradients[index].abs().argmax()
    mean = values.mean(dim=0)
    upstream = 2.0 * (mean - 0.9 * mean) / len(mean)
    weights = surrogate_weights(values, upstream, uniform_weights(4, values), 500.0)

    def weighted(change):
        with torch.no_grad():
            parameter.view(-1)[where] += change
            energies = BoltzmannEstimator(potential, 500.0).energies(positions)
            parameter.view(-1)[where] -= change
        return (weights * energies).sum()

    numeric = (weighted(1e-5) - weighted(-1e-5)) / 2e-5
    assert estimate.gradients[index].view(-1)[where].item() == pytest.approx(numeric.item(), rel=1e-5)


def test_merged_experts_follow_the_weights(checkpoints, aspirin_frames):
    potential, positions = adapter(checkpoints["uma"], molecules(aspirin_frames, 2), "omol")
    before = {name: tensor.clone() for name, tensor in potential.module.state_dict().items()}
    kinds = [type(part) for part in potential.module.modules()]
    trainable = [parameter.requires_grad for parameter in potential.module.parameters()]
    potential.module.train()
    with potential.simulating():
        first, _ = potential.energies_and_forces(positions, potential.edges(positions))
    assert [type(part) for part in potential.module.modules()] == kinds
    assert all(torch.equal(tensor, before[name]) for name, tensor in potential.module.state_dict().items())
    assert potential.module.training
    assert [parameter.requires_grad for parameter in potential.module.parameters()] == trainable
    with torch.no_grad():
        for parameter in potential.module.parameters():
            parameter *= 1.05
    with potential.frozen():
        unmerged, _ = potential.energies_and_forces(positions, potential.edges(positions))
    with potential.simulating():
        merged, _ = potential.energies_and_forces(positions, potential.edges(positions))
    assert not torch.allclose(first, unmerged, rtol=1e-3)
    assert torch.allclose(merged, unmerged, rtol=1e-5)


def test_experts_merge_after_a_training_step(checkpoints, aspirin_frames):
    """A training step leaves tensors and figures in the model that cannot be copied."""
    potential, positions = adapter(checkpoints["uma"], molecules(aspirin_frames, 2), "omol")
    potential.module.train()
    potential.atomic_energies(positions, potential.edges(positions)).sum().backward()
    with potential.simulating():
        energies, _ = potential.energies_and_forces(positions, potential.edges(positions))
    assert torch.isfinite(energies).all()


def test_compile_is_rejected_for_fairchem(checkpoints, aspirin_frames):
    system = System.from_atoms(molecules(aspirin_frames, 1)[0])
    potential = find_potential(load_potential(checkpoints["esen"], task_name="omol"), system)
    positions = torch.tensor(aspirin_frames[0].positions)[None]
    simulator = Simulator(potential, Langevin(), NonFinite(), execution=Execution(compile=True))
    state = simulator.prepare(positions, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"compile=True is not available for fairchem models"):
        simulator.run(state, 10, 10, torch.Generator().manual_seed(0))


def test_direct_forces_require_conservative(checkpoints, aspirin_frames):
    frames = molecules(aspirin_frames, 1)
    system = System.from_atoms(frames[0])
    model = load_fairchem(checkpoints["direct"], task_name="omol")
    with pytest.raises(ValueError, match=r"predicts forces directly.*conservative=True"):
        model.stable_potential(system)
    model.conservative = True
    potential = model.stable_potential(system)
    positions = torch.tensor(frames[0].positions)[None].float()
    with potential.frozen():
        _, forces = potential.energies_and_forces(positions, potential.edges(positions))
        shifted = positions.clone()
        shifted[0, 3, 1] += 0.01
        up = potential.atomic_energies(shifted, potential.edges(shifted)).sum()
        shifted[0, 3, 1] -= 0.02
        down = potential.atomic_energies(shifted, potential.edges(shifted)).sum()
    assert forces[0, 3, 1].item() == pytest.approx(-(up - down).item() / 0.02, rel=0.05, abs=2e-3)


def test_load_fairchem_names_what_is_missing(checkpoints, tmp_path):
    water = System.from_atoms(molecule("H2O"))
    model = load_fairchem(checkpoints["uma"], task_name="omol")
    with pytest.raises(ValueError, match=r"'omol' needs.*no charge and no spin.*atoms\.info"):
        model.stable_potential(water)
    with pytest.raises(ValueError, match=r"energies for \['omat', 'omol'\].*task_name="):
        load_fairchem(checkpoints["uma"])
    with pytest.raises(ValueError, match=r"task_name='oc20' is not a task.*\['omat', 'omol'\]"):
        load_fairchem(checkpoints["uma"], task_name="oc20")
    with pytest.raises(ValueError, match=r"no energy task"):
        energy_task([])
    with pytest.raises(TypeError, match=r"Linear is not a fairchem HydraModel"):
        FairchemPotential(torch.nn.Linear(1, 1), water)
    (tmp_path / "cut.pt").write_bytes(checkpoints["uma"].read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"cut\.pt cannot be read as a fairchem checkpoint"):
        load_fairchem(tmp_path / "cut.pt")
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt contains a dict, not a fairchem inference checkpoint"):
        load_fairchem(tmp_path / "other.pt")
    with pytest.raises(FileNotFoundError, match=r"neither a file nor a model.*uma-s-1p1"):
        load_fairchem(tmp_path / "missing.pt")


def test_load_potential_downloads_by_name(monkeypatch, checkpoints):
    """The name is recognized and passed on, up to the download itself."""
    requested = []

    def download(**arguments):
        requested.append((arguments["repo_id"], arguments["filename"]))
        return str(checkpoints["uma"])

    monkeypatch.setattr("fairchem.core.calculate.pretrained_mlip.hf_hub_download", download)
    model = load_potential("uma-s-1p1", task_name="omol")
    assert requested == [("facebook/UMA", "uma-s-1p1.pt")]
    assert isinstance(model, FairchemModel)

    def offline(**arguments):
        raise ConnectionError("no route")

    monkeypatch.setattr("fairchem.core.calculate.pretrained_mlip.hf_hub_download", offline)
    with pytest.raises(FileNotFoundError, match=r"could not download checkpoint='uma-s-1p1'.*no route"):
        load_potential("uma-s-1p1", task_name="omol")
