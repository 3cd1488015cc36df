"""Two atoms in a periodic cell, whose canonical averages are sums over a grid."""

import torch
from ase import Atoms, units
from torch import nn

from stable_plugin.models import Potential

TEMPERATURE_K = 300.0
KT = units.kB * TEMPERATURE_K
SIDE = 6.0
ARGON = Atoms("Ar2", [[0, 0, 0], [2, 2, 2]], cell=[SIDE] * 3, pbc=True)


class Gaussians(nn.Module):
    """Pairs repel each other by a Gaussian of the distance, up to half the cell unless told otherwise."""

    def __init__(self, height=0.05, width=0.9, cutoff=0.5 * SIDE):
        super().__init__()
        self.cutoff = cutoff
        self.height = nn.Parameter(torch.tensor(height, dtype=torch.float64))
        self.width = nn.Parameter(torch.tensor(width, dtype=torch.float64))

    def stable_potential(self, system):
        return GaussianPotential(self, system)


class GaussianPotential(Potential):
    @property
    def cutoff(self):
        return self.module.cutoff

    def atomic_energies(self, positions, edges):
        flat, module = positions.reshape(-1, 3), self.module
        squared = (flat[edges.index[1]] - flat[edges.index[0]] + edges.shifts).square().sum(dim=1)
        # Shifted to zero with zero slope at the cutoff, so that no force is left out.
        height, slope = torch.exp(-squared / module.width**2), torch.exp(-(self.cutoff**2) / module.width**2)
        smooth = height - slope - slope * (self.cutoff**2 - squared) / module.width**2
        energies = 0.5 * module.height * torch.where(squared < self.cutoff**2, smooth, 0.0)
        zero = positions.new_zeros(flat.shape[0])
        return zero.index_add(0, edges.index[1], energies).reshape(positions.shape[:2])


def grid_of_pairs(n=14):
    """Return a pair of atoms whose distance vectors fill the cell evenly."""
    ticks = (torch.arange(n, dtype=torch.float64) + 0.5) / n * SIDE
    vectors = torch.cartesian_prod(ticks, ticks, ticks)
    return torch.stack([torch.zeros_like(vectors), vectors], dim=1)


def boltzmann_weights(potential, frames):
    """Return normalized weights of frames that are spread evenly."""
    with potential.frozen():
        energies = potential.energies(frames, potential.edges(frames))
    return torch.softmax(-energies / KT, dim=0)


def attached(observable, potential):
    """Return the observable, bound to the system of the potential and attached to it."""
    observable.bind(potential.system, torch.zeros(1, potential.system.n_atoms, 3))
    observable.attach(potential, TEMPERATURE_K)
    return observable


def central_difference(loss, parameter, step=1e-4):
    """Return the derivative of a function without arguments by a parameter of the model that it uses."""
    with torch.no_grad():
        parameter += step
        above = loss()
        parameter -= 2 * step
        below = loss()
        parameter += step
    return (above - below) / (2 * step)
