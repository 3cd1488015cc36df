"""Potentials: MACE against MACE's own calculator, its files, and modules of the user's own."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from mace.calculators import MACECalculator
from mace.modules import MACE
from pytorch_lightning import LightningModule
from toys import Oscillators, tiny_mace

from stable_plugin import System
from stable_plugin.potentials import ModulePotential, find_potential
from stable_plugin.potentials.mace import MACEPotential, default_dtype, load_mace, save_mace


@pytest.fixture(scope="module")
def system(aspirin_frames):
    return System.from_atoms(aspirin_frames[0])


@pytest.fixture
def potential(system):
    return MACEPotential(tiny_mace(system.numbers, channels=8), system)


def calculator_of(module, tmp_path):
    path = tmp_path / "model.model"
    save_mace(module, path)
    with default_dtype(torch.get_default_dtype()):  # the calculator sets the default and leaves it
        return MACECalculator(model_paths=str(path), device="cpu", default_dtype="float64")


def plain_mace(system):
    """MACE without scale and shift, which reports its energies in another way."""
    changes = {"atomic_inter_scale": None, "atomic_inter_shift": None}

    class Unscaled(MACE):
        def __init__(self, **settings):
            super().__init__(**{name: value for name, value in settings.items() if name not in changes})

    import toys

    before = toys.ScaleShiftMACE
    toys.ScaleShiftMACE = Unscaled
    try:
        return tiny_mace(system.numbers)
    finally:
        toys.ScaleShiftMACE = before


def test_energies_and_forces_equal_those_of_the_mace_calculator(potential, aspirin_frames, aspirin_positions, tmp_path):
    calculator = calculator_of(potential.module, tmp_path)
    positions = aspirin_positions[:5]
    energies, forces = potential.energies_and_forces(positions, potential.edges(positions))
    assert forces.abs().max() > 0.01
    for frame, energy, force in zip(aspirin_frames, energies, forces, strict=False):
        atoms = Atoms(frame.symbols, positions=frame.positions, calculator=calculator)
        assert energy.item() + potential.constant_energy == pytest.approx(atoms.get_potential_energy(), abs=1e-10)
        np.testing.assert_allclose(force.numpy(), atoms.get_forces(), atol=1e-10)
