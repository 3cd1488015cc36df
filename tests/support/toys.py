"""Small potentials with known answers, and molecules for them."""

from math import inf

import numpy as np
import pytest
import torch
from ase import Atoms
from torch import nn

from stable_plugin import System
from stable_plugin.models import ModulePotential, Potential
from stable_plugin.models.base import default_dtype


class Oscillators(nn.Module):
    """Harmonic potential U = ½ k m x² of each coordinate, with one k for all; the masses m are one by default."""

    def __init__(self, stiffness, masses=None):
        super().__init__()
        self.k = nn.Parameter(torch.tensor(float(stiffness), dtype=torch.float64))
        self.masses = 1.0 if masses is None else torch.as_tensor(masses)

    def forward(self, positions):
        return 0.5 * self.k * self.masses * positions.square().sum(-1)


class Springs(nn.Module):
    """Harmonic bonds U = ½ k (r - r0)², with log k as the parameter, so that no optimizer step makes k negative.

    Args:
        bonds: (n_bonds, 2).
        stiffness: Initial k in eV/Å².
        lengths: r0 in Å, (n_bonds,).
        breaks_at: Bond length in Å above which the energy is NaN.
    """

    def __init__(self, bonds, stiffness, lengths, breaks_at=inf):
        super().__init__()
        self.first, self.second = torch.as_tensor(bonds).unbind(1)
        self.log_k = nn.Parameter(torch.tensor(float(stiffness), dtype=torch.float64).log())
        self.lengths = torch.as_tensor(lengths, dtype=torch.float64)
        self.breaks_at = breaks_at

    @property
    def stiffness(self):
        return self.log_k.exp().item()

    def forward(self, positions):
        lengths = torch.linalg.vector_norm(positions[:, self.first] - positions[:, self.second], dim=-1)
        energy = 0.5 * self.log_k.exp() * (lengths - self.lengths).square()
        return torch.where(lengths < self.breaks_at, energy, torch.nan).sum(-1)


class PairRepulsion(Potential):
    """Soft spheres U = a Σ (1 - r / cutoff)², summed over the directed edges of the neighbor list.

    The slope of the force changes at the cutoff, so a missing edge has a visible effect.
    """

    def __init__(self, system, strength=0.5, cutoff=2.5):
        module = nn.Module()
        module.strength = nn.Parameter(torch.tensor(strength, dtype=torch.float64))
        super().__init__(module, system)
        self._cutoff = cutoff

    @property
    def cutoff(self):
        return self._cutoff

    def atomic_energies(self, positions, edges):
        flat = positions.reshape(-1, 3)
        sender, receiver = edges.index
        lengths = torch.linalg.vector_norm(flat[receiver] - flat[sender] + edges.shifts, dim=-1)
        energies = self.module.strength * (1.0 - lengths / self._cutoff).clamp(min=0.0).square()
        return torch.zeros_like(flat[:, 0]).index_add(0, receiver, energies).reshape(positions.shape[:2])


class SoftSpheres(nn.Module):
    """A module that simulates soft spheres with a cutoff of 3 Å, as users' modules do."""

    def __init__(self, strength=0.8):
        super().__init__()
        self.strength = nn.Parameter(torch.tensor(strength, dtype=torch.float64))

    def stable_potential(self, system):
        potential = PairRepulsion(system, cutoff=3.0)
        potential.module = self
        return potential


TRIATOMIC = Atoms("OHH", positions=[[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [-0.3, 0.95, 0.0]])
"""Water with bonds of about 1 Å."""


def triatomic(stiffness, breaks_at=inf):
    """Return a potential of springs along the two O-H bonds, with rest lengths of 1 Å."""
    system = System.from_atoms(TRIATOMIC)
    return ModulePotential(Springs(system.bonds, stiffness, torch.ones(2), breaks_at), system)


def tiny_mace(numbers, channels=4, seed=0, model=None, **changes):
    """Return a MACE model with random weights, in double precision.

    Args:
        numbers: Atomic numbers that the model supports.
        channels: Number of scalar channels.
        seed: Seed of the weights.
        model: Class of the model; ScaleShiftMACE if None.
        changes: Changed arguments of the class; an argument changed to None is left out.
    """
    pytest.importorskip("mace")
    from e3nn import o3
    from mace.modules import ScaleShiftMACE, interaction_classes

    elements = sorted({int(number) for number in numbers})
    interaction = interaction_classes["RealAgnosticResidualInteractionBlock"]
    settings = {
        "r_max": 4.5,
        "num_bessel": 4,
        "num_polynomial_cutoff": 5,
        "max_ell": 1,
        "interaction_cls": interaction,
        "interaction_cls_first": interaction,
        "num_interactions": 2,
        "num_elements": len(elements),
        "hidden_irreps": o3.Irreps(f"{channels}x0e"),
        "MLP_irreps": o3.Irreps("4x0e"),
        "atomic_energies": -10.0 * np.array(elements, dtype=float),
        "avg_num_neighbors": 12.0,
        "atomic_numbers": elements,
        "correlation": 1,
        "gate": nn.functional.silu,
        "radial_MLP": [8],
        "atomic_inter_scale": 1.5,
        "atomic_inter_shift": 0.1,
    }
    with default_dtype(torch.float64), torch.random.fork_rng():
        torch.manual_seed(seed)
        return (model or ScaleShiftMACE)(
            **{name: value for name, value in {**settings, **changes}.items() if value is not None}
        )


def as_potential(model, system):
    """Return the potential of a MACE model for a system."""
    from stable_plugin.models.mace.potential import MACEPotential

    return MACEPotential(model, system)


def flat(tensors):
    """Return the tensors as one vector."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])
