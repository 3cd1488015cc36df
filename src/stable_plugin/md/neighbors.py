"""Neighbour graphs of batches of replicas, isolated or periodic."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, isinf

import torch
import vesin
from torch import Tensor

from stable_plugin.md.system import System

CAPACITY_QUANTUM = 256
"""Fixed numbers of pairs are multiples of this, so that few different shapes occur over a run."""

ROOM = 1.1
"""Pairs that there is room for where their number is fixed, relative to those there are."""

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

    def of_range(self, first: int, last: int, n_atoms: int, cutoff: float) -> Edges:
        """The edges of the replicas from ``first`` up to ``last``, counted from ``first``; one of padding if none."""
        replica = self.index[1] // n_atoms
        index = self.index[:, (replica >= first) & (replica < last)] - first * n_atoms
        shifts = self.shifts[(replica >= first) & (replica < last)]
        if index.shape[1] > 0 or isinf(cutoff):
            return Edges(index, shifts)
        return Edges(self.index.new_zeros(2, 1), _beyond(1, self.shifts, cutoff))

    def renumbered(self, slot: Tensor, n_atoms: int) -> Edges:
        """The edges of a batch in which each replica is at its ``slot`` (n_replicas,); without a host synchronisation."""
        return Edges(slot[self.index // n_atoms] * n_atoms + self.index % n_atoms, self.shifts)


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
        vectors = flat.index_select(0, self.second) - flat.index_select(0, self.first)
        return (vectors if self.shifts is None else vectors + self.shifts).square().sum(dim=-1)

    def edges_where(self, mask: Tensor, positions: Tensor, cutoff: float) -> Edges:
        """The pairs for which ``mask`` (n_pairs,) is true; one edge of padding if it is nowhere, as models expect one."""
        chosen = mask.nonzero().squeeze(1)
        if len(chosen) == 0:
            padding = Pairs.unlisted(1, positions, cutoff)
            return both_directions(padding.first, padding.second, padding.shifts, positions)
        shifts = None if self.shifts is None else self.shifts[chosen]
        return both_directions(self.first[chosen], self.second[chosen], shifts, positions)

    def first_edges_where(self, mask: Tensor, positions: Tensor, cutoff: float, n_pairs: int) -> Edges:
        """The first ``n_pairs`` for which ``mask`` is true, padded, without a host synchronisation."""
        # The others are all written to one place more, which is then cut off.
        place = torch.where(mask, mask.cumsum(0) - 1, n_pairs).clamp_max(n_pairs)
        room = Pairs.unlisted(n_pairs + 1, positions, cutoff)
        assert self.shifts is not None and room.shifts is not None
        return both_directions(
            room.first.index_copy(0, place, self.first)[:-1],
            room.second.index_copy(0, place, self.second)[:-1],
            room.shifts.index_copy(0, place, self.shifts)[:-1],
            positions,
        )

    @classmethod
    def unlisted(cls, n_pairs: int, like: Tensor, cutoff: float) -> Pairs:
        """Padding: an atom with itself, shifted beyond the cutoff; device and dtype are those of ``like``."""
        index = torch.zeros(n_pairs, dtype=torch.long, device=like.device)
        return cls(index, index.clone(), index.clone(), _beyond(n_pairs, like, cutoff))

    def write(self, pairs: Pairs, cutoff: float) -> None:
        """Put other pairs, at most as many, in the place of these, and padding after them."""
        assert self.shifts is not None
        n_pairs = len(pairs.first)
        padding = Pairs.unlisted(len(self.first) - n_pairs, self.shifts, cutoff)
        assert padding.shifts is not None
        shifts = self.shifts.new_zeros(n_pairs, 3) if pairs.shifts is None else pairs.shifts
        self.first.copy_(torch.cat([pairs.first, padding.first]))
        self.second.copy_(torch.cat([pairs.second, padding.second]))
        self.replica.copy_(torch.cat([pairs.replica, padding.replica]))
        self.shifts.copy_(torch.cat([shifts, padding.shifts]))


def both_directions(first: Tensor, second: Tensor, shifts: Tensor | None, positions: Tensor) -> Edges:
    """Edges of pairs, each in both directions."""
    index = torch.stack([torch.cat([first, second]), torch.cat([second, first])])
    if shifts is None:
        return Edges(index, positions.new_zeros(1, 3).expand(index.shape[1], 3))
    return Edges(index, torch.cat([shifts, -shifts]))


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
    cell, to_cell = system.cell.double().cpu(), system.to_cell.cpu()
    ends: list[Tensor] = []
    for replica, frame in enumerate(positions.detach().double().cpu()):
        if not bool(torch.isfinite(frame).all()) or frame.abs().max() > FARTHEST_A:
            continue
        # In the cell, where the search is exact whatever the distance that atoms have gone since.
        images = torch.floor(frame @ to_cell)
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


class NeighborList:
    """The neighbour graph of a simulation, exact at every step.

    The edges are chosen at each step from pairs at hand: all pairs of an isolated molecule, and in a periodic system those
    within ``cutoff + skin`` at some earlier step, which serve until an atom has gone half the skin. :meth:`missed` tells,
    without a host synchronisation, where that has happened within a block of steps; the block is then run again.

    Args:
        cutoff: The model's cutoff in Å; ``inf`` for a model that needs no edges.
        skin: Extra reach of the pairs at hand in Å.
        system: What is simulated.
        fixed: Whether edges come in a number that does not depend on the positions, padded, and without a host
            synchronisation: what a captured step needs. Otherwise there are as many as there are.

    Attributes:
        searches: How often the pairs of a periodic system have been looked for.
        generation: Counts how often the tensors behind fixed edges have been replaced by larger ones.
    """

    def __init__(self, cutoff: float, skin: float, system: System, *, fixed: bool = False) -> None:
        self.cutoff = cutoff
        self.skin = skin
        self.system = system
        self.fixed = fixed
        self.searches = 0
        self.generation = 0
        self._pairs: Pairs | None = None
        self._found_at: Tensor | None = None
        self._stale = True
        self._half = 0
        self._needed: Tensor | None = None

    @property
    def half_skin(self) -> float:
        """How far an atom may go in Å before a pair can have come within the cutoff that is not at hand."""
        return 0.5 * self.skin

    def invalidate(self) -> None:
        """Look for pairs anew at the next :meth:`update`, so that a run does not depend on the one before."""
        self._stale = True

    def update(self, positions: Tensor, active: Tensor, reserve: float = 0.0) -> None:
        """Have the pairs at hand that the next steps need; reads the positions on the host.

        Args:
            positions: (n_replicas, n_atoms, 3) in Å, finite.
            active: Replicas that move, (n_replicas,).
            reserve: How far an atom may be expected to go in these steps, in Å.
        """
        if isinf(self.cutoff):
            return
        if self._needed is not None:
            self._needed.zero_()
        if not self._outdated(positions, active, reserve):
            return
        if self.system.periodic:
            pairs = pairs_within(positions, self.cutoff + self.skin, self.system)
            self.searches += 1
        else:
            pairs = all_pairs(len(positions), self.system.n_atoms, positions.device)
        self._stale = False
        if self.fixed:
            self._keep_in_place(pairs, positions)
        else:
            self._pairs, self._found_at = pairs, positions.detach()

    def edges(self, positions: Tensor, active: Tensor) -> Edges:
        """The edges within the cutoff; replicas that do not move have none.

        Args:
            positions: (n_replicas, n_atoms, 3) in Å.
            active: Replicas that move, (n_replicas,).
        """
        if isinf(self.cutoff):
            return _no_edges(positions)
        pairs = self._at_hand
        listed = (pairs.squared_distances(positions) < self.cutoff**2) & active[pairs.replica]
        if not self.fixed:
            return pairs.edges_where(listed, positions, self.cutoff)
        assert self._needed is not None
        torch.maximum(self._needed, listed.sum(), out=self._needed)
        return pairs.first_edges_where(listed, positions, self.cutoff, self._half)

    def did_overflow(self, positions: Tensor) -> Tensor:
        """Replicas of which an edge is, or may be, missing, (n_replicas,)."""
        missed = torch.zeros(len(positions), dtype=torch.bool, device=positions.device)
        if isinf(self.cutoff):
            return missed
        if self.system.periodic:
            missed = self._displacement(positions) > self.half_skin
        return missed if self._needed is None else missed | (self._needed > self._half)

    def reallocate(self) -> bool:
        """Make room for the most edges that fixed ones have fallen short of; false if they have not."""
        if self._needed is None or int(self._needed) <= self._half:
            return False
        self._make_room(int(self._needed))
        return True

    @property
    def _at_hand(self) -> Pairs:
        if self._pairs is None:
            raise RuntimeError("NeighborList has no pairs yet: call update() first.")
        return self._pairs

    def _outdated(self, positions: Tensor, active: Tensor, reserve: float) -> bool:
        if self._stale or self._found_at is None or len(positions) != len(self._found_at):
            return True
        if not self.system.periodic:
            return False
        # A comparison with a number that is not one is false: those replicas rest.
        return bool((active & (self._displacement(positions) > self.half_skin - reserve)).any())

    def _displacement(self, positions: Tensor) -> Tensor:
        """Of the atom of each replica that has gone furthest since the pairs were found, (n_replicas,) in Å."""
        assert self._found_at is not None
        return (positions - self._found_at).square().sum(dim=-1).amax(dim=-1).sqrt()

    def _keep_in_place(self, pairs: Pairs, positions: Tensor) -> None:
        """Write pairs and positions where a captured step reads them, and make room where there is none."""
        n_pairs = len(pairs.first)
        held = self._pairs
        if held is None or self._found_at is None or n_pairs > len(held.first) or len(self._found_at) != len(positions):
            self._pairs = held = Pairs.unlisted(_rounded(ROOM * n_pairs), positions, self.cutoff)
            self._found_at = positions.detach().clone()
            self.generation += 1
        held.write(pairs, self.cutoff)
        self._found_at.copy_(positions)
        within = int((held.squared_distances(positions) < self.cutoff**2).sum())
        if self._needed is None:
            self._needed = torch.zeros((), dtype=torch.long, device=positions.device)
        if within > self._half:
            self._make_room(within)

    def _make_room(self, n_pairs: int) -> None:
        self._half = _rounded(ROOM * n_pairs)
        self.generation += 1


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
    return pairs.edges_where(pairs.squared_distances(at) < cutoff**2, at, cutoff)


def _beyond(n_pairs: int, like: Tensor, cutoff: float) -> Tensor:
    """Shifts that no model sees across, (n_pairs, 3)."""
    shifts = like.new_zeros(n_pairs, 3)
    shifts[:, 0].fill_(2.0 * cutoff)
    return shifts


def _no_edges(positions: Tensor) -> Edges:
    return Edges(index=torch.empty(2, 0, dtype=torch.long, device=positions.device), shifts=positions.new_empty(0, 3))


def _rounded(count: float) -> int:
    return ceil(count / CAPACITY_QUANTUM) * CAPACITY_QUANTUM
