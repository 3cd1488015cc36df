"""The state of a simulation: everything that changes from step to step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from dataclasses import replace as replace_fields

import torch
from torch import Tensor

from stable_plugin.units import BOLTZMANN


@dataclass(frozen=True, repr=False)
class State:
    """Positions, velocities and whatever else the next step of all replicas needs.

    :meth:`Simulator.place <stable_plugin.md.Simulator.place>` builds the first state; every later one is a
    :meth:`replace` of the one before, so that a new field concerns only those who use it.

    Attributes:
        positions: (n_replicas, n_atoms, 3) in Å.
        velocities: (n_replicas, n_atoms, 3) in Å per ASE time.
        forces: (n_replicas, n_atoms, 3) in eV/Å.
        energies: Potential energies, (n_replicas,) in eV.
        chain: Thermostat positions and velocities, (n_replicas, 2, chain_length); length zero for Langevin dynamics.
        cell: Cell vectors of each replica, one per row, (n_replicas, 3, 3) in Å; zeros for isolated systems.
    """

    positions: Tensor
    velocities: Tensor
    forces: Tensor
    energies: Tensor
    chain: Tensor
    cell: Tensor

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}={list(tensor.shape)}" for name, tensor in self.state_dict().items())
        return f"State({shapes}, dtype={self.positions.dtype}, device={self.positions.device})"

    @property
    def n_replicas(self) -> int:
        """Number of replicas."""
        return len(self.positions)

    def replace(self, **changes: Tensor) -> State:
        """Return a copy with the named tensors replaced."""
        return replace_fields(self, **changes)

    def select(self, replicas: Tensor, other: State) -> State:
        """Return this state where ``replicas`` (n_replicas,) is true, and ``other`` elsewhere."""
        return State.from_tensors(
            _where(replicas, mine, theirs) for mine, theirs in zip(self.tensors(), other.tensors(), strict=True)
        )

    def finite(self) -> Tensor:
        """Return whether positions, velocities, forces and energy of each replica are finite, (n_replicas,)."""
        # A sum is finite only if its terms are, and costs one reduction where isfinite().all() costs two kernels.
        total = sum(tensor.flatten(1).sum(1) for tensor in (self.positions, self.velocities, self.forces))
        return torch.isfinite(total + self.energies)

    def tensors(self) -> list[Tensor]:
        """Return the tensors in the order of the attributes, as a CUDA graph takes them."""
        return [getattr(self, field.name) for field in fields(self)]

    @classmethod
    def from_tensors(cls, tensors: Iterable[Tensor]) -> State:
        """Return the state whose :meth:`tensors` these are."""
        return cls(*tensors)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors by name, as a checkpoint stores them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor], device: torch.device | str | None = None) -> State:
        """Return the state whose :meth:`state_dict` this is, moved to ``device``.

        Args:
            tensors: Tensors by the names of the fields.
            device: Device of the state; that of the tensors if None.

        Raises:
            ValueError: If a tensor is missing.
        """
        names = [field.name for field in fields(cls)]
        missing = [name for name in names if name not in tensors]
        if missing:
            raise ValueError(
                f"tensors={sorted(tensors)} lacks {missing}: the checkpoint was written by another version of "
                "stable_plugin. Resume with that version, or restart the run."
            )
        return cls(**{name: tensors[name].to(device) for name in names})


def kinetic_energy(velocities: Tensor, masses: Tensor) -> Tensor:
    """Return kinetic energies ½ Σ m v², (...,) in eV.

    Args:
        velocities: (..., n_atoms, 3) in Å per ASE time.
        masses: (n_atoms,) in u.
    """
    # Atoms of infinite mass are held in place.
    moving = masses.masked_fill(masses.isinf(), 0.0)
    return 0.5 * (moving[:, None] * velocities.square()).sum(dim=(-1, -2))


def kinetic_temperature(velocities: Tensor, masses: Tensor, degrees_of_freedom: int | None = None) -> Tensor:
    """Return kinetic temperatures 2 K / (N_f k_B) in K.

    Args:
        velocities: (..., n_atoms, 3) in Å per ASE time.
        masses: (n_atoms,) in u.
        degrees_of_freedom: Number N_f of momenta that are thermalized; three for each atom if None.
    """
    return 2.0 * kinetic_energy(velocities, masses) / ((degrees_of_freedom or 3 * len(masses)) * BOLTZMANN)


def maxwell_boltzmann(shape: Sequence[int], masses: Tensor, temperature_K: float, generator: torch.Generator) -> Tensor:
    """Draw velocities from the Maxwell-Boltzmann distribution, in Å per ASE time.

    Args:
        shape: (n_replicas, n_atoms, 3).
        masses: (n_atoms,) in u.
        temperature_K: Temperature in K.
        generator: Source of the random numbers.

    Returns:
        (n_replicas, n_atoms, 3) in Å per ASE time.
    """
    noise = torch.randn(tuple(shape), generator=generator, device=masses.device, dtype=masses.dtype)
    return noise * (BOLTZMANN * temperature_K / masses[:, None]).sqrt()


def _where(mask: Tensor, mine: Tensor, theirs: Tensor) -> Tensor:
    # A tensor that a step has not replaced, as the cell, costs nothing.
    if mine is theirs:
        return mine
    return torch.where(mask.reshape(-1, *[1] * (mine.dim() - 1)), mine, theirs)
