"""Neighbour graphs of batches of molecules."""

from __future__ import annotations

from dataclasses import dataclass
from math import isinf

import torch
from torch import Tensor

# Edge counts are rounded up to a multiple of this, so that few different shapes occur over a run.
CAPACITY_QUANTUM = 256


@dataclass(frozen=True)
class Edges:
    """Directed edges of a batch of replicas, both directions listed.

    Attributes:
        index: Sender and receiver, (2, n_edges), counted through the batch as replica * n_atoms + atom.
        shifts: Added to receiver minus sender, (n_edges, 3) in Å. Padding edges join an atom to itself with a shift
            beyond the cutoff: they contribute exactly nothing.
    """

    index: Tensor
    shifts: Tensor


class SkinList:
    """A neighbour list that stays exact while no omitted pair comes within the cutoff.

    Built once per block of steps with pairs up to ``cutoff + skin``. :meth:`missed` tells, without a host
    synchronisation, in which replicas a pair has come in from outside since; the block is then run again with all pairs
    of those.

    Args:
        cutoff: The model's cutoff in Å; ``inf`` for a model that needs no edges.
        skin: Extra distance in Å.
        n_atoms: Atoms per replica.
        device: Where the positions live.
    """

    def __init__(self, cutoff: float, skin: float, n_atoms: int, device: torch.device) -> None:
        self.cutoff = cutoff
        self.skin = skin
        self.n_atoms = n_atoms
        # Each pair once: its two directions are as long.
        self.first, self.second = torch.triu_indices(n_atoms, n_atoms, offset=1, device=device)
        self.omitted: Tensor | None = None

    def build(self, positions: Tensor, active: Tensor, wild: Tensor | None = None) -> Edges:
        """List the pairs within ``cutoff + skin``.

        Args:
            positions: (n_replicas, n_atoms, 3) in Å, finite.
            active: Replicas that move, (n_replicas,); the others get no edges.
            wild: Replicas of which all pairs are listed whatever their distance, (n_replicas,); none if not given.
        """
        if isinf(self.cutoff):
            return _no_edges(positions)
        listed = self._squared_distances(positions) < (self.cutoff + self.skin) ** 2
        if wild is not None:
            listed = listed | wild[:, None]
        listed = listed & active[:, None]
        self.omitted = ~listed & active[:, None]
        replica, pair = listed.nonzero(as_tuple=True)
        offset = replica * self.n_atoms
        one_way = torch.stack([self.first[pair] + offset, self.second[pair] + offset])
        return _padded(torch.cat([one_way, one_way.flip(0)], dim=1), positions, self.cutoff)

    def missed(self, positions: Tensor) -> Tensor:
        """Replicas in which an omitted pair is within the cutoff, (n_replicas,)."""
        if self.omitted is None:
            return torch.zeros(len(positions), dtype=torch.bool, device=positions.device)
        return ((self._squared_distances(positions) < self.cutoff**2) & self.omitted).any(dim=1)

    def _squared_distances(self, positions: Tensor) -> Tensor:
        return (positions[:, self.first] - positions[:, self.second]).square().sum(dim=-1)


def edges_within(positions: Tensor, cutoff: float) -> Edges:
    """All edges shorter than the cutoff.

    Args:
        positions: (n_replicas, n_atoms, 3) in Å.
        cutoff: In Å.
    """
    pairs = SkinList(cutoff, 0.0, positions.shape[1], positions.device)
    return pairs.build(positions.detach(), torch.ones(len(positions), dtype=torch.bool, device=positions.device))


def _no_edges(positions: Tensor) -> Edges:
    return Edges(index=torch.empty(2, 0, dtype=torch.long, device=positions.device), shifts=positions.new_empty(0, 3))


def _padded(index: Tensor, positions: Tensor, cutoff: float) -> Edges:
    n_edges = index.shape[1]
    capacity = -(-max(n_edges, 1) // CAPACITY_QUANTUM) * CAPACITY_QUANTUM
    padded = index.new_zeros(2, capacity)
    padded[:, :n_edges] = index
    shifts = positions.new_zeros(capacity, 3)
    shifts[n_edges:, 0] = 2.0 * cutoff
    return Edges(index=padded, shifts=shifts)
