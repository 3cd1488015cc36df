"""Detectors for solids and liquids: where atoms have gone, how many surround them, and how that differs over time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stable_plugin.detectors.base import Detector
from stable_plugin.detectors.geometry import MAX_DISTANCES
from stable_plugin.md.system import System
from stable_plugin.observables.base import Observable
from stable_plugin.runtime import checks


class LindemannCriterion(Detector):
    """Mean square displacement of a replica's atoms from their sites, in Å²; for solids.

    Sites are the mean positions of the reference. The displacement of the centre of mass is left out: in a
    simulation with friction and noise it wanders.

    Args:
        threshold: In Å². Crystals melt at about a hundredth of the squared distance of nearest neighbours.
        discard: In Å².
    """

    unit = "Å²"

    def __init__(self, threshold: float, discard: float | None = None) -> None:
        checks.number("threshold", threshold, above=0)
        super().__init__(threshold, discard)
        self._sites: Tensor | None = None
        self._shares: Tensor | None = None

    def bind(self, system: System, reference: Tensor) -> None:
        # Frames may have been carried to other images: averaged as they lie around the first one.
        self._shares = system.masses / system.masses.sum()
        atoms = torch.arange(system.n_atoms, device=reference.device)
        both = torch.stack([atoms, atoms + system.n_atoms], dim=1)
        together = torch.cat([reference, reference[:1].expand_as(reference)], dim=1)
        self._sites = reference[0] + system.separations(together, both).mean(dim=0)

    def measure(self, positions: Tensor, velocities: Tensor) -> Tensor:
        return self._squares(positions).mean(dim=-1)

    def offending_atoms(self, positions: Tensor, velocities: Tensor) -> list[tuple[int, ...]]:
        """The atom that has gone furthest."""
        return [(int(atom),) for atom in torch.nan_to_num(self._squares(positions), nan=torch.inf).argmax(dim=-1)]

    def _squares(self, positions: Tensor) -> Tensor:
        if self._sites is None or self._shares is None:
            raise RuntimeError("LindemannCriterion has no reference yet: call bind(system, reference) first.")
        moved = positions - self._sites.to(positions)
        together = (self._shares.to(positions)[:, None] * moved).sum(dim=1, keepdim=True)
        return (moved - together).square().sum(dim=-1)


class CoordinationNumber(Detector):
    """How far the mean number of neighbours of an atom is off that of the reference.

    Neighbours are atoms of other molecules, or all others in a system without molecules. Catches a liquid that
    collapses or evaporates, and a solid that loses its structure.

    Args:
        distance: Neighbours are closer than this, in Å; in a periodic system at most half the cell's smallest height.
        threshold: In neighbours per atom.
        discard: In neighbours per atom.
    """

    unit = "neighbours per atom"

    def __init__(self, distance: float, threshold: float = 1.0, discard: float | None = None) -> None:
        super().__init__(checks.number("threshold", threshold, above=0), discard)
        self.distance = checks.number("distance", distance, above=0)
        self._system: System | None = None
        self._pairs: Tensor | None = None
        self._expected: Tensor | None = None

    def bind(self, system: System, reference: Tensor) -> None:
        if self.distance > system.minimum_image_cutoff:
            raise ValueError(
                f"distance={self.distance:g} is more than the cell allows, {system.minimum_image_cutoff:.2f} Å (half its smallest "
                "height): lower it, or use a larger cell."
            )
        pairs = torch.combinations(torch.arange(system.n_atoms), 2)
        molecules = system.molecules.cpu()[pairs]
        apart = molecules[:, 0] != molecules[:, 1]
        watched = pairs[apart] if apart.any() and not system.is_extended else pairs
        self._system, self._pairs = system, watched.to(system.bonds.device)
        self._expected = self._neighbors(reference).mean()

    def measure(self, positions: Tensor, velocities: Tensor) -> Tensor:
        if self._expected is None:
            raise RuntimeError("CoordinationNumber has no reference yet: call bind(system, reference) first.")
        return (self._neighbors(positions) - self._expected.to(positions)).abs()

    def _neighbors(self, positions: Tensor) -> Tensor:
        assert self._system is not None and self._pairs is not None
        at_once = max(1, MAX_DISTANCES // len(positions))
        counts = [
            (self._system.distances(positions, part) < self.distance).sum(dim=-1) for part in self._pairs.split(at_once)
        ]
        near = 2.0 * torch.stack(counts).sum(dim=0).to(positions) / self._system.n_atoms
        # Comparing with a number that is not one gives false, not NaN.
        return torch.where(torch.isfinite(positions).flatten(1).all(dim=1), near, torch.nan)

    def __str__(self) -> str:
        return f"CoordinationNumber(distance={self.distance:g}, threshold={self.threshold:g})"


class ObservableDeviation(Detector):
    """Mean absolute error of an observable against its target, averaged over the last looks at each replica.

    Has a memory: it is emptied when a simulation begins.

    Source: the criterion of Raja et al., TMLR 2025, arXiv:2402.13984, for liquid water: a radial distribution that is
    off by 3.0 over 10 ps.

    Args:
        observable: For instance a :class:`~stable_plugin.RadialDistribution`.
        threshold: In the units of the observable.
        looks: Looks that are averaged over: the time meant, over the simulator's ``check_every_fs``.
        least: Looks before which there is no verdict; a quarter of ``looks`` if not given.
        discard: In the units of the observable.
    """

    capturable = False

    def __init__(
        self,
        observable: Observable,
        threshold: float = 3.0,
        n_samples: int = 100,
        min_samples: int | None = None,
        discard: float | None = None,
    ) -> None:
        super().__init__(checks.number("threshold", threshold, above=0), discard)
        self.observable = observable
        self.n_samples = checks.count("n_samples", n_samples)
        self.min_samples = min(
            n_samples, checks.count("min_samples", max(1, n_samples // 4) if min_samples is None else min_samples)
        )
        self._recent: list[Tensor] = []

    def bind(self, system: System, reference: Tensor) -> None:
        self.observable.bind(system, reference)
        self.reset(0)

    def reset(self, n_replicas: int) -> None:
        self._recent = []

    def state_dict(self) -> Any:
        return list(self._recent)

    def load_state_dict(self, state: Any) -> None:
        self._recent = list(state)

    def measure(self, positions: Tensor, velocities: Tensor) -> Tensor:
        """Looks at the replicas, and gives the error of the mean over this and earlier looks."""
        self._recent = [*self._recent, self.observable.per_frame(positions)][-self.n_samples :]
        error = (torch.stack(self._recent).mean(dim=0) - self.observable.known_target.to(positions)).abs().mean(dim=-1)
        # Before there is enough to go by, only what is not a number counts.
        return error if len(self._recent) >= self.min_samples else 0.0 * error

    def check_reference(self, frames: Tensor, name: str = "reference") -> None:
        """Single frames are no measure of a mean over many: nothing is refused."""

    def __str__(self) -> str:
        return f"ObservableDeviation({self.observable.name}, threshold={self.threshold:g})"
