"""Potentials of any module, and the search for a potential in a module or a file."""

import pytest
import torch
from ase.build import molecule
from torch import nn
from toys import tiny_mace, triatomic

from stable_plugin import System
from stable_plugin.models import ModulePotential, find_potential, load_potential

WATER = molecule("H2O")


def test_module_potential_rejects_other_shapes():
    potential = ModulePotential(nn.Linear(3, 3).double(), System.from_atoms(WATER))
    message = (
        r"Linear returned energies of shape \(2, 3, 3\) for positions of shape \(2, 3, 3\): return \(n_replicas,\)"
    )
    with pytest.raises(ValueError, match=message):
        potential.energies_and_forces(torch.tensor(WATER.positions).repeat(2, 1, 1), None)


class WithHook(nn.Module):
    """Module that defines its potential by the hook."""

    def __init__(self, potential):
        super().__init__()
        self.potential = potential

    def stable_potential(self, system):
        return self.potential, system


def test_find_potential_uses_hooks_and_known_models():
    system, springs = System.from_atoms(WATER), triatomic(1.0)
    assert find_potential(WithHook(springs), system) == (springs, system)
    with pytest.raises(TypeError, match=r"no potential found in Linear: it holds no MACE or fairchem model\. Give the"):
        find_potential(nn.Linear(2, 2), system)
    model = tiny_mace(WATER.numbers)
    found = find_potential(nn.Sequential(nn.Identity(), model), system)
    assert type(found).__name__ == "MACEPotential"
    assert found.module is model


def test_load_potential_rejects_a_missing_file(tmp_path):
    pytest.importorskip("mace")
    with pytest.raises((FileNotFoundError, ValueError), match=r"nothing\.model"):
        load_potential(tmp_path / "nothing.model")
