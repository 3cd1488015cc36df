"""Detectors of internal coordinates that leave the range of their thermal fluctuations."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from math import degrees, inf, sqrt

import torch
from ase.units import kB
from torch import Tensor

from stable_plugin.detectors.limits import FALSE_ALARMS, Limits, ReferenceLimitDetector, thermal_limits
from stable_plugin.md.internal_coordinates import (
    angles,
    branched_centers,
    equivalent_coordinates,
    heights,
    ring_chains,
    torsions,
)
from stable_plugin.md.system import System
from stable_plugin.runtime import checks


class CoordinateLimits(ReferenceLimitDetector):
    r"""Base class: largest deviation of an internal coordinate from its mean, relative to the largest that is thermal.

    .. math:: v = \max_q \frac{|q - \langle q \rangle_\mathrm{ref}|}{\Delta_q}, \qquad \text{threshold} = 1

    The limits :math:`\Delta_q`, one above and one below the mean, come from the fluctuations of the reference, see
    :func:`~stable_plugin.detectors.limits.thermal_limits`.

    Args:
        temperature_K: Temperature of the simulation in K, which sets the fluctuations that a short reference does not show.
        false_alarms: Fraction of frames at equilibrium that are flagged.
        reference_temperature_K: Temperature of the reference in K; that of the simulation if None.
    """

    name = ""
    coordinate_unit = ""
    stiffness = 1.0
    """Force constant of a soft coordinate, in eV per square of Å or radian."""

    unit_per_radian = 1.0
    """Unit of the coordinate over Å or radian."""

    _system: System | None = None
    _atoms: Tensor | None = None
    _limits: Limits | None = None
    _classes: Tensor | None = None

    @abstractmethod
    def coordinates(self, system: System) -> Tensor:
        """Return the atoms of each coordinate of a system, (n_coordinates, n_members)."""

    @abstractmethod
    def values(self, system: System, positions: Tensor, atoms: Tensor, cell: Tensor | None) -> Tensor:
        """Return the coordinates of frames, (n_frames, n_coordinates)."""

    def applies(self, system: System) -> bool:
        """Return whether the system has such coordinates."""
        return len(self.coordinates(system)) > 0

    @property
    def amplitude(self) -> float:
        """Expected standard deviation of a soft coordinate, by equipartition."""
        return self.unit_per_radian * sqrt(kB * self.temperature_K / self.stiffness)

    def bind(self, system: System, reference: Tensor, cell: Tensor | None = None) -> None:
        atoms = self.coordinates(system)
        if len(atoms) == 0:
            raise ValueError(f"{self!r} finds no {self.name} in the system: use another detector.")
        self._system, self._atoms = system, atoms
        raw = self.values(system, reference, atoms, cell)
        self.fit(raw)
        self._classes = equivalent_coordinates(system, atoms)
        self._limits = self.make_limits(self.reduced(raw), self._classes).to(system.masses)

    def measure(self, positions: Tensor, velocities: Tensor, cell: Tensor | None = None) -> Tensor:
        return self._relative(positions, cell)[1].amax(dim=-1)

    def by_coordinate(self, positions: Tensor, cell: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._relative(positions, cell)[1], self.atoms

    def offending_atoms(
        self, positions: Tensor, velocities: Tensor, cell: Tensor | None = None
    ) -> list[tuple[int, ...]]:
        """Return the atoms of the coordinate that is furthest outside its limits."""
        worst = torch.nan_to_num(self._relative(positions, cell)[1], nan=torch.inf).argmax(dim=-1)
        return [tuple(row) for row in self._bound[1].cpu()[worst.cpu()].tolist()]

    def describe(self, positions: Tensor, velocities: Tensor, cell: Tensor | None = None) -> list[str]:
        """Return the coordinate that is furthest outside its limits, its value, and what the reference has."""
        system, atoms, limits = self._bound
        values, relative = self._relative(positions, cell)
        worst = torch.nan_to_num(relative, nan=torch.inf).argmax(dim=-1).tolist()
        return [
            f"{self.name} {system.label(atoms[index].tolist())} {float(value[index]):.3g} {self.coordinate_unit}, mean of "
            f"the reference {limits.center[index]:.3g}, limits {limits.lower[index]:.3g} and {limits.upper[index]:.3g}"
            for value, index in zip(values, worst, strict=True)
        ]

    def __str__(self) -> str:
        return f"{self.name} limits"

    def fit(self, raw: Tensor) -> None:
        """Learn from the reference what :meth:`reduced` needs.

        Args:
            raw: Coordinates of the reference frames, (n_frames, n_coordinates).
        """

    def reduced(self, raw: Tensor) -> Tensor:
        """Return coordinates whose fluctuations are nearly normal, (n_frames, n_coordinates).

        Args:
            raw: Coordinates of frames, (n_frames, n_coordinates).
        """
        return raw

    def make_limits(self, values: Tensor, classes: Tensor) -> Limits:
        """Return the limits of the coordinates.

        Args:
            values: Reduced coordinates of the reference frames, (n_frames, n_coordinates).
            classes: Class of each coordinate, (n_coordinates,).
        """
        return thermal_limits(values, classes, self.amplitude, self.false_alarms, self.scale)

    @property
    def atoms(self) -> Tensor:
        """Atoms of each coordinate of the bound system, (n_coordinates, n_members)."""
        return self._bound[1]

    @property
    def classes(self) -> Tensor:
        """Class of each coordinate, (n_coordinates,), equal for equivalent ones."""
        assert self._bound and self._classes is not None
        return self._classes

    @property
    def limits(self) -> Limits:
        """Limits of the coordinates of the bound system."""
        return self._bound[2]

    @property
    def _bound(self) -> tuple[System, Tensor, Limits]:
        if self._system is None or self._atoms is None or self._limits is None:
            raise RuntimeError(f"{type(self).__name__} has no reference yet: call bind(system, reference) first.")
        return self._system, self._atoms, self._limits

    def _relative(self, positions: Tensor, cell: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the reduced coordinates of frames, and their deviations relative to the limits."""
        system, atoms, limits = self._bound
        values = self.reduced(self.values(system, positions, atoms, cell))
        return values, limits.relative(values)


