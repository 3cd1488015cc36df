"""Any ``torch.nn.Module`` that maps positions to energies."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor, nn

from stable_plugin.md.neighbors import Edges
from stable_plugin.md.system import System
from stable_plugin.models.base import Potential


class ModulePotential(Potential):
    """A module whose ``forward(positions)`` takes (n_replicas, n_atoms, 3) in Å and returns energies in eV.

    Args:
        module: Returns energies per atom (n_replicas, n_atoms), or per replica (n_replicas,).
        system: What is simulated.

    Example:
        >>> import torch
        >>> from ase.build import molecule
        >>> from stable_plugin import System
        >>> from stable_plugin.models import ModulePotential
        >>> class Spring(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.k = torch.nn.Parameter(torch.tensor(2.0))
        ...     def forward(self, positions):
        ...         return 0.5 * self.k * (positions[:, 0] - positions[:, 1]).square().sum(-1)
        >>> potential = ModulePotential(Spring(), System.from_atoms(molecule("N2")))
        >>> positions = torch.tensor([[[0.0, 0, 0], [0, 0, 1.0]]])
        >>> energies, forces = potential.energies_and_forces(positions, potential.edges(positions))
        >>> energies
        tensor([1.])
    """

    def __init__(self, module: nn.Module, system: System) -> None:
        super().__init__(module, system)

    @property
    def cutoff(self) -> float:
        return inf

    def atomic_energies(self, positions: Tensor, edges: Edges) -> Tensor:
        energies: Tensor = self.module(positions)
        if energies.shape == positions.shape[:2]:
            return energies
        if energies.shape == positions.shape[:1]:
            return torch.cat([energies[:, None], energies.new_zeros(len(energies), positions.shape[1] - 1)], dim=1)
        raise ValueError(
            f"{type(self.module).__name__} returned energies of shape {tuple(energies.shape)} for positions of shape "
            f"{tuple(positions.shape)}: return (n_replicas,) or (n_replicas, n_atoms)."
        )


class NoInteraction(nn.Module):
    """Atoms without interaction: stands in for a model where only the settings around it are checked."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, positions: Tensor) -> Tensor:
        """Return zero for each replica, (n_replicas,) in eV; positions are (n_replicas, n_atoms, 3) in Å."""
        return self.weight * positions.sum(dim=(1, 2))

    def stable_potential(self, system: System) -> ModulePotential:
        """Return the potential that simulates ``system``."""
        return ModulePotential(self, system)
