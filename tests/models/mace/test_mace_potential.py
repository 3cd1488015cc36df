"""MACE models beyond the conformance tests: heads, precision, elements, compilation, files."""

import logging
import pickle

import numpy as np
import pytest
import torch
from ase import Atoms
from mace.calculators import MACECalculator
from torch import nn
from toys import flat, tiny_mace

from stable_plugin import Execution, Langevin, NonFinite, System
from stable_plugin.md import Simulator
from stable_plugin.models import load_potential
from stable_plugin.models.base import default_dtype
from stable_plugin.models.mace import MACEPotential, load_mace, save_mace


@pytest.fixture(scope="module")
def system(aspirin_frames):
    return System.from_atoms(aspirin_frames[0])


@pytest.fixture(scope="module")
def potential(system):
    return MACEPotential(tiny_mace(system.numbers, channels=8), system)


def calculator_of(module, folder, **settings):
    """Return MACE's own calculator, on a file written by save_mace."""
    path = folder / "saved.model"
    save_mace(module, path)
    with default_dtype(torch.get_default_dtype()):  # the calculator changes the default
        return MACECalculator(model_paths=str(path), device="cpu", default_dtype="float64", **settings)


@pytest.mark.parametrize("head", ["Default", "fine", None])
def test_mace_potential_uses_the_named_head(head, aspirin_frames, aspirin_positions, tmp_path):
    system = System.from_atoms(aspirin_frames[0])
    module = tiny_mace(
        system.numbers,
        heads=["Default", "fine"],
        atomic_energies=np.array([[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]]),
        atomic_inter_scale=[1.5, 0.7],
        atomic_inter_shift=[0.1, -0.2],
    )
    potential = MACEPotential(module, system, head)
    assert repr(potential) == f"MACEPotential(ScaleShiftMACE, C9H8O4, head={head or 'Default'!r})"
    # C9H8O4, elements in the order H, C, O.
    assert potential.constant_energy == pytest.approx(-32 - 45 - 24 if head == "fine" else -8 - 18 - 12)
    calculator = calculator_of(module, tmp_path, head=head)
    positions = aspirin_positions[:2]
    energies, forces = potential.energies_and_forces(positions, potential.edges(positions))
    for frame, energy, force in zip(aspirin_frames[:2], energies, forces, strict=True):
        atoms = Atoms(frame.symbols, positions=frame.positions, calculator=calculator)
        assert energy.item() + potential.constant_energy == pytest.approx(atoms.get_potential_energy(), abs=1e-10)
        np.testing.assert_allclose(force.numpy(), atoms.get_forces(), rtol=0, atol=1e-10)


def test_mace_potential_head_of_the_system_comes_first(aspirin_frames):
    atoms = aspirin_frames[0].copy()
    atoms.info["head"] = "fine"
    module = tiny_mace(atoms.numbers, heads=["pt_head", "fine"], atomic_energies=np.zeros((2, 3)),
                       atomic_inter_scale=[1.0, 1.0], atomic_inter_shift=[0.0, 0.0])  # fmt: skip
    assert MACEPotential(module, System.from_atoms(atoms), "pt_head").settings() == {"head": "fine"}
    message = (
        r"head=None, but the model has the heads \['pt_head', 'fine'\], none of which is called 'default': pass head="
    )
    with pytest.raises(ValueError, match=message):
        MACEPotential(module, System.from_atoms(aspirin_frames[0]))


def test_mace_potential_names_unknown_head(system):
    with pytest.raises(ValueError, match=r"head='fine' is not one of the model's heads \['Default'\]: use one"):
        MACEPotential(tiny_mace(system.numbers), system, "fine")


def test_mace_potential_names_unknown_elements():
    water = System.from_atoms(Atoms("OHH", [[0, 0, 0], [1, 0, 0], [0, 1, 0]]))
    with pytest.raises(ValueError, match=r"does not know the element\(s\) O \(it knows the atomic numbers \[1, 7\]"):
        MACEPotential(tiny_mace([1, 7]), water)


