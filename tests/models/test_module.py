"""Modules of the user's own as potentials, and what all potentials share."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import Calculator
from toys import Oscillators

from stable_plugin import System
from stable_plugin.models import ModulePotential
from stable_plugin.models.base import default_dtype
from stable_plugin.testing import PotentialConformance

NITROGEN = System.from_atoms(molecule("N2"))


class Coulomb(torch.nn.Module):
    """Repulsion of point charges, one weight for all, as energies per replica."""

    def __init__(self):
        super().__init__()
        self.strength = torch.nn.Parameter(torch.tensor([0.7, 0.3], dtype=torch.float64))

    def forward(self, positions):
        first, second = torch.triu_indices(positions.shape[1], positions.shape[1], 1)
        distances = torch.linalg.vector_norm(positions[:, first] - positions[:, second], dim=-1)
        return (self.strength[0] / distances + self.strength[1] / distances**2).sum(dim=1)

    def stable_potential(self, system):
        return ModulePotential(self, system)


class CoulombCalculator(Calculator):
    """The same from NumPy, with the forces written out."""

    implemented_properties = ("energy", "forces")

    def __init__(self, strength):
        super().__init__()
        self.strength = strength

    def calculate(self, atoms=None, properties=None, system_changes=None):
        vectors = atoms.positions[:, None] - atoms.positions[None]
        distances = np.linalg.norm(vectors, axis=-1) + np.diag(np.full(len(atoms), np.inf))
        linear, quadratic = self.strength
        energy = 0.5 * (linear / distances + quadratic / distances**2).sum()
        forces = ((linear / distances**3 + 2 * quadratic / distances**4)[:, :, None] * vectors).sum(axis=1)
        self.results = {"energy": energy, "forces": forces}


class TestModulePotential(PotentialConformance):
    def make_module(self):
        return Coulomb()

    def make_calculator(self, module, atoms):
        return CoulombCalculator(module.strength.detach().numpy())

    def make_structures(self):
        return {"molecule": super().make_structures()["molecule"]}


class PerReplica(Oscillators):
    def forward(self, positions):
        return super().forward(positions).sum(dim=1)


@pytest.mark.parametrize("make", [Oscillators, PerReplica])
def test_module_potential_accepts_both_shapes(make):
    potential = ModulePotential(make(3.0), NITROGEN)
    positions = torch.tensor([[[0.1, 0, 0], [0, 0.2, 0]], [[0, 0, 0.3], [0, 0, 0]]], dtype=torch.float64)
    energies, forces = potential.energies_and_forces(positions, potential.edges(positions))
    assert energies.tolist() == pytest.approx([1.5 * 0.05, 1.5 * 0.09])
    assert torch.allclose(forces, -3.0 * positions)
    assert potential.atomic_energies(positions, potential.edges(positions)).shape == (2, 2)
    assert potential.constant_energy == 0.0
    assert not energies.requires_grad


def test_module_potential_rejects_other_shapes():
    class Wrong(Oscillators):
        def forward(self, positions):
            return super().forward(positions)[:, :, None]

    positions = torch.zeros(3, 2, 3, dtype=torch.float64)
    potential = ModulePotential(Wrong(1.0), NITROGEN)
    with pytest.raises(
        ValueError, match=r"Wrong returned energies of shape \(3, 2, 1\) for positions of shape \(3, 2, 3"
    ):
        potential.atomic_energies(positions, potential.edges(positions))


def test_default_dtype_is_restored_after_error():
    before = torch.get_default_dtype()
    other = torch.float64 if before == torch.float32 else torch.float32
    with pytest.raises(ZeroDivisionError), default_dtype(other):
        assert torch.get_default_dtype() == other
        raise ZeroDivisionError
    assert torch.get_default_dtype() == before


def test_potential_repr_shows_module_and_system():
    assert repr(ModulePotential(Oscillators(1.0), System.from_atoms(Atoms("CO", [[0, 0, 0], [0, 0, 1.1]])))) == (
        "ModulePotential(Oscillators, CO)"
    )
