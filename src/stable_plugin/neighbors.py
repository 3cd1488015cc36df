"""Neighbour graphs of batches of replicas, isolated or periodic."""

from __future__ import annotations

from dataclasses import dataclass
from math import isinf

import torch
import vesin
from torch import Tensor

from stable_plugin.systems import System

# Edge counts are rounded up to a multiple of this, so that few different shapes occur over a run.
CAPACITY_QUANTUM = 256

MARGIN_A = 1.0
"""Reach of the pairs kept for a periodic system beyond cutoff and skin, in Å: the further, the more seldom it is found."""

FARTHEST_A = 1e6
"""A replica that reaches further has been torn apart; it is listed without edges, and left to the detector."""


@dataclass(frozen=True)
class Edges:
    """Directed edges of a batch of replicas, both directions listed.

    Attributes:
        index: Sender and receiver, (2, n_edges), counted through the batch as replica * n_atoms + atom.
        shifts: Added to receiver minus sender, (n_edges, 3) in Å: multiples of the cell vectors where the edge crosses
            the boundary. Padding edges join an atom to itself with a shift beyond the cutoff: they contribute exactly
            nothing.
    """

    index: Tensor
    shifts: Tensor


@dataclass(frozen=True)
class Pairs:
    """Pairs of atoms that can come within the cutoff, each listed once.

    Attributes:
        first: Counted through the batch, (n_pairs,).
        second: Likewise.
        replica: Which replica the pair is in, (n_pairs,).
        shifts: Added to second minus first, (n_pairs, 3) in Å; None where nothing is periodic.
    """

    first: Tensor
    second: Tensor
    replica: Tensor
    shifts: Tensor | None

    def squared_distances(self, positions: Tensor) -> Tensor:
        """(n_pairs,) in Å², for positions (n_replicas, n_atoms, 3)."""
        flat = positions.reshape(-1, 3)
        vectors = flat[self.second] - flat[self.first]
        return (vectors if self.shifts is None else vectors + self.shifts).square().sum(dim=-1)

    def where(self, mask: Tensor) -> Pairs:
        """The pairs for which ``mask`` (n_pairs,) is true."""
        shifts = None if self.shifts is None else self.shifts[mask]
        return Pairs(self.first[mask], self.second[mask], self.replica[mask], shifts)


def all_pairs(n_replicas: int, n_atoms: int, device: torch.device) -> Pairs:
    """Every pair within every replica of an isolated molecule."""
    first, second = torch.triu_indices(n_atoms, n_atoms, offset=1, device=device)
    replica = torch.arange(n_replicas, device=device).repeat_interleave(len(first))
    offset = replica * n_atoms
    return Pairs(first.repeat(n_replicas) + offset, second.repeat(n_replicas) + offset, replica, None)


def pairs_within(positions: Tensor, reach: float, system: System) -> Pairs:
    """Every pair of a periodic system closer than ``reach``, images included, for any cell; linear in the atoms.

    Args:
        positions: (n_replicas, n_atoms, 3) in Å, in the cell or not.
        reach: In Å.
        system: With the cell and the directions that repeat.
    """
    search = vesin.NeighborList(cutoff=reach, full_list=False)
    cell = system.cell.double().cpu()
    ends: list[Tensor] = []
    for replica, frame in enumerate(positions.detach().double().cpu()):
        if not bool(torch.isfinite(frame).all()) or frame.abs().max() > FARTHEST_A:
            continue
        # In the cell, where the search is exact whatever the distance that atoms have gone since.
        images = torch.floor(frame @ torch.linalg.inv(cell)) * torch.tensor(system.pbc)
        found = search.compute((frame - images @ cell).numpy(), cell.numpy(), list(system.pbc), quantities="ijS")
        first, second, crossed = (torch.from_numpy(part.astype("int64")) for part in found)
        shift = (crossed - images[second].long() + images[first].long()).double()
        ends.append(
            torch.cat([first[:, None], second[:, None], torch.full_like(first, replica)[:, None], shift], dim=1)
        )
    table = torch.cat(ends) if ends else torch.empty(0, 6, dtype=torch.float64)
    first, second, replica_index = table[:, :3].long().to(positions.device).unbind(dim=1)
    offset = replica_index * system.n_atoms
    shifts = (table[:, 3:] @ cell).to(positions)
    return Pairs(first + offset, second + offset, replica_index, shifts)


