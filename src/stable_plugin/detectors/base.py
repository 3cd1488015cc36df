"""When is a replica broken: one number per replica and a threshold."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stable_plugin.md.system import System
from stable_plugin.runtime import checks


class Detector(ABC):
    """Measures one value per replica; larger is worse.

    A subclass gives :meth:`measure`, and :meth:`bind` if it needs to know the system.

    Args:
        threshold: Value above which a replica is unstable.
        discard: Value above which a frame is of no use to the estimator and the replica is stopped; never if not
            given.
    """

    unit = ""

    capturable = True
    """Whether :meth:`classify` can be part of a CUDA graph: no memory, no host synchronisation, shapes that are known."""

    def __init__(self, threshold: float, discard: float | None = None) -> None:
        self.threshold = checks.number("threshold", threshold)
        if discard is not None:
            checks.number("discard", discard, at_least=threshold, hint="It is wider than the threshold.")
        self.discard = discard

    def bind(self, system: System, reference: Tensor) -> None:  # noqa: B027  (most detectors need it, not all)
        """Take what is needed from the system and from reference frames.

        Args:
            system: What is simulated.
            reference: Unbroken frames, (n_frames, n_atoms, 3) in Å.

        Raises:
            ValueError: If the system offers nothing to look at.
        """

    @abstractmethod
    def measure(self, positions: Tensor, velocities: Tensor) -> Tensor:
        """The value, (n_replicas,).

        Args:
            positions: (n_replicas, n_atoms, 3) in Å.
            velocities: (n_replicas, n_atoms, 3) in Å per ASE time.
        """

    def classify(self, positions: Tensor, velocities: Tensor) -> tuple[Tensor, Tensor]:
        """Which replicas are unstable, and which are beyond the discard limit; both (n_replicas,).

        A value that is not a number counts as both.
        """
        value = self.measure(positions, velocities)
        discarded = torch.isnan(value) if self.discard is None else ~(value <= self.discard)
        return ~(value <= self.threshold), discarded

    def offending_atoms(self, positions: Tensor, velocities: Tensor) -> list[tuple[int, ...]]:
        """The atoms behind the value of each replica, n_replicas tuples; empty where no atom stands out.

        Args:
            positions: (n_replicas, n_atoms, 3) in Å.
            velocities: (n_replicas, n_atoms, 3) in Å per ASE time.
        """
        return [() for _ in positions]

    def reset(self, n_replicas: int) -> None:  # noqa: B027  (most detectors have no memory)
        """Forget what was seen: a new simulation begins. For detectors that look back in time."""

    def state_dict(self) -> Any:
        """What a detector that looks back in time has seen, to be put back by :meth:`recall`; None for the others."""
        return None

    def load_state_dict(self, state: Any) -> None:  # noqa: B027  (most detectors have no memory)
        """Go back to what :meth:`memory` gave: the steps since are simulated again."""

    def check_reference(self, frames: Tensor, name: str = "reference") -> None:
        """Refuse frames that this detector itself calls broken.

        Args:
            frames: (n_frames, n_atoms, 3) in Å.
            name: The argument that they came in, for the error.

        Raises:
            ValueError: If there is one.
        """
        value = self.measure(frames, torch.zeros_like(frames))
        broken = ~(value <= self.threshold)
        if broken.any():
            worst = int(torch.nan_to_num(value, nan=torch.inf).argmax())
            raise ValueError(
                f"{int(broken.sum())} of {len(frames)} {name} frames are broken by {self}: frame {worst} measures "
                f"{value[worst]:.3g} {self.unit}. Remove those frames, or raise the threshold.".replace(" .", ".")
            )

    def __str__(self) -> str:
        return f"{type(self).__name__}(threshold={self.threshold:g})"


class AnyOf(Detector):
    """Unstable when any of several detectors says so.

    Args:
        detectors: The detectors.
    """

    def __init__(self, detectors: Sequence[Detector]) -> None:
        if not detectors:
            raise ValueError("detectors=[] is empty: give at least one detector.")
        super().__init__(threshold=1.0)
        self.detectors = list(detectors)
        self.capturable = all(detector.capturable for detector in self.detectors)

    def bind(self, system: System, reference: Tensor) -> None:
        for detector in self.detectors:
            detector.bind(system, reference)

    def measure(self, positions: Tensor, velocities: Tensor) -> Tensor:
        """The largest 1 + (value - threshold) / |threshold| of all detectors, (n_replicas,)."""
        values = [
            1.0 + (detector.measure(positions, velocities) - detector.threshold) / (abs(detector.threshold) or 1.0)
            for detector in self.detectors
        ]
        return torch.stack(values).amax(dim=0)

    def classify(self, positions: Tensor, velocities: Tensor) -> tuple[Tensor, Tensor]:
        verdicts = [detector.classify(positions, velocities) for detector in self.detectors]
        broken, discarded = zip(*verdicts, strict=True)
        return torch.stack(broken).any(dim=0), torch.stack(discarded).any(dim=0)

    def offending_atoms(self, positions: Tensor, velocities: Tensor) -> list[tuple[int, ...]]:
        """Of the first detector that calls the replica unstable."""
        found: list[tuple[int, ...]] = [() for _ in positions]
        for detector in reversed(self.detectors):
            broken, _ = detector.classify(positions, velocities)
            own = detector.offending_atoms(positions, velocities)
            found = [mine if flag else other for mine, other, flag in zip(own, found, broken.tolist(), strict=True)]
        return found

    def reset(self, n_replicas: int) -> None:
        for detector in self.detectors:
            detector.reset(n_replicas)

    def state_dict(self) -> Any:
        return [detector.state_dict() for detector in self.detectors]

    def load_state_dict(self, state: Any) -> None:
        for detector, own in zip(self.detectors, state, strict=True):
            detector.load_state_dict(own)

    def check_reference(self, frames: Tensor, name: str = "reference") -> None:
        for detector in self.detectors:
            detector.check_reference(frames, name)

    def __str__(self) -> str:
        return " or ".join(str(detector) for detector in self.detectors)
