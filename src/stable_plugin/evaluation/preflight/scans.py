"""Scans of bonds, angles and contacts around reference frames, from their thermal range to beyond it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from stable_plugin.detectors import AngleLimits, BondLimits, ContactLimits
from stable_plugin.evaluation.preflight.fragments import Fragments
from stable_plugin.md.neighbors import edges_within
from stable_plugin.md.system import System

PER_CLASS = 4
"""Most equivalent coordinates that are scanned in one frame; the next frame goes on with the next ones."""

N_THERMAL = 5
N_BEYOND = 10
"""Points of a scan within the thermal limits, and beyond each of them."""

FIRST_BEYOND = 1.1
"""Deviation of the first point beyond a limit, over that of the limit."""

SHORTEST_BOND = 0.6
"""Length of the most compressed bond, over its mean."""

STRETCH_A = 1.0
"""Stretch of the longest bond in Å."""

SMALLEST_ANGLE = 25.0
CONTACT_RADIUS_A = 4.0
"""Contacts that are further apart in a frame are not scanned."""

SHORTEST_CONTACT = 0.5
"""Distance of the closest contact, over its limit."""


@dataclass(frozen=True)
class Scan:
    """One coordinate of one frame, moved from one end of its range to the other.

    Attributes:
        kind: ``bond``, ``angle`` or ``contact``.
        unit: Unit of the coordinate.
        atoms: Indices of the atoms that define it.
        values: Values of the coordinate in ascending order, (n_points,).
        limits: Lower and upper end of the thermal range.
        positions: (n_points, n_atoms, 3) in Å.
    """

    kind: str
    unit: str
    atoms: tuple[int, ...]
    values: Tensor
    limits: tuple[float, float]
    positions: Tensor

    @property
    def thermal(self) -> Tensor:
        """Which points are within the thermal range, (n_points,)."""
        return (self.values >= self.limits[0]) & (self.values <= self.limits[1])


class Scanner:
    """Scans of a system whose thermal limits come from reference frames.

    Args:
        system: The system.
        reference: Reference frames, (n_frames, n_atoms, 3) in Å.
        temperature_K: Temperature in K.
        cell: Cells of the reference frames, (n_frames, 3, 3) in Å; that of the system if None.
    """

    def __init__(self, system: System, reference: Tensor, temperature_K: float, cell: Tensor | None = None) -> None:
        self._system = system
        self._fragments = Fragments(system)
        detectors = (BondLimits(temperature_K), AngleLimits(temperature_K), ContactLimits(temperature_K))
        self._detectors = [each for each in detectors if each.applies(system)]
        for detector in self._detectors:
            detector.bind(system, reference, cell)

    def scans(self, frame: Tensor, turn: int, cell: Tensor | None = None) -> Iterator[Scan]:
        """Yield the scans around a frame.

        Args:
            frame: (n_atoms, 3) in Å.
            turn: Number of the frame, which picks the coordinates where there are too many equivalent ones.
            cell: Cell of the frame, (3, 3) in Å; that of the system if None.
        """
        for detector in self._detectors:
            if isinstance(detector, BondLimits):
                yield from self._bonds(detector, frame, turn, cell)
            elif isinstance(detector, AngleLimits):
                yield from self._angles(detector, frame, turn, cell)
            elif isinstance(detector, ContactLimits):
                yield from self._contacts(detector, frame, cell)

    def _bonds(self, detector: BondLimits, frame: Tensor, turn: int, cell: Tensor | None) -> Iterator[Scan]:
        limits = detector.limits
        vectors = self._system.separations(frame, detector.atoms.flip(1), cell)
        for index in _chosen(detector.classes, turn):
            first, second = detector.atoms[index].tolist()
            length = vectors[index].norm()
            center, lower, upper = (float(each[index]) for each in (limits.center, limits.lower, limits.upper))
            values = _range(center, lower, upper, SHORTEST_BOND * center, center + STRETCH_A)
            moved = self._fragments.of_bond(first, second)[:, None] * (vectors[index] / length)
            positions = frame + (values - length)[:, None, None] * moved
            yield Scan("bond", "Å", (first, second), values, (lower, upper), positions)

    def _angles(self, detector: AngleLimits, frame: Tensor, turn: int, cell: Tensor | None) -> Iterator[Scan]:
        limits = detector.limits
        present = detector.values(self._system, frame, detector.atoms, cell)
        for index in _chosen(detector.classes, turn):
            first, middle, second = detector.atoms[index].tolist()
            center, lower, upper = (float(each[index]) for each in (limits.center, limits.lower, limits.upper))
            values = _range(center, lower, min(upper, 180.0), SMALLEST_ANGLE, 180.0)
            mask, end = self._fragments.of_angle(first, middle, second)
            opened = torch.deg2rad(values - present[index])
            positions = self._rotated(frame, mask.bool(), (first + second - end, middle, end), opened, cell)
            yield Scan("angle", "degrees", (first, middle, second), values, (lower, upper), positions)

    def _rotated(
        self, frame: Tensor, mask: Tensor, atoms: tuple[int, int, int], opened: Tensor, cell: Tensor | None
    ) -> Tensor:
        """Return frames whose ``atoms`` (end, center, moving end) have an angle opened by so many radians."""
        fixed, center, end = atoms
        moving = mask.nonzero().squeeze(1)
        arms = self._system.separations(frame, torch.tensor([[fixed, center], [end, center]]), cell)
        axis = torch.nn.functional.normalize(torch.linalg.cross(arms[0], arms[1]), dim=0)
        around = self._system.separations(frame, torch.stack([moving, torch.full_like(moving, center)], dim=1), cell)
        along = (around @ axis)[:, None] * axis
        across = torch.linalg.cross(axis.expand_as(around), around)
        cosine, sine = opened.cos()[:, None, None], opened.sin()[:, None, None]
        positions = frame.repeat(len(opened), 1, 1)
        positions[:, moving] += (cosine - 1.0) * (around - along) + sine * across
        return positions

    def _contacts(self, detector: ContactLimits, frame: Tensor, cell: Tensor | None) -> Iterator[Scan]:
        pairs = self._near_pairs(frame, cell)
        vectors = self._system.separations(frame, pairs.flip(1), cell)
        lengths = vectors.norm(dim=1)
        limits, kinds = detector.limits(pairs).double(), detector.kinds(pairs)
        order = torch.argsort(lengths / limits)
        order = order[(limits[order] < lengths[order]) & (limits[order] > 0)]
        for kind in kinds[order].unique().tolist():
            for index in order[kinds[order] == kind][:PER_CLASS].tolist():
                first, second = pairs[index].tolist()
                limit, length = float(limits[index]), float(lengths[index])
                near = torch.linspace(SHORTEST_CONTACT * limit, limit / FIRST_BEYOND, N_BEYOND, dtype=torch.float64)
                values = torch.cat([near, torch.linspace(limit, length, N_THERMAL, dtype=torch.float64)])
                moved = self._fragments.of_contact(first, second)[:, None] * (vectors[index] / length)
                positions = frame + (values - length)[:, None, None] * moved
                yield Scan("contact", "Å", (first, second), values, (limit, torch.inf), positions)

    def _near_pairs(self, frame: Tensor, cell: Tensor | None) -> Tensor:
        """Return the pairs of atoms more than two bonds apart that are near, (n_pairs, 2)."""
        system = self._system
        edges = edges_within(frame[None], CONTACT_RADIUS_A, system, None if cell is None else cell[None])
        pairs = edges.index.T[edges.index[0] < edges.index[1]].unique(dim=0)
        near = torch.cat([system.bonds, system.angles[:, [0, 2]]]).sort(dim=1).values
        keys = pairs[:, 0] * system.n_atoms + pairs[:, 1]
        far: Tensor = pairs[~torch.isin(keys, near[:, 0] * system.n_atoms + near[:, 1])]
        return far


def _chosen(classes: Tensor, turn: int) -> list[int]:
    """Return some coordinates of each class of equivalent ones, others in each turn."""
    chosen: list[int] = []
    for label in classes.unique().tolist():
        members = (classes == label).nonzero().squeeze(1).tolist()
        n_members = min(PER_CLASS, len(members))
        chosen += [members[(turn * n_members + step) % len(members)] for step in range(n_members)]
    return chosen


def _range(center: float, lower: float, upper: float, first: float, last: float) -> Tensor:
    """Return values from ``first`` to ``last``, some of them between the limits."""
    below = center - FIRST_BEYOND * (center - lower)
    above = center + FIRST_BEYOND * (upper - center)
    parts = [torch.linspace(max(lower, first), min(upper, last), N_THERMAL + 2, dtype=torch.float64)[1:-1]]
    if below > first:
        parts.insert(0, torch.linspace(first, below, N_BEYOND, dtype=torch.float64))
    if above < last:
        parts.append(torch.linspace(above, last, N_BEYOND, dtype=torch.float64))
    return torch.cat(parts)
