"""Wasserstein distances of simulated distributions from those of the reference, judged by the reference's own spread."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from stable_plugin.evaluation.simulation import ReplicaTrajectories, SimulationSettings
from stable_plugin.evaluation.wasserstein import circular_wasserstein, curve_wasserstein, wasserstein
from stable_plugin.md.cells import optional
from stable_plugin.md.internal_coordinates import angles, equivalent_coordinates, torsion_chains, torsions
from stable_plugin.md.system import System
from stable_plugin.observables import (
    DistanceDistribution,
    Observable,
    PowerSpectrum,
    RadialDistribution,
    TimeCorrelation,
)

N_BLOCKS = 8
"""Number of blocks that the reference is cut into."""

MAX_BLOCKS = 32

MIN_BLOCK_FRAMES = 5
"""Fewest frames of a block; the distance of a shorter simulation is not judged."""

CONFIDENCE = 0.95
"""Probability that a part of the reference is within the level."""

MAX_FRAMES = 2000
"""Most frames of simulation and reference each that internal coordinates are compared in, evenly spaced."""

MAX_CURVE_FRAMES = 400
"""The same for curves, such as radial distributions, which take longer to compute."""

MAX_VALUES = 20_000_000
"""Most values of internal coordinates held in memory."""

MAX_LINEAR_DEGREES = 170.0
"""A torsion is not defined if an angle of its atoms is larger."""

Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Function of the values of two sets of frames, (n_frames, n_values), that returns a distance for each class, (n_classes,)."""


@dataclass(frozen=True)
class DistributionResult:
    """Distance of one distribution from the reference.

    Attributes:
        value: Wasserstein-1 distance of simulation and reference; None if there are no frames.
        unit: Unit of the distance.
        reference_level: Largest distance of a part of the reference from the others that is expected, at 95 %; None if
            reference or simulation are too short.
        exceeded: Whether the distance is larger; None if it is not known.
        where: Atoms of a coordinate that differs most.
    """

    value: float | None
    unit: str
    reference_level: float | None
    exceeded: bool | None
    where: str = ""


@dataclass(frozen=True)
class Frames:
    """Frames with their cells, (n_frames, n_atoms, 3) and (n_frames, 3, 3) in Å; no cells if all are that of the system."""

    positions: Tensor
    cell: Tensor | None

    def thinned(self, most: int) -> Frames:
        """Return at most this number of the frames, evenly spaced."""
        if len(self.positions) <= most:
            return self
        chosen = torch.linspace(0, len(self.positions) - 1, most).round().long()
        return Frames(self.positions[chosen], None if self.cell is None else self.cell[chosen])


