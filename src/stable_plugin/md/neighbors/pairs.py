"""Pairs of atoms: the candidates that the edges of a step are selected from."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import vesin
from torch import Tensor

from stable_plugin.md.system import System

MAX_COORDINATE_A = 1e6
"""A replica with an atom farther out in Å has been torn apart: it gets no pairs, and the detector flags it."""


ALL_PAIRS_ATOMS = 512
"""Most atoms of an isolated system whose pairs are all listed, instead of searched for."""


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

    The cost is linear in the number of atoms.

    Args:
        positions: (n_replicas, n_atoms, 3) in Å, inside the cell or not.
        cutoff: In Å.
        system: System with the cell and the periodic directions.
        cell: Cell of each replica, (n_replicas, 3, 3) in Å; that of the system if None.
    """
    search = vesin.NeighborList(cutoff=cutoff, full_list=False)
    cells, to_cells = _lattices(system, cell)
    tables: list[Tensor] = []
    for replica, frame in enumerate(positions.detach().double().cpu()):
        if not bool(torch.isfinite(frame).all()) or frame.abs().max() > MAX_COORDINATE_A:
            continue
        # Wrapped into the cell, where the search is exact however far atoms have diffused.
        vectors = cells[replica if len(cells) > 1 else 0]
        images = torch.floor(frame @ to_cells[replica if len(cells) > 1 else 0])
        found = search.compute((frame - images @ vectors).numpy(), vectors.numpy(), list(system.pbc), quantities="ijS")
        first, second, crossed = (torch.from_numpy(part.astype("int64")) for part in found)
        shift = (crossed - images[second].long() + images[first].long()).double()
        tables.append(
            torch.cat([first[:, None], second[:, None], torch.full_like(first, replica)[:, None], shift], dim=1)
        )
    table = torch.cat(tables) if tables else torch.empty(0, 6, dtype=torch.float64)
    first, second, replica_index = table[:, :3].long().to(positions.device).unbind(dim=1)
    offset = replica_index * system.n_atoms
    if len(cells) == 1:
        shifts = table[:, 3:] @ cells[0]
    else:
        shifts = torch.einsum("pi,pij->pj", table[:, 3:], cells[table[:, 2].long()])
    return Pairs(first + offset, second + offset, replica_index, shifts.to(positions))


def _lattices(system: System, cell: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the cells and their inverses, both (n_cells, 3, 3), float64 on the CPU; one cell if it serves all."""
    if cell is None or len(cell) == 1:
        own = system.cell if cell is None else cell[0]
        return own.double().cpu()[None], replace(system, cell=own).to_cell.cpu()[None]
    return cell.double().cpu(), system.inverse_of(cell.double().cpu())
