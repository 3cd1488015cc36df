"""Detectors that look at distances."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from stable_plugin.detectors.base import Detector
from stable_plugin.md.system import System
from stable_plugin.runtime import checks

MAX_DISTANCES = 2_000_000
"""Distances held in memory at a time."""


class BondDeviation(Detector):
    """Largest deviation of a bond from its mean length in the reference, in Å.

    Source: the criterion of Raja et al., TMLR 2025, arXiv:2402.13984: 0.25 Å in training, 0.5 Å in evaluation.

    Args:
        threshold: In Å.
        discard: In Å.
    """

    unit = "Å"

    def __init__(self, threshold: float = 0.25, discard: float | None = 3.0) -> None:
        super().__init__(threshold, discard)
        self._system: System | None = None
        self._lengths: Tensor | None = None

    def bind(self, system: System, reference: Tensor) -> None:
        if len(system.bonds) == 0:
            raise ValueError("BondDeviation finds no bonds in the system: give System.from_atoms(..., bonds=...).")
        self._system = system
        self._lengths = system.distances(reference.to(system.masses), system.bonds).mean(dim=0)

    def measure(self, positions: Tensor, velocities: Tensor) -> Tensor:
        return self._deviations(positions).amax(dim=-1)

    def offending_atoms(self, positions: Tensor, velocities: Tensor) -> list[tuple[int, ...]]:
        """The two atoms of the bond that is furthest off."""
        worst = torch.nan_to_num(self._deviations(positions), nan=torch.inf).argmax(dim=-1)
        return pairs_of(self._bound_system.bonds, worst)

    @property
    def _bound_system(self) -> System:
        if self._system is None:
            raise RuntimeError("BondDeviation has no reference yet: call bind(system, reference) first.")
        return self._system

    def _deviations(self, positions: Tensor) -> Tensor:
        system = self._bound_system
        assert self._lengths is not None
        return (system.distances(positions, system.bonds) - self._lengths.to(positions)).abs()


class _Contact(Detector):
    """How far the closest of certain pairs of atoms comes below a distance, in Å."""

    unit = "Å"

    def __init__(self, distance: float = 1.2, discard_distance: float | None = 0.3) -> None:
        checks.number("distance", distance, above=0)
        super().__init__(-distance, None if discard_distance is None else -discard_distance)
        self.distance = distance
        self._system: System | None = None
        self._pairs: Tensor | None = None

    def bind(self, system: System, reference: Tensor) -> None:
        self._system, self._pairs = system, self._watched(system).to(system.bonds.device)

    @abstractmethod
    def _watched(self, system: System) -> Tensor:
        """The pairs to look at, (n_pairs, 2)."""

    def measure(self, positions: Tensor, velocities: Tensor) -> Tensor:
        """Minus the shortest contact, (n_replicas,), so that larger is worse."""
        system, pairs = self._bound()
        at_once = max(1, MAX_DISTANCES // len(positions))
        shortest = [system.distances(positions, part).amin(dim=-1) for part in pairs.split(at_once)]
        return -torch.stack(shortest).amin(dim=0)

    def offending_atoms(self, positions: Tensor, velocities: Tensor) -> list[tuple[int, ...]]:
        """The two atoms that are closest."""
        system, pairs = self._bound()
        distances = [system.distances(frame, pairs) for frame in positions]
        return pairs_of(pairs, torch.stack([torch.nan_to_num(each, nan=0.0).argmin() for each in distances]))

    def _bound(self) -> tuple[System, Tensor]:
        if self._system is None or self._pairs is None:
            raise RuntimeError(f"{type(self).__name__} has no system yet: call bind(system, reference) first.")
        return self._system, self._pairs

    def __str__(self) -> str:
        return f"{type(self).__name__}(distance={self.distance:g})"


class ClosestContact(_Contact):
    """How far the closest pair of atoms that are neither bonded nor share a neighbour comes below a distance, in Å.

    Args:
        distance: Contacts shorter than this, in Å, are unstable.
        discard_distance: Contacts shorter than this, in Å, stop the replica.
    """

    def _watched(self, system: System) -> Tensor:
        linked = torch.eye(system.n_atoms, dtype=torch.bool)
        for pairs in (system.bonds.cpu(), system.angles.cpu()[:, [0, 2]]):
            linked[pairs[:, 0], pairs[:, 1]] = linked[pairs[:, 1], pairs[:, 0]] = True
        watched = (~linked).triu().nonzero()
        if len(watched) == 0:
            raise ValueError("ClosestContact finds no pair of atoms more than two bonds apart: use another detector.")
        return watched


class IntermolecularContact(_Contact):
    """How far the closest pair of atoms of different molecules comes below a distance, in Å.

    Source: the criterion of Raja et al., TMLR 2025, arXiv:2402.13984, for liquid water: 1.2 Å.

    Args:
        distance: Contacts shorter than this, in Å, are unstable.
        discard_distance: Contacts shorter than this, in Å, stop the replica.
    """

    def _watched(self, system: System) -> Tensor:
        molecules = system.molecules.cpu()
        watched = (molecules[:, None] != molecules).triu().nonzero()
        if system.is_extended or len(watched) == 0:
            raise ValueError(
                "IntermolecularContact finds no two molecules in the system: use ClosestContact for a single molecule, "
                "and LindemannCriterion or CoordinationNumber for a solid."
            )
        return watched


def pairs_of(pairs: Tensor, chosen: Tensor) -> list[tuple[int, ...]]:
    """The chosen pairs, (n_chosen,) indices into (n_pairs, 2), as tuples."""
    return [tuple(pair) for pair in pairs.cpu()[chosen.cpu()].tolist()]
