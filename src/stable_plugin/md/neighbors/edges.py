"""Edges: the neighbor graph that a model is called with."""

from __future__ import annotations

from dataclasses import dataclass
from math import isinf

import torch
from torch import Tensor

from stable_plugin.md.neighbors.pairs import Pairs, all_pairs, lists_all_pairs, padding_shifts, pairs_within
from stable_plugin.md.system import System


@dataclass(frozen=True)
class Edges:
    """Directed edges of a batch of replicas, both directions listed.

    Attributes:
        index: Sender and receiver, (2, n_edges), each replica * n_atoms + atom.
        shifts: Added to receiver minus sender, (n_edges, 3) in Å: multiples of the cell vectors where the edge crosses
            the boundary. Padding edges join an atom to itself with a shift beyond the cutoff, and contribute exactly
            zero.
        cell: Cell of each replica, (n_replicas, 3, 3) in Å, for models that build their own graph, where replicas differ in
            their cells; None otherwise.
    """

    index: Tensor
    shifts: Tensor
    cell: Tensor | None = None

    def slice_replicas(self, first: int, last: int, n_atoms: int, cutoff: float) -> Edges:
        """Return the edges of replicas ``first`` to ``last`` (excluded), renumbered from zero.

        Models expect at least one edge, so a batch without any gets one of padding.
        """
        replica = self.index[1] // n_atoms
        index = self.index[:, (replica >= first) & (replica < last)] - first * n_atoms
        shifts = self.shifts[(replica >= first) & (replica < last)]
        if index.shape[1] > 0 or isinf(cutoff):
            return Edges(index, shifts, None if self.cell is None else self.cell[first:last])
        return Edges(self.index.new_zeros(2, 1), padding_shifts(1, self.shifts, cutoff))

    def reindex(self, batch: Tensor, n_replicas: int, n_atoms: int) -> Edges:
        """Return the edges of a batch of replicas, numbered in the order of the batch, without reading the host.

        Args:
            batch: Replicas in the batch, (n_batch,); the others have no edges.
            n_replicas: Number of all replicas.
            n_atoms: Number of atoms in one replica.
        """
        slot = torch.zeros(n_replicas, dtype=torch.long, device=batch.device)
        slot = slot.index_copy(0, batch, torch.arange(len(batch), device=batch.device))
        index = slot[self.index // n_atoms] * n_atoms + self.index % n_atoms
        return Edges(index, self.shifts, None if self.cell is None else self.cell.index_select(0, batch))


def edges_within(positions: Tensor, cutoff: float, system: System, cell: Tensor | None = None) -> Edges:
    """Return all edges shorter than the cutoff.

    Args:
        positions: (n_replicas, n_atoms, 3) in Å.
        cutoff: In Å; ``inf`` for a model that takes no edges.
        system: System that the positions belong to.
        cell: Cell of each replica, (n_replicas, 3, 3) in Å; that of the system if None.
    """
    if isinf(cutoff):
        return no_edges(positions, cell)
    at = positions.detach()
    pairs = (
        all_pairs(len(at), system.n_atoms, positions.device)
        if lists_all_pairs(system)
        else pairs_within(at, cutoff, system, cell)
    )
    return select_edges(pairs, pairs.squared_distances(at) < cutoff**2, at, cutoff)


def select_edges(pairs: Pairs, mask: Tensor, positions: Tensor, cutoff: float) -> Edges:
    """Return the pairs for which ``mask`` (n_pairs,) is true; one edge of padding if there are none."""
    chosen = mask.nonzero().squeeze(1)
    if len(chosen) == 0:
        padding = Pairs.padding(1, positions, cutoff)
        return both_directions(padding.first, padding.second, padding.shifts, positions)
    shifts = None if pairs.shifts is None else pairs.shifts[chosen]
    return both_directions(pairs.first[chosen], pairs.second[chosen], shifts, positions)


def select_edges_padded(pairs: Pairs, mask: Tensor, positions: Tensor, cutoff: float, capacity: int) -> Edges:
    """Return the first ``capacity`` pairs for which ``mask`` is true, padded, without reading the host."""
    # Pairs that are not selected, or do not fit, are all written to one extra row, which is then cut off.
    row = torch.where(mask, mask.cumsum(0) - 1, capacity).clamp_max(capacity)
    buffer = Pairs.padding(capacity + 1, positions, cutoff)
    assert pairs.shifts is not None and buffer.shifts is not None
    return both_directions(
        buffer.first.index_copy(0, row, pairs.first)[:-1],
        buffer.second.index_copy(0, row, pairs.second)[:-1],
        buffer.shifts.index_copy(0, row, pairs.shifts)[:-1],
        positions,
    )


def both_directions(first: Tensor, second: Tensor, shifts: Tensor | None, positions: Tensor) -> Edges:
    """Return the edges of pairs, each in both directions."""
    index = torch.stack([torch.cat([first, second]), torch.cat([second, first])])
    if shifts is None:
        return Edges(index, positions.new_zeros(1, 3).expand(index.shape[1], 3))
    return Edges(index, torch.cat([shifts, -shifts]))


def no_edges(positions: Tensor, cell: Tensor | None = None) -> Edges:
    """Return a graph without edges, for a model that takes none; with the cell of each replica, where they differ."""
    return Edges(torch.empty(2, 0, dtype=torch.long, device=positions.device), positions.new_empty(0, 3), cell)