class SkinList:
    """A neighbour list that stays exact while no omitted pair comes within the cutoff.

    Built once per block of steps with pairs up to ``cutoff + skin``. :meth:`missed` tells, without a host
    synchronisation, in which replicas a pair has come in from outside since; the block is then run again. In a periodic
    system the pairs to choose from are themselves found anew when atoms have moved by half the margin.

    Args:
        cutoff: The model's cutoff in Å; ``inf`` for a model that needs no edges.
        skin: Extra distance in Å.
        system: What is simulated.

    Attributes:
        searches: How often the pairs of a periodic system have been looked for.
    """

    def __init__(self, cutoff: float, skin: float, system: System) -> None:
        self.cutoff = cutoff
        self.first_skin = self.skin = skin
        self.system = system
        self.searches = 0
        self._n_replicas = 0
        self._pairs: Pairs | None = None
        self._found_at: Tensor | None = None
        self._omitted: Pairs | None = None

    def build(self, positions: Tensor, active: Tensor, wild: Tensor | None = None) -> Edges:
        """List the pairs within ``cutoff + skin``.

        Args:
            positions: (n_replicas, n_atoms, 3) in Å, finite.
            active: Replicas that move, (n_replicas,); the others get no edges.
            wild: Replicas of which all pairs at hand are listed whatever their distance, (n_replicas,); none if not
                given.
        """
        if isinf(self.cutoff):
            return _no_edges(positions)
        pairs = self._candidates(positions, active)
        listed = pairs.squared_distances(positions) < (self.cutoff + self.skin) ** 2
        if wild is not None:
            listed = listed | wild[pairs.replica]
        moving = active[pairs.replica]
        self._omitted, self._active = pairs.where(~listed & moving), active
        return _edges(pairs.where(listed & moving), positions, self.cutoff)

    def widen(self) -> None:
        """Reach further from now on: atoms are faster than expected."""
        self.skin = min(1.25 * self.skin + 0.01, self.first_skin + MARGIN_A)

    def forget(self) -> None:
        """Begin anew, so that a run does not depend on the one before."""
        self.skin, self._pairs, self._omitted = self.first_skin, None, None

    def build_at(self, positions: Tensor, active: Tensor) -> Edges:
        """The edges of just these positions, however far the atoms have come; reads the positions on the host."""
        self._pairs = None
        return self.build(positions, active)

    def missed(self, positions: Tensor) -> Tensor:
        """Replicas in which an omitted pair is, or may be, within the cutoff, (n_replicas,)."""
        missed = torch.zeros(len(positions), dtype=torch.bool, device=positions.device)
        if self._omitted is None:
            return missed
        within = self._omitted.squared_distances(positions) < self.cutoff**2
        missed = torch.zeros_like(missed, dtype=torch.int32).index_add_(0, self._omitted.replica, within.int()) > 0
        if self._found_at is not None:
            missed = missed | (self._active & (self._displacement(positions) > self._allowance))
        return missed

    @property
    def _allowance(self) -> float:
        """How far an atom may go before a pair can have come within the cutoff that was never found."""
        return 0.5 * (self.first_skin + MARGIN_A)

    def _displacement(self, positions: Tensor) -> Tensor:
        """Of the atom of each replica that has gone furthest since the pairs were found, (n_replicas,) in Å."""
        assert self._found_at is not None
        return (positions - self._found_at).square().sum(dim=-1).amax(dim=-1).sqrt()

    def _candidates(self, positions: Tensor, active: Tensor) -> Pairs:
        stale = self._pairs is None or len(positions) != self._n_replicas
        if not stale and self._found_at is not None:
            # What a block may still need of the allowance is left to it.
            stale = bool((active & (self._displacement(positions) > self._allowance - 0.5 * self.skin)).any())
        if stale or self._pairs is None:
            self._n_replicas = len(positions)
            if self.system.periodic:
                self._pairs = pairs_within(positions, self.cutoff + self.first_skin + MARGIN_A, self.system)
                self._found_at = positions.detach()
                self.searches += 1
            else:
                self._pairs = all_pairs(len(positions), self.system.n_atoms, positions.device)
        return self._pairs


def edges_within(positions: Tensor, cutoff: float, system: System) -> Edges:
    """All edges shorter than the cutoff.

    Args:
        positions: (n_replicas, n_atoms, 3) in Å.
        cutoff: In Å.
        system: What the positions are of.
    """
    if isinf(cutoff):
        return _no_edges(positions)
    at = positions.detach()
    pairs = (
        pairs_within(at, cutoff, system) if system.periodic else all_pairs(len(at), system.n_atoms, positions.device)
    )
    return _edges(pairs.where(pairs.squared_distances(at) < cutoff**2), at, cutoff)


def _no_edges(positions: Tensor) -> Edges:
    return Edges(index=torch.empty(2, 0, dtype=torch.long, device=positions.device), shifts=positions.new_empty(0, 3))


def _edges(pairs: Pairs, positions: Tensor, cutoff: float) -> Edges:
    """Both directions of the pairs, padded."""
    n_pairs = len(pairs.first)
    capacity = -(-max(2 * n_pairs, 1) // CAPACITY_QUANTUM) * CAPACITY_QUANTUM
    index = pairs.first.new_zeros(2, capacity)
    index[0, :n_pairs], index[1, :n_pairs] = pairs.first, pairs.second
    index[0, n_pairs : 2 * n_pairs], index[1, n_pairs : 2 * n_pairs] = pairs.second, pairs.first
    shifts = positions.new_zeros(capacity, 3)
    if pairs.shifts is not None:
        shifts[:n_pairs], shifts[n_pairs : 2 * n_pairs] = pairs.shifts, -pairs.shifts
    shifts[2 * n_pairs :, 0] = 2.0 * cutoff
    return Edges(index=index, shifts=shifts)
