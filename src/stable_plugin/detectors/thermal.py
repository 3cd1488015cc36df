"""Detectors based on velocities, and on numbers that are not finite."""

from __future__ import annotations

import copy
from typing import Self

import torch
from ase.units import kB
from scipy import stats
from torch import Tensor

from stable_plugin.detectors.base import Detector
from stable_plugin.detectors.limits import FALSE_ALARMS, LimitDetector
from stable_plugin.md.state import kinetic_temperature
from stable_plugin.md.system import System
from stable_plugin.runtime import checks

HOTTEST = 1.5
"""Kinetic temperature, over that of the thermostat, which a replica may have for a while as it releases energy."""

COLDEST = 0.1
"""The same for a replica that starts at a minimum of the energy: half of its kinetic energy becomes potential energy."""


class RunawayTemperature(Detector):
    r"""Kinetic temperature of a replica, in K.

    .. math:: v = \frac{1}{N_f k_\mathrm{B}} \sum_{i=1}^{N} m_i |\mathbf{v}_i|^2

    The number of degrees of freedom :math:`N_f` is 3 for each atom that moves, less 3 where the integrator keeps the
    momentum of the center of mass zero. The temperature of N atoms at T fluctuates with a standard deviation of :math:`T \sqrt{2 / 3N}` (canonical
    ensemble), so choose a threshold several of these above T. There is no default, because it depends on T.

    Args:
        threshold: In K.
        discard: In K; no limit if None.

    Example:
        >>> import torch
        >>> from ase.build import molecule
        >>> from ase.units import kB
        >>> from stable_plugin import RunawayTemperature, System
        >>> water = molecule("H2O")
        >>> system = System.from_atoms(water)
        >>> positions = torch.tensor(water.positions)[None]
        >>> detector = RunawayTemperature(threshold=1000.0)
        >>> detector.bind(system, reference=positions)
        >>> speed = (kB * 1500.0 / system.masses).sqrt()  # along each axis, at 1500 K
        >>> velocities = speed[None, :, None].expand_as(positions)
        >>> [round(value) for value in detector.measure(positions, velocities).tolist()]
        [1500]
    """

    unit = "K"

    def __init__(self, threshold: float, discard: float | None = None) -> None:
        checks.number("threshold", threshold, above=0)
        super().__init__(threshold, discard)
        self._masses: Tensor | None = None
        self._degrees_of_freedom: int | None = None

    def bind(self, system: System, reference: Tensor, cell: Tensor | None = None) -> None:
        self._masses, self._degrees_of_freedom = system.masses, 3 * system.n_moving

    def set_degrees_of_freedom(self, number: int) -> None:
        self._degrees_of_freedom = number

    def heated(self, ratio: float) -> Self:
        hotter = copy.copy(self)
        hotter.threshold = ratio * self.threshold
        hotter.discard = None if self.discard is None else ratio * self.discard
        return hotter

    def measure(self, positions: Tensor, velocities: Tensor, cell: Tensor | None = None) -> Tensor:
        if self._masses is None:
            raise RuntimeError("RunawayTemperature has no masses yet: call bind(system, reference) first.")
        return kinetic_temperature(velocities, self._masses.to(velocities), self._degrees_of_freedom)

    def offending_atoms(
        self, positions: Tensor, velocities: Tensor, cell: Tensor | None = None
    ) -> list[tuple[int, ...]]:
        """Return the atom with the largest kinetic energy."""
        assert self._masses is not None
        return _fastest(velocities, self._masses)


class TemperatureLimits(LimitDetector):
    r"""Kinetic temperature of a replica outside the range of the canonical ensemble: runaway, or freezing.

    .. math:: v = \frac{|T_\mathrm{kin} - T|}{\Delta_T}, \qquad \text{threshold} = 1

    The kinetic energy over :math:`k_\mathrm{B} T / 2` has a chi-squared distribution with as many degrees of freedom as the
    atoms have (:class:`RunawayTemperature`), whose tails set the limits. They are at least 1.5 T and at most 0.1 T, as a replica that is not at equilibrium yet releases or
    takes up energy.

    Args:
        temperature_K: Temperature of the simulation in K.
        false_alarms: Fraction of frames at equilibrium that are flagged.

    Example:
        >>> import torch
        >>> from ase.build import bulk
        >>> from stable_plugin import System, TemperatureLimits
        >>> copper = bulk("Cu", cubic=True) * 2
        >>> positions = torch.tensor(copper.positions)[None]
        >>> detector = TemperatureLimits(temperature_K=300.0)
        >>> detector.bind(System.from_atoms(copper), reference=positions)
        >>> detector.describe(positions, torch.zeros_like(positions))
        ['kinetic temperature 0 K, limits 30 and 590']
    """

    def __init__(self, temperature_K: float, false_alarms: float = FALSE_ALARMS) -> None:
        super().__init__(temperature_K, false_alarms)
        self._masses: Tensor | None = None

    def bind(self, system: System, reference: Tensor, cell: Tensor | None = None) -> None:
        self._masses = system.masses
        self.set_degrees_of_freedom(3 * system.n_moving)

    def set_degrees_of_freedom(self, number: int) -> None:
        self._degrees_of_freedom, tail = number, self.false_alarms / 2
        self._low = self.temperature_K * min(COLDEST, float(stats.chi2.ppf(tail, number)) / number)
        self._high = self.temperature_K * max(HOTTEST, float(stats.chi2.isf(tail, number)) / number)

    def measure(self, positions: Tensor, velocities: Tensor, cell: Tensor | None = None) -> Tensor:
        change = self._temperatures(velocities) - self.temperature_K
        return torch.maximum(change / (self._high - self.temperature_K), change / (self._low - self.temperature_K))

    def offending_atoms(
        self, positions: Tensor, velocities: Tensor, cell: Tensor | None = None
    ) -> list[tuple[int, ...]]:
        """Return the atom with the largest kinetic energy."""
        assert self._masses is not None
        return _fastest(velocities, self._masses)

    def describe(self, positions: Tensor, velocities: Tensor, cell: Tensor | None = None) -> list[str]:
        """Return the kinetic temperature of each replica and its limits."""
        return [
            f"kinetic temperature {value:.0f} K, limits {self._low:.0f} and {self._high:.0f}"
            for value in self._temperatures(velocities).tolist()
        ]

    def check_reference(self, frames: Tensor, name: str = "reference", cell: Tensor | None = None) -> None:
        """Accept all frames, as they have no velocities."""

    def __str__(self) -> str:
        return "temperature limits"

    def _temperatures(self, velocities: Tensor) -> Tensor:
        if self._masses is None:
            raise RuntimeError("TemperatureLimits has no masses yet: call bind(system, reference) first.")
        return kinetic_temperature(velocities, self._masses.to(velocities), self._degrees_of_freedom)


