"""The moving part of a simulation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from stable_plugin.units import BOLTZMANN


@dataclass(frozen=True)
class State:
    """Positions and momenta of all replicas, with what the next step needs.

    Attributes:
        positions: (n_replicas, n_atoms, 3) in Å.
        velocities: (n_replicas, n_atoms, 3) in Å per ASE time.
        forces: (n_replicas, n_atoms, 3) in eV/Å.
        energies: Potential energies, (n_replicas,) in eV.
        chain: Thermostat positions and velocities, (n_replicas, 2, chain_length); length zero for Langevin.
    """

    positions: Tensor
    velocities: Tensor
    forces: Tensor
    energies: Tensor
    chain: Tensor

    @property
    def n_replicas(self) -> int:
        """Number of replicas."""
        return len(self.positions)

    def select(self, replicas: Tensor, other: State) -> State:
        """This state where ``replicas`` (n_replicas,) is true, ``other`` elsewhere."""
        return State(
            *(_where(replicas, mine, theirs) for mine, theirs in zip(self.tensors(), other.tensors(), strict=True))
        )

    def tensors(self) -> list[Tensor]:
        """The tensors in the order of the attributes."""
        return [getattr(self, field.name) for field in fields(self)]

    def finite(self) -> Tensor:
        """Replicas whose numbers are all finite, (n_replicas,)."""
        # A sum is finite only if its terms are, and costs one reduction where isfinite().all() costs two kernels.
        total = sum(tensor.flatten(1).sum(1) for tensor in (self.positions, self.velocities, self.forces))
        return torch.isfinite(total + self.energies)

    def with_(self, **changes: Tensor) -> State:
        """A copy with some tensors replaced."""
        return replace(self, **changes)


def kinetic_energy(velocities: Tensor, masses: Tensor) -> Tensor:
    """Kinetic energies, (...,) in eV.

    Args:
        velocities: (..., n_atoms, 3) in Å per ASE time.
        masses: (n_atoms,) in u.
    """
    return 0.5 * (masses[:, None] * velocities.square()).sum(dim=(-1, -2))


def kinetic_temperature(velocities: Tensor, masses: Tensor) -> Tensor:
    """Kinetic temperatures in K, counting all 3 n_atoms degrees of freedom; shapes as in :func:`kinetic_energy`."""
    return 2.0 * kinetic_energy(velocities, masses) / (3 * len(masses) * BOLTZMANN)


def maxwell_boltzmann(shape: Sequence[int], masses: Tensor, temperature_K: float, generator: torch.Generator) -> Tensor:
    """Thermal velocities in Å per ASE time.

    Args:
        shape: (n_replicas, n_atoms, 3).
        masses: (n_atoms,) in u.
        temperature_K: Temperature in K.
        generator: Source of the random numbers.
    """
    noise = torch.randn(tuple(shape), generator=generator, device=masses.device, dtype=masses.dtype)
    return noise * (BOLTZMANN * temperature_K / masses[:, None]).sqrt()


def _where(mask: Tensor, mine: Tensor, theirs: Tensor) -> Tensor:
    return torch.where(mask.reshape(-1, *[1] * (mine.dim() - 1)), mine, theirs)
