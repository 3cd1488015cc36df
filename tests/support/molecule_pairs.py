"""Molecules of two atoms whose ensemble is known exactly, shared by tests of the local estimator."""

from math import sqrt

import numpy as np
import torch
from ase import Atoms
from torch import nn

from stable_plugin import System
from stable_plugin.models import ModulePotential
from stable_plugin.units import BOLTZMANN

TEMPERATURE = 300.0
KT = BOLTZMANN * TEMPERATURE
STIFFNESS = 2.0
SPACING = 10.0


class Pairs(nn.Module):
    """Molecules of two atoms each, U = ½ k |r|² for every one, half of it on each atom."""

    def __init__(self):
        super().__init__()
        self.k = nn.Parameter(torch.tensor(STIFFNESS, dtype=torch.float64))

    def forward(self, positions):
        energies = 0.25 * self.k * (positions[:, ::2] - positions[:, 1::2]).square().sum(-1)
        return energies.repeat_interleave(2, dim=1)


def pairs(n_molecules):
    """So many molecules in a row, and the potential that holds each together."""
    atoms = Atoms(f"N{2 * n_molecules}", positions=np.zeros((2 * n_molecules, 3)))
    atoms.positions[:, 0] = SPACING * np.repeat(np.arange(n_molecules), 2)
    atoms.positions[1::2, 1] = 1.0
    system = System.from_atoms(atoms, bonds=[(2 * m, 2 * m + 1) for m in range(n_molecules)])
    return system, ModulePotential(Pairs(), system)


def boltzmann_frames(n_frames, n_molecules, generator):
    """Exact samples: every component of a bond vector is Gaussian with variance kT/k."""
    vectors = torch.randn(n_frames, n_molecules, 3, generator=generator, dtype=torch.float64) * sqrt(KT / STIFFNESS)
    positions = torch.zeros(n_frames, 2 * n_molecules, 3, dtype=torch.float64)
    positions[..., 0] = SPACING * torch.arange(n_molecules).repeat_interleave(2)
    positions[:, 1::2] += vectors
    return positions