class MomentumLimits(LimitDetector):
    r"""Kinetic energy of the center of mass beyond that of the canonical ensemble: forces that do not add up to zero.

    .. math:: v = \frac{M |\mathbf{V}|^2}{k_\mathrm{B} T \, \chi^2_3(p)}, \qquad \text{threshold} = 1

    with the total mass M, the velocity V of the center of mass, and the upper quantile of the chi-squared distribution with
    three degrees of freedom.

    Args:
        temperature_K: Temperature of the simulation in K.
        false_alarms: Fraction p of frames at equilibrium that are flagged.

    Example:
        >>> import torch
        >>> from ase.build import molecule
        >>> from ase.units import kB
        >>> from stable_plugin import MomentumLimits, System
        >>> water = molecule("H2O")
        >>> positions = torch.tensor(water.positions)[None]
        >>> detector = MomentumLimits(temperature_K=300.0)
        >>> detector.bind(System.from_atoms(water), reference=positions)
        >>> speed = (kB * 300.0 / water.get_masses().sum()) ** 0.5  # along each axis
        >>> thermal = torch.full_like(positions, speed)
        >>> detector.classify(torch.cat([positions] * 2), torch.cat([thermal, 5.0 * thermal]))[0].tolist()
        [False, True]
    """

    def __init__(self, temperature_K: float, false_alarms: float = FALSE_ALARMS) -> None:
        super().__init__(temperature_K, false_alarms)
        self._masses: Tensor | None = None

    def bind(self, system: System, reference: Tensor, cell: Tensor | None = None) -> None:
        self._masses = system.masses if system.fixed is None else system.masses.masked_fill(system.fixed, 0.0)
        self._largest = kB * self.temperature_K * float(stats.chi2.isf(self.false_alarms, 3))

    def measure(self, positions: Tensor, velocities: Tensor, cell: Tensor | None = None) -> Tensor:
        if self._masses is None:
            raise RuntimeError("MomentumLimits has no masses yet: call bind(system, reference) first.")
        masses = self._masses.to(velocities)
        momentum = (masses[:, None] * velocities).sum(dim=-2)
        return momentum.square().sum(dim=-1) / masses.sum() / self._largest

    def describe(self, positions: Tensor, velocities: Tensor, cell: Tensor | None = None) -> list[str]:
        """Return how much faster than allowed the center of mass of each replica moves."""
        return [
            f"center of mass {value:.2g} times as fast as thermal motion allows"
            for value in self.measure(positions, velocities).sqrt().tolist()
        ]

    def __str__(self) -> str:
        return "momentum limits"


class NonFinite(Detector):
    """1 if a position or velocity of the replica is not finite, and 0 otherwise.

    The simulator stops such replicas with every detector; use this one if nothing else is to be detected.

    Example:
        >>> import torch
        >>> from stable_plugin import NonFinite
        >>> positions = torch.tensor([[[0.0, 0.0, 0.0]], [[0.0, torch.nan, 0.0]]])
        >>> NonFinite().measure(positions, torch.zeros_like(positions)).tolist()
        [0.0, 1.0]
    """

    def __init__(self) -> None:
        super().__init__(threshold=0.5, discard=0.5)

    def measure(self, positions: Tensor, velocities: Tensor, cell: Tensor | None = None) -> Tensor:
        return (~torch.isfinite(positions + velocities).flatten(1).all(dim=1)).to(positions.dtype)


def _fastest(velocities: Tensor, masses: Tensor) -> list[tuple[int, ...]]:
    """Return the atom with the largest kinetic energy in each replica."""
    energies = masses.to(velocities) * velocities.square().sum(dim=-1)
    return [(int(atom),) for atom in torch.nan_to_num(energies, nan=torch.inf).argmax(dim=-1)]
