"""The neighbor list of a simulation."""

from __future__ import annotations

from math import ceil, isinf

import torch
from torch import Tensor

from stable_plugin.md.neighbors.edges import Edges, no_edges, select_edges, select_edges_padded
from stable_plugin.md.neighbors.pairs import Pairs, all_pairs, lists_all_pairs, pairs_within
from stable_plugin.md.system import System

CAPACITY_QUANTUM = 256
"""Fixed capacities are multiples of this, so that few different shapes occur in a run."""

CAPACITY_MULTIPLIER = 1.1
"""Fixed capacities relative to the number of pairs found when they are allocated."""


class NeighborList:
    """The neighbor graph of a simulation, exact at every step.

    The edges of a step are selected from candidate pairs: all pairs of a small isolated system, and otherwise those
    within ``cutoff + skin`` at an earlier step, which stay valid until an atom has moved half the skin.
    :meth:`did_overflow` reports, without reading the host, where that has happened within a block of steps; the block
    is then repeated.

    Args:
        cutoff: Cutoff of the model in Å; ``inf`` for a model that takes no edges.
        skin: Added to the cutoff of the candidate pairs, in Å.
        system: System that is simulated.
        fixed: Whether the number of edges is fixed, with padding, and selected without reading the host, as a CUDA
            graph requires. Otherwise there are as many edges as neighbors.

    Attributes:
        searches: Number of times the pairs have been searched for.
        generation: Number of times the buffers of fixed edges have been replaced by larger ones.
    """

    def __init__(self, cutoff: float, skin: float, system: System, *, fixed: bool = False) -> None:
        self.cutoff = cutoff
        self.skin = skin
        self.system = system
        self.fixed = fixed
        self.searches = 0
        self._lists_all = lists_all_pairs(system)
        self.generation = 0
        self._pairs: Pairs | None = None
        self._reference_positions: Tensor | None = None
        self._stale = True
        self._capacity = 0
        self._max_occupancy: Tensor | None = None

    def __repr__(self) -> str:
        return f"NeighborList(cutoff={self.cutoff}, skin={self.skin}, system={self.system!r}, fixed={self.fixed})"

    @property
    def half_skin(self) -> float:
        """Distance in Å that every atom may move before a pair outside the list can come within the cutoff."""
        return 0.5 * self.skin

    def invalidate(self) -> None:
        """Search for pairs again at the next :meth:`update`, so that a run does not depend on the one before."""
        self._stale = True

    def update(self, positions: Tensor, active: Tensor, margin: float = 0.0, cell: Tensor | None = None) -> None:
        """Search for pairs if those of an earlier step may not last for the next steps; reads the host.

        Args:
            positions: (n_replicas, n_atoms, 3) in Å, finite where active.
            active: Replicas that move, (n_replicas,).
            margin: Distance in Å that an atom is expected to move in these steps.
            cell: Cell of each replica, (n_replicas, 3, 3) in Å; that of the system if None.
        """
        if isinf(self.cutoff):
            return
        if self._max_occupancy is not None:
            self._max_occupancy.zero_()
        if not self._needs_search(positions, active, margin):
            return
        if self._lists_all:
            pairs = all_pairs(len(positions), self.system.n_atoms, positions.device)
        else:
            pairs = pairs_within(positions, self.cutoff + self.skin, self.system, cell)
            self.searches += 1
        self._stale = False
        if self.fixed:
            self._copy_to_buffers(pairs, positions)
        else:
            self._pairs, self._reference_positions = pairs, positions.detach()

    def edges(self, positions: Tensor, active: Tensor, cell: Tensor | None = None) -> Edges:
        """Return the edges within the cutoff; replicas that do not move have none.

        Args:
            positions: (n_replicas, n_atoms, 3) in Å.
            active: Replicas that move, (n_replicas,).
            cell: Cell of each replica, (n_replicas, 3, 3) in Å; that of the system if None.

        Raises:
            RuntimeError: If :meth:`update` has not been called.
        """
        if isinf(self.cutoff):
            return no_edges(positions, cell)
        if self._pairs is None:
            raise RuntimeError("NeighborList has no pairs: call update() before edges().")
        mask = (self._pairs.squared_distances(positions) < self.cutoff**2) & active[self._pairs.replica]
        if not self.fixed:
            return select_edges(self._pairs, mask, positions, self.cutoff)
        assert self._max_occupancy is not None
        torch.maximum(self._max_occupancy, mask.sum(), out=self._max_occupancy)
        return select_edges_padded(self._pairs, mask, positions, self.cutoff, self._capacity)

    def did_overflow(self, positions: Tensor) -> Tensor:
        """Return whether an edge of each replica is missing, or may be, (n_replicas,)."""
        overflow = torch.zeros(len(positions), dtype=torch.bool, device=positions.device)
        if isinf(self.cutoff):
            return overflow
        if not self._lists_all:
            overflow = self._max_displacement(positions) > self.half_skin
        return overflow if self._max_occupancy is None else overflow | (self._max_occupancy > self._capacity)

    def reallocate(self) -> bool:
        """Enlarge the capacity to the most edges counted since the last update; return false if they had room."""
        if self._max_occupancy is None or int(self._max_occupancy) <= self._capacity:
            return False
        self._allocate(int(self._max_occupancy))
        return True

    def _needs_search(self, positions: Tensor, active: Tensor, margin: float) -> bool:
        reference = self._reference_positions
        if self._stale or reference is None or len(positions) != len(reference):
            return True
        if self._lists_all:
            return False
        # A comparison with NaN is false: those replicas do not move.
        return bool((active & (self._max_displacement(positions) > self.half_skin - margin)).any())

    def _max_displacement(self, positions: Tensor) -> Tensor:
        """Return how far the atoms of each replica have moved at most since the last search, (n_replicas,) in Å."""
        assert self._reference_positions is not None
        return (positions - self._reference_positions).square().sum(dim=-1).amax(dim=-1).sqrt()

    def _copy_to_buffers(self, pairs: Pairs, positions: Tensor) -> None:
        """Copy pairs and positions to where a CUDA graph reads them, in larger buffers if they do not fit."""
        n_pairs = len(pairs.first)
        buffer, reference = self._pairs, self._reference_positions
        if buffer is None or reference is None or n_pairs > len(buffer.first) or len(reference) != len(positions):
            self._pairs = buffer = Pairs.padding(_capacity_for(n_pairs), positions, self.cutoff)
            self._reference_positions = reference = positions.detach().clone()
            self.generation += 1
        buffer.copy_(pairs, positions, self.cutoff)
        reference.copy_(positions)
        n_within = int((buffer.squared_distances(positions) < self.cutoff**2).sum())
        if self._max_occupancy is None:
            self._max_occupancy = torch.zeros((), dtype=torch.long, device=positions.device)
        if n_within > self._capacity:
            self._allocate(n_within)

    def _allocate(self, n_pairs: int) -> None:
        self._capacity = _capacity_for(n_pairs)
        self.generation += 1


def _capacity_for(n_pairs: int) -> int:
    return ceil(CAPACITY_MULTIPLIER * n_pairs / CAPACITY_QUANTUM) * CAPACITY_QUANTUM