class DistributionTest:
    r"""Comparison of the distributions of a simulation with those of the reference.

    For bonds, angles and torsions, equivalent coordinates are pooled into K classes, and the result is that of the class whose
    distance is largest in relation to its level. Radial distributions and spectra are compared as distributions over their
    axis (K = 1).

    A distance is judged by the reference alone. It is cut into blocks of equal length, eight of them or more if the
    simulation is shorter than a block. The distances :math:`d_i` of each block from all others together, B in number,
    give the level

    .. math:: \bar d + t_{1 - 0.05/K, B-1} \, s_d \sqrt{1 + 1/B},

    with the standard deviation s of the distances, or that of all classes in relation to their means if it is larger. Another block
    exceeds it in any of the classes with a probability of at most 5 % (Bonferroni), if distances are normal. Frames of
    the simulation count as much as those of the reference, so replicas must start from frames that represent it.

    Args:
        system: The system.
        reference: Reference frames in the order of time, (n_frames, n_atoms, 3) in Å.
        cell: Cells of these frames, (n_frames, 3, 3) in Å; that of the system if None.
        trajectory: Positions and velocities of the reference as one trajectory, for spectra; None if it is not one.
        equilibration_fraction: Fraction of the simulated time that is left out at its beginning.
    """

    def __init__(
        self,
        system: System,
        reference: Tensor,
        cell: Tensor | None = None,
        trajectory: tuple[Tensor, Tensor | None] | None = None,
        equilibration_fraction: float = SimulationSettings.equilibration_fraction,
    ) -> None:
        self.system = system
        self.reference = Frames(reference, cell)
        self.trajectory = trajectory
        self.equilibration_fraction = equilibration_fraction
        self._reference_curves: dict[str, np.ndarray] = {}

    def compare(
        self,
        trajectories: ReplicaTrajectories,
        horizon_ps: float,
        observables: Sequence[Observable],
        correlations: Sequence[TimeCorrelation] = (),
    ) -> dict[str, dict[str, Any]]:
        """Return the results by name, as plain data.

        Args:
            trajectories: Simulated replicas; frames after a failure are left out.
            horizon_ps: Time in ps up to which frames are compared.
            observables: Observables, bound to the system, of which radial and distance distributions are compared.
            correlations: Observables of trajectories, bound to the system, of which spectra are compared.
        """
        chosen = trajectories.valid & (trajectories.times_ps <= horizon_ps * (1 + 1e-9))[:, None]
        start_ps = self.equilibration_fraction * horizon_ps
        n_early = int((trajectories.times_ps <= start_ps * (1 + 1e-9)).sum())
        chosen[:n_early] = False
        simulated = _frames_of(trajectories, chosen)
        results = self.coordinates(simulated)
        for observable in observables:
            if isinstance(observable, RadialDistribution | DistanceDistribution):
                results[observable.name] = self._curve(observable, simulated)
        for correlation in correlations:
            if isinstance(correlation, PowerSpectrum):
                results[correlation.name] = self._spectrum(correlation, trajectories, chosen, n_early)
        return {name: asdict(result) for name, result in results.items()}

    def coordinates(self, simulated: Frames) -> dict[str, DistributionResult]:
        """Return the results of bonds, angles and torsions, as far as the system has them.

        Args:
            simulated: Frames to compare.
        """
        system = self.system
        kinds: dict[str, tuple[Tensor, str, Callable[[Tensor, Tensor | None], Tensor]]] = {
            "bonds": (system.bonds, "Å", lambda frames, cell: system.distances(frames, system.bonds, cell)),
            "angles": (system.angles, "degrees", lambda frames, cell: angles(system, frames, system.angles, cell)),
        }
        chains = self._defined_chains()
        kinds["dihedrals"] = (chains, "degrees", lambda frames, cell: torsions(system, frames, chains, cell))
        return {
            name: self._internal(atoms, unit, measure, simulated, circular=name == "dihedrals")
            for name, (atoms, unit, measure) in kinds.items()
            if len(atoms) > 0
        }

    def _defined_chains(self) -> Tensor:
        """Return the atoms of the torsions whose angles are never near 180 degrees, (n_chains, 4)."""
        chains = torsion_chains(self.system)
        if len(chains) == 0:
            return chains
        few = self.reference.thinned(10)
        ends = [angles(self.system, few.positions, chains[:, part], few.cell) for part in ([0, 1, 2], [1, 2, 3])]
        return chains[torch.stack(ends).amax(dim=(0, 1)) < MAX_LINEAR_DEGREES]

    def _internal(
        self,
        atoms: Tensor,
        unit: str,
        measure: Callable[[Tensor, Tensor | None], Tensor],
        simulated: Frames,
        circular: bool,
    ) -> DistributionResult:
        most = max(1, min(MAX_FRAMES, MAX_VALUES // len(atoms)))
        reference, simulated = self.reference.thinned(most), simulated.thinned(most)
        of_reference = measure(reference.positions, reference.cell).double().numpy()
        of_simulation = measure(simulated.positions, simulated.cell).double().numpy()
        classes = equivalent_coordinates(self.system, atoms).numpy()
        members = [np.flatnonzero(classes == each) for each in range(classes.max() + 1)]
        distance = circular_wasserstein if circular else wasserstein

        def of_classes(one: np.ndarray, other: np.ndarray) -> np.ndarray:
            return np.array([distance(one[:, each].ravel(), other[:, each].ravel()) for each in members])

        labels = [self.system.label(atoms[each[0]].tolist()) for each in members]
        return _judged(of_reference, of_simulation, of_classes, unit, labels)

    def _curve(self, observable: Observable, simulated: Frames) -> DistributionResult:
        def values(frames: Frames) -> np.ndarray:
            few = frames.thinned(MAX_CURVE_FRAMES)
            if len(few.positions) == 0:
                return np.zeros((0, 1))
            found: np.ndarray = observable.per_frame(few.positions, *optional(few.cell)).double().cpu().numpy()
            return found

        x = np.array(observable.axis()["x"])

        def distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
            return np.array([curve_wasserstein(x, one.mean(axis=0), other.mean(axis=0))])

        if observable.name not in self._reference_curves:
            self._reference_curves[observable.name] = values(self.reference)
        return _judged(self._reference_curves[observable.name], values(simulated), distance, "Å")

    def _spectrum(
        self, correlation: PowerSpectrum, trajectories: ReplicaTrajectories, chosen: Tensor, n_early: int
    ) -> DistributionResult:
        unit, x = "1/cm", correlation.wavenumbers.numpy()
        found = _spectrum_of(
            correlation, trajectories.positions[n_early:], trajectories.velocities[n_early:], chosen[n_early:]
        )
        if found is None:
            return DistributionResult(None, unit, None, None)
        whole = correlation.known_target.cpu().numpy()
        value = np.array([curve_wasserstein(x, found, whole)])
        distances = []
        positions, velocities = (None, None) if self.trajectory is None else self.trajectory
        if positions is not None and velocities is not None:
            n_frames = len(positions) // N_BLOCKS
            for block in range(N_BLOCKS):
                part = slice(block * n_frames, (block + 1) * n_frames)
                own = _spectrum_of(correlation, positions[part], velocities[part])
                if own is not None:
                    others = (N_BLOCKS * whole - own) / (N_BLOCKS - 1)
                    distances.append(np.array([curve_wasserstein(x, own, others)]))
        return _result(value, distances, unit)


def _frames_of(trajectories: ReplicaTrajectories, chosen: Tensor) -> Frames:
    """Return the chosen frames of all replicas, (n_frames, n_replicas), or evenly spaced ones if there are many."""
    frame, replica = chosen.nonzero().unbind(dim=1)
    if len(frame) > MAX_FRAMES:
        kept = torch.linspace(0, len(frame) - 1, MAX_FRAMES).round().long()
        frame, replica = frame[kept], replica[kept]
    return Frames(trajectories.positions[frame, replica], trajectories.cells(frame, replica))


def _spectrum_of(
    correlation: PowerSpectrum, positions: Tensor, velocities: Tensor, valid: Tensor | None = None
) -> np.ndarray | None:
    """Return the spectrum of a trajectory, (n_lags,); None if it is shorter than the longest lag."""
    if len(positions) == 0:
        return None
    own = copy.deepcopy(correlation)
    own.reset()
    own.update(positions, velocities, valid)
    return own.compute().cpu().numpy() if own.complete else None


def _judged(
    reference: np.ndarray, simulated: np.ndarray, distance: Distance, unit: str, labels: Sequence[str] = ("",)
) -> DistributionResult:
    """Return the result for values of the frames, (n_frames, n_values), of reference and simulation."""
    if len(simulated) == 0 or len(reference) == 0:
        return DistributionResult(None, unit, None, None)
    blocks = _block_distances(reference, len(simulated), distance)
    return _result(distance(simulated, reference), blocks, unit, labels)


def _block_distances(reference: np.ndarray, n_simulated: int, distance: Distance) -> list[np.ndarray]:
    """Return the distances of each block of the reference from the other blocks together, (n_classes,) each."""
    n_frames = min(len(reference) // N_BLOCKS, n_simulated)
    if n_frames < MIN_BLOCK_FRAMES:
        return []
    n_blocks = min(MAX_BLOCKS, len(reference) // n_frames)
    starts = np.linspace(0, len(reference) - n_frames, n_blocks).round().astype(int)
    distances = []
    for start in starts:
        inside = np.zeros(len(reference), dtype=bool)
        inside[start : start + n_frames] = True
        distances.append(distance(reference[inside], reference[~inside]))
    return distances


def _result(
    values: np.ndarray, distances: Sequence[np.ndarray], unit: str, labels: Sequence[str] = ("",)
) -> DistributionResult:
    """Return the result of the class whose distance is largest in relation to its level, or largest without levels."""
    if len(distances) < 2:
        worst = int(np.argmax(values))
        return DistributionResult(float(values[worst]), unit, None, None, labels[worst])
    levels = _levels(np.stack(distances))
    worst = int(np.argmax(values / levels.clip(min=np.finfo(float).tiny)))
    value, level = float(values[worst]), float(levels[worst])
    return DistributionResult(value, unit, level, value > level, labels[worst])


def _levels(distances: np.ndarray) -> np.ndarray:
    """Return the prediction limits of another block, (n_classes,), from distances of the blocks, (n_blocks, n_classes)."""
    n_blocks, n_classes = distances.shape
    quantile = float(stats.t.isf((1.0 - CONFIDENCE) / n_classes, n_blocks - 1))
    means, spreads = distances.mean(axis=0), distances.std(axis=0, ddof=1)
    # Of few blocks, some class has a small spread by chance.
    spreads = np.maximum(spreads, means * sqrt(np.mean((spreads / means.clip(min=np.finfo(float).tiny)) ** 2)))
    limits: np.ndarray = means + quantile * spreads * sqrt(1.0 + 1.0 / n_blocks)
    return limits