class BondLimits(CoordinateLimits):
    """Bonds outside the range of their thermal fluctuations.

    The value of a replica is the largest deviation of a bond from its mean length in the reference, relative to the largest
    that is thermal, see :class:`CoordinateLimits`.

    Args:
        temperature_K: Temperature of the simulation in K.
        false_alarms: Fraction of frames at equilibrium that are flagged.
        reference_temperature_K: Temperature of the reference in K; that of the simulation if None.
        discard_A: Deviation in Å above which a frame is excluded from the estimator; no limit if None.

    Example:
        >>> import torch
        >>> from ase.build import molecule
        >>> from stable_plugin import BondLimits, System
        >>> water = molecule("H2O")
        >>> positions = torch.tensor(water.positions)[None]
        >>> detector = BondLimits(temperature_K=300.0)
        >>> detector.bind(System.from_atoms(water), reference=positions)
        >>> stretched = torch.cat([1.1 * positions, 1.4 * positions])
        >>> detector.classify(stretched, torch.zeros_like(stretched))[0].tolist()
        [False, True]
    """

    name, coordinate_unit, stiffness = "bond", "Å", 25.0

    def __init__(
        self,
        temperature_K: float,
        false_alarms: float = FALSE_ALARMS,
        reference_temperature_K: float | None = None,
        discard_A: float | None = 3.0,
    ) -> None:
        super().__init__(temperature_K, false_alarms, reference_temperature_K)
        self.discard_A = discard_A if discard_A is None else checks.number("discard_A", discard_A, above=0)

    def coordinates(self, system: System) -> Tensor:
        return system.bonds

    def values(self, system: System, positions: Tensor, atoms: Tensor, cell: Tensor | None) -> Tensor:
        return system.distances(positions, atoms, cell)

    def classify(self, positions: Tensor, velocities: Tensor, cell: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return which replicas are unstable and which have a bond beyond ``discard_A``, both (n_replicas,)."""
        values, relative = self._relative(positions, cell)
        largest = inf if self.discard_A is None else self.discard_A
        off = (values - self._bound[2].center.to(values)).abs()
        return ~(relative.amax(dim=-1) <= self.threshold), ~(off.amax(dim=-1) <= largest)


class AngleLimits(CoordinateLimits):
    """Bond angles outside the range of their thermal fluctuations, see :class:`CoordinateLimits`.

    Args:
        temperature_K: Temperature of the simulation in K.
        false_alarms: Fraction of frames at equilibrium that are flagged.
        reference_temperature_K: Temperature of the reference in K; that of the simulation if None.
    """

    name, coordinate_unit, stiffness = "angle", "degrees", 4.0
    unit_per_radian = degrees(1.0)

    def coordinates(self, system: System) -> Tensor:
        return system.angles

    def values(self, system: System, positions: Tensor, atoms: Tensor, cell: Tensor | None) -> Tensor:
        return angles(system, positions, atoms, cell)


class PlaneLimits(CoordinateLimits):
    """Atoms with three bonds that leave the plane of their neighbors, in Å, see :class:`CoordinateLimits`.

    The side does not count for atoms that are pyramidal in the reference, as amines invert.

    Args:
        temperature_K: Temperature of the simulation in K.
        false_alarms: Fraction of frames at equilibrium that are flagged.
        reference_temperature_K: Temperature of the reference in K; that of the simulation if None.
    """

    name, coordinate_unit, stiffness = "plane", "Å out of it", 15.0

    def coordinates(self, system: System) -> Tensor:
        return branched_centers(system, 3)

    def values(self, system: System, positions: Tensor, atoms: Tensor, cell: Tensor | None) -> Tensor:
        return heights(system, positions, atoms, cell)

    def fit(self, raw: Tensor) -> None:
        self._planar = raw.mean(dim=0).abs() < raw.square().mean(dim=0).sqrt().clamp_min(2 * self.amplitude) / 2

    def reduced(self, raw: Tensor) -> Tensor:
        return torch.where(self._planar, raw, raw.abs())

    def make_limits(self, values: Tensor, classes: Tensor) -> Limits:
        limits = super().make_limits(values, classes)
        return replace(limits, lower=torch.where(self._planar, limits.lower, -inf))


class ChiralityLimits(CoordinateLimits):
    """Atoms with four bonds whose configuration is inverted or flattened, see :class:`CoordinateLimits`.

    The coordinate is the height of the atom above the plane of three neighbors, on the side that it has in the reference.

    Args:
        temperature_K: Temperature of the simulation in K.
        false_alarms: Fraction of frames at equilibrium that are flagged.
        reference_temperature_K: Temperature of the reference in K; that of the simulation if None.
    """

    name, coordinate_unit, stiffness = "chirality", "Å above three neighbors", 25.0

    def coordinates(self, system: System) -> Tensor:
        return branched_centers(system, 4)

    def values(self, system: System, positions: Tensor, atoms: Tensor, cell: Tensor | None) -> Tensor:
        return heights(system, positions, atoms, cell)

    def fit(self, raw: Tensor) -> None:
        self._side = raw.mean(dim=0).sign()

    def reduced(self, raw: Tensor) -> Tensor:
        return raw * self._side.to(raw)


class RingLimits(CoordinateLimits):
    """Torsions in rings of up to eight atoms that leave their range in the reference, see :class:`CoordinateLimits`.

    Args:
        temperature_K: Temperature of the simulation in K.
        false_alarms: Fraction of frames at equilibrium that are flagged.
        reference_temperature_K: Temperature of the reference in K; that of the simulation if None.
    """

    name, coordinate_unit, stiffness = "ring torsion", "degrees off its mean", 1.0
    unit_per_radian = degrees(1.0)

    def coordinates(self, system: System) -> Tensor:
        return ring_chains(system)

    def values(self, system: System, positions: Tensor, atoms: Tensor, cell: Tensor | None) -> Tensor:
        return torsions(system, positions, atoms, cell)

    def fit(self, raw: Tensor) -> None:
        radians = torch.deg2rad(raw)
        self._mean = torch.rad2deg(torch.atan2(radians.sin().mean(dim=0), radians.cos().mean(dim=0)))

    def reduced(self, raw: Tensor) -> Tensor:
        return torch.remainder(raw - self._mean.to(raw) + 180.0, 360.0) - 180.0
