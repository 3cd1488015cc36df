"""Pairs of atoms: the candidates that the edges of a step are selected from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stable_plugin.md.neighbors.search import search_on_cpu, search_on_device
from stable_plugin.md.system import System

MAX_COORDINATE_A = 1e6
"""A replica with an atom farther out in Å has been torn apart: it gets no pairs, and the detector flags it."""


ALL_PAIRS_ATOMS = 512
"""Most atoms of an isolated system whose pairs are all listed, instead of searched for."""

DEVICE_SEARCH_ATOMS = 4096
"""Most atoms of a replica whose pairs are searched for on a device other than the CPU, at a cost that grows with their square."""


def lists_all_pairs(system: System) -> bool:
    """Return whether all pairs of atoms are listed once: in a small isolated system, where no search is needed.

    Args:
        system: The system that is simulated.
    """
    return not system.periodic and system.n_atoms <= ALL_PAIRS_ATOMS


@dataclass(frozen=True)
class Pairs:
    """Pairs of atoms that can come within the cutoff, each listed once.

    Attributes:
        first: Index through the batch, replica * n_atoms + atom, (n_pairs,).
        second: The same for the other atom.
        replica: Replica that the pair belongs to, (n_pairs,).
        shifts: Added to second minus first, (n_pairs, 3) in Å; None if nothing is periodic.
    """

    first: Tensor
    second: Tensor
    replica: Tensor
    shifts: Tensor | None

    @classmethod
    def padding(cls, n_pairs: int, positions: Tensor, cutoff: float) -> Pairs:
        """Return pairs of an atom with itself, shifted beyond the cutoff, for positions (n_replicas, n_atoms, 3).

        The pairs take the atoms in turn: a GPU adds up many edges of one atom one after the other.
        """
        n_replicas, n_atoms, _ = positions.shape
        index = torch.arange(n_pairs, device=positions.device) % (n_replicas * n_atoms)
        return cls(index, index.clone(), index // n_atoms, padding_shifts(n_pairs, positions, cutoff))

    def squared_distances(self, positions: Tensor) -> Tensor:
        """Return squared distances, (n_pairs,) in Å², for positions (n_replicas, n_atoms, 3)."""
        flat = positions.reshape(-1, 3)
        vectors = flat.index_select(0, self.second) - flat.index_select(0, self.first)
        return (vectors if self.shifts is None else vectors + self.shifts).square().sum(dim=-1)

    def copy_(self, pairs: Pairs, positions: Tensor, cutoff: float) -> None:
        """Overwrite these pairs in place by others, at most as many, followed by padding."""
        assert self.shifts is not None
        n_pairs = len(pairs.first)
        padding = Pairs.padding(len(self.first) - n_pairs, positions, cutoff)
        assert padding.shifts is not None
        shifts = self.shifts.new_zeros(n_pairs, 3) if pairs.shifts is None else pairs.shifts
        self.first.copy_(torch.cat([pairs.first, padding.first]))
        self.second.copy_(torch.cat([pairs.second, padding.second]))
        self.replica.copy_(torch.cat([pairs.replica, padding.replica]))
        self.shifts.copy_(torch.cat([shifts, padding.shifts]))


def padding_shifts(n_pairs: int, like: Tensor, cutoff: float) -> Tensor:
    """Return shifts beyond the cutoff, (n_pairs, 3) in Å: a model's cutoff function is exactly zero there."""
    shifts = like.new_zeros(n_pairs, 3)
    shifts[:, 0].fill_(2.0 * cutoff)
    return shifts


def all_pairs(n_replicas: int, n_atoms: int, device: torch.device) -> Pairs:
    """Return every pair within every replica of an isolated molecule."""
    first, second = torch.triu_indices(n_atoms, n_atoms, offset=1, device=device)
    replica = torch.arange(n_replicas, device=device).repeat_interleave(len(first))
    offset = replica * n_atoms
    return Pairs(first.repeat(n_replicas) + offset, second.repeat(n_replicas) + offset, replica, None)


def pairs_within(positions: Tensor, cutoff: float, system: System, cell: Tensor | None = None) -> Pairs:
    """Return every pair closer than the cutoff, images included, for any cell.

    The cost is linear in the number of atoms on a CPU, and for more than :data:`DEVICE_SEARCH_ATOMS` on other devices.

    Args:
        positions: (n_replicas, n_atoms, 3) in Å, inside the cell or not.
        cutoff: In Å.
        system: System with the cell and the periodic directions.
        cell: Cell of each replica, (n_replicas, 3, 3) in Å; that of the system if None.
    """
    search, device = _search_for(positions)
    frames = positions.detach().to(device, torch.float64)
    usable = (frames.abs() <= MAX_COORDINATE_A).flatten(1).all(dim=1)  # false for NaN
    frames = torch.where(usable[:, None, None], frames, torch.nan)
    cells, to_cells = _lattices(system, cell)
    # Wrapped into the cell, where the search is exact however far atoms have diffused.
    images = torch.floor(frames @ to_cells.to(device))
    own = cells.to(device)
    wrapped = frames - images @ own
    replica, first, second, *crossed = search(wrapped, cutoff, cells, system.pbc).unbind(dim=1)
    shift = torch.stack(crossed, dim=1) - images[replica, second] + images[replica, first]
    vectors = shift @ own[0] if len(own) == 1 else torch.einsum("pi,pij->pj", shift, own[replica])
    offset, home = replica * system.n_atoms, positions.device
    return Pairs((first + offset).to(home), (second + offset).to(home), replica.to(home), vectors.to(positions))


def _search_for(positions: Tensor) -> tuple[Callable[..., Tensor], torch.device]:
    """Return the search for replicas of this size, and the device that it runs on."""
    if positions.device.type == "cpu" or positions.shape[1] > DEVICE_SEARCH_ATOMS:
        return search_on_cpu, torch.device("cpu")
    return search_on_device, positions.device


def _lattices(system: System, cell: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the cells and their inverses, both (n_cells, 3, 3), float64 on the CPU; one cell if it serves all."""
    if cell is None or len(cell) == 1:
        own = system.cell if cell is None else cell[0]
        return own.double().cpu()[None], replace(system, cell=own).to_cell.cpu()[None]
    return cell.double().cpu(), system.inverse_of(cell.double().cpu())
