"""Detectors that look at velocities and at the numbers themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from stable_plugin.detectors.base import Detector
from stable_plugin.md.state import kinetic_temperature
from stable_plugin.md.system import System
from stable_plugin.runtime import checks


class RunawayTemperature(Detector):
    """Kinetic temperature of a replica, in K.

    Args:
        threshold: In K. A replica of N atoms at T fluctuates by T·sqrt(2/3N): leave several times that.
        discard: In K.
    """

    unit = "K"

    def __init__(self, threshold: float, discard: float | None = None) -> None:
        checks.number("threshold", threshold, above=0)
        super().__init__(threshold, discard)
        self._masses: Tensor | None = None

    def bind(self, system: System, reference: Tensor) -> None:
        self._masses = system.masses

    def measure(self, positions: Tensor, velocities: Tensor) -> Tensor:
        if self._masses is None:
            raise RuntimeError("RunawayTemperature has no masses yet: call bind(system, reference) first.")
        return kinetic_temperature(velocities, self._masses.to(velocities))

    def offending_atoms(self, positions: Tensor, velocities: Tensor) -> list[tuple[int, ...]]:
        """The atom with the most kinetic energy."""
        assert self._masses is not None
        energies = self._masses.to(velocities) * velocities.square().sum(dim=-1)
        return [(int(atom),) for atom in torch.nan_to_num(energies, nan=torch.inf).argmax(dim=-1)]


class NonFinite(Detector):
    """One where a replica holds a number that is not finite, zero elsewhere.

    The simulator stops such replicas whatever the detector; this one is for using it alone.
    """

    def __init__(self) -> None:
        super().__init__(threshold=0.5, discard=0.5)

    def measure(self, positions: Tensor, velocities: Tensor) -> Tensor:
        return (~torch.isfinite(positions + velocities).flatten(1).all(dim=1)).to(positions.dtype)
