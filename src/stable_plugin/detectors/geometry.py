"""Detectors that look at distances."""

from __future__ import annotations

import torch
from torch import Tensor

from stable_plugin.detectors.base import Detector
from stable_plugin.systems import System


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
        if self._system is None or self._lengths is None:
            raise RuntimeError("BondDeviation has no reference yet: call bind(system, reference) first.")
        lengths = self._system.distances(positions, self._system.bonds)
        return (lengths - self._lengths.to(positions)).abs().amax(dim=-1)


class ClosestContact(Detector):
    """How far the closest pair of atoms that are neither bonded nor share a neighbour comes below a distance, in Å.

    Args:
        distance: Contacts shorter than this, in Å, are unstable.
        discard_distance: Contacts shorter than this, in Å, stop the replica.
    """

    unit = "Å"

    def __init__(self, distance: float = 1.2, discard_distance: float | None = 0.3) -> None:
        super().__init__(-distance, None if discard_distance is None else -discard_distance)
        self.distance = distance
        self._system: System | None = None
        self._pairs: Tensor | None = None

    def bind(self, system: System, reference: Tensor) -> None:
        linked = torch.eye(system.n_atoms, dtype=torch.bool)
        for pairs in (system.bonds.cpu(), system.angles.cpu()[:, [0, 2]]):
            linked[pairs[:, 0], pairs[:, 1]] = linked[pairs[:, 1], pairs[:, 0]] = True
        self._system, self._pairs = system, (~linked).triu().nonzero()
        if len(self._pairs) == 0:
            raise ValueError("ClosestContact finds no pair of atoms more than two bonds apart: use another detector.")

    def measure(self, positions: Tensor, velocities: Tensor) -> Tensor:
        """Minus the shortest contact, (n_replicas,), so that larger is worse."""
        if self._system is None or self._pairs is None:
            raise RuntimeError("ClosestContact has no system yet: call bind(system, reference) first.")
        return -self._system.distances(positions, self._pairs).amin(dim=-1)

    def __str__(self) -> str:
        return f"ClosestContact(distance={self.distance:g})"