def test_single_precision_keeps_interaction_energies(system, aspirin_positions):
    """Isolated atoms of -1e6 eV leave a resolution of about 1 eV to a sum in single precision."""
    double = MACEPotential(tiny_mace(system.numbers, atomic_energies=np.array([-1e6, -2e6, -3e6])), system)
    positions = aspirin_positions[:4]
    exact = double.atomic_energies(positions, double.edges(positions)).sum(dim=1).detach()
    single = MACEPotential(double.module.float(), system)
    assert single.dtype == torch.float32
    small = positions.float()
    energies, _ = single.energies_and_forces(small, single.edges(small))
    assert torch.allclose(energies.double(), exact, rtol=1e-4)
    atomic = single.atomic_energies(small, single.edges(small))
    assert torch.allclose(atomic.sum(dim=1), exact, rtol=1e-4)


def test_system_has_the_precision_of_the_model(potential, system):
    assert potential.system.masses.dtype == potential.dtype == torch.float64
    assert MACEPotential(tiny_mace(system.numbers).float(), system).system.masses.dtype == torch.float32


def test_compilable_reports_any_error_of_mace(system, monkeypatch, caplog):
    """Errors of mace while it rebuilds a model are of any kind, and the simulation continues without compiling."""
    with caplog.at_level(logging.WARNING, "stable_plugin"):
        chebyshev = MACEPotential(tiny_mace(system.numbers, radial_type="chebyshev"), system)
    assert "radial_type='chebyshev'" in caplog.text and "not the gradient of its energy" in caplog.text
    with pytest.raises(
        ValueError, match=r"compile=True: mace cannot rebuild this ScaleShiftMACE \((?!ValueError).*compile=F"
    ):
        chebyshev.compilable()
    monkeypatch.setattr("stable_plugin.md.backends.forces.COMPILATION_S", 0.0)
    simulator = Simulator(chebyshev, Langevin(), NonFinite(), execution=Execution(compile="auto", threads=None))
    simulator.forces.expected_steps = 1000
    generator = torch.Generator().manual_seed(0)
    positions = torch.zeros(1, system.n_atoms, 3, dtype=torch.float64)
    positions[..., 0] = 1.5 * torch.arange(system.n_atoms)
    simulator.run(simulator.prepare(positions, generator), 10, 10, generator)
    assert simulator.forces.compiled is False
    assert "mace cannot rebuild" in caplog.text


def test_compilable_passes_on_lack_of_memory(potential, monkeypatch):
    def fail(*arguments):
        raise MemoryError("no room")

    monkeypatch.setattr("mace.tools.scripts_utils.extract_config_mace_model", fail)
    with pytest.raises(MemoryError, match="no room"):
        potential.compilable()


def test_save_mace_keeps_the_training_mode(potential, tmp_path):
    potential.module.train()
    save_mace(potential.module, tmp_path / "aspirin.model")
    assert potential.module.training
    loaded = load_mace(tmp_path / "aspirin.model")
    assert not loaded.training
    assert torch.equal(flat(loaded.parameters()), flat(potential.module.parameters()))


@pytest.mark.parametrize("name", ["nothing.model", "folder/nothing"])
def test_load_mace_names_a_missing_file(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"no MACE model at .*{name}"):
        load_mace(tmp_path / name)


def test_load_mace_rejects_other_modules(tmp_path):
    path = tmp_path / "linear.model"
    torch.save(nn.Linear(2, 2), path)
    with pytest.raises(ValueError, match=r"linear\.model contains a Linear, not a MACE model"):
        load_mace(path)


@pytest.mark.parametrize("content", ["text", "pickle", "cut"])
def test_load_mace_rejects_a_damaged_file(content, potential, tmp_path):
    path = tmp_path / "broken.model"
    if content == "text":
        path.write_text("these are no weights")
    elif content == "pickle":
        path.write_bytes(pickle.dumps({"weights": 1})[:-3])
    else:
        whole = tmp_path / "whole.model"
        save_mace(potential.module, whole)
        path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(
        ValueError, match=r"broken\.model does not load under the installed e3nn .*install e3nn==0\.5\.1"
    ):
        load_mace(path)


def test_load_potential_recognizes_mace_by_content(tmp_path):
    """The suffix is that of fairchem's files."""
    save_mace(tiny_mace([1, 8]), tmp_path / "model.pt")
    assert type(load_potential(tmp_path / "model.pt")).__name__ == "ScaleShiftMACE"
