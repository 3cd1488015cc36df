"""Instability detectors: one value per replica, compared to a threshold."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stable_plugin.md.cells import optional
from stable_plugin.md.system import System
from stable_plugin.runtime import checks
from stable_plugin.runtime.representation import ReprMixin


class Detector(ReprMixin, ABC):
    """Base class of detectors: a value per replica; larger is worse.

    Subclasses implement :meth:`measure`, and :meth:`bind` if they need the system or reference frames.

    Args:
        threshold: Value above which a replica is unstable, in :attr:`unit`.
        discard: Value above which a frame is excluded from the estimator and the replica is stopped, in :attr:`unit`;
            no limit if None.

    Raises:
        ValueError: If ``threshold`` is not finite, or ``discard`` is less than ``threshold``.

    Example:
        >>> import torch
        >>> from stable_plugin import Detector
        >>> class Radius(Detector):
        ...     unit = "Å"
        ...
        ...     def measure(self, positions, velocities):
        ...         return positions.norm(dim=-1).amax(dim=-1)
        >>> positions = torch.tensor([[[0.0, 0.0, 1.0]], [[0.0, 3.0, 4.0]]])
        >>> unstable, discarded = Radius(threshold=2.0, discard=4.0).classify(positions, torch.zeros_like(positions))
        >>> unstable.tolist(), discarded.tolist()
        ([False, True], [False, True])
    """

    unit = ""
    """Unit of the value and of the threshold."""

    remedy = "raise the threshold"
    """What to do where frames that are good are flagged, in messages."""

    capturable = True
    """Whether :meth:`classify` can be captured in a CUDA graph: no state, no host synchronization, static shapes."""

    supports_margin = False
    """Whether frames above the threshold must have a higher energy than those of the reference: the atoms of a single frame
    are somewhere that thermal motion does not take them. Objective ``margin`` learns from such detectors."""

    def __init__(self, threshold: float, discard: float | None = None) -> None:
        self.threshold = checks.number("threshold", threshold)
        if discard is not None:
            checks.number("discard", discard, at_least=threshold, hint="It must not be less than the threshold.")
        self.discard = discard

    def bind(self, system: System, reference: Tensor, cell: Tensor | None = None) -> None:
        """Set up the detector for a system.

        Args:
            system: System to be simulated.
            reference: Stable frames, (n_frames, n_atoms, 3) in Å.
            cell: Cells of these frames, (n_frames, 3, 3) in Å; that of the system if None.

        Raises:
            ValueError: If the system has nothing that this detector measures.
        """

    def set_degrees_of_freedom(self, number: int) -> None:
        """Set the number of momenta that the integrator thermalizes; the simulator calls this before a window.

        Args:
            number: Three for each atom that moves, or fewer.
        """

    def set_check_interval(self, interval_fs: float) -> None:
        """Set the time between two calls of :meth:`measure`; the simulator calls this before a window.

        Args:
            interval_fs: In fs.
        """

    def heated(self, ratio: float) -> Detector:
        """Return a copy for replicas that are hotter, with wider limits where these are thermal; bind it before use.

        Args:
            ratio: Temperature of the replicas over that of those that this detector is for, at least 1.
        """
        return copy.copy(self)

    @property
    def parts(self) -> list[Detector]:
        """The detectors that this one combines; itself if it is a single one."""
        return [self]

    @property
    def averaging_fs(self) -> float:
        """Time in fs that a replica is followed before it can be classified as unstable."""
        return 0.0

    @abstractmethod
    def measure(self, positions: Tensor, velocities: Tensor, cell: Tensor | None = None) -> Tensor:
        """Return the value of each replica, (n_replicas,), in :attr:`unit`.

        Args:
            positions: (n_replicas, n_atoms, 3) in Å.
            velocities: (n_replicas, n_atoms, 3) in Å per ASE time.
            cell: Cells of the replicas, (n_replicas, 3, 3) in Å; that of the system if None.
        """

    def classify(self, positions: Tensor, velocities: Tensor, cell: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return which replicas are unstable and which exceed the discard limit, both (n_replicas,).

        NaN counts as both.

        Args:
            positions: (n_replicas, n_atoms, 3) in Å.
            velocities: (n_replicas, n_atoms, 3) in Å per ASE time.
            cell: Cells of the replicas, (n_replicas, 3, 3) in Å; that of the system if None.
        """
        value = self.measure(positions, velocities, *optional(cell))
        discarded = torch.isnan(value) if self.discard is None else ~(value <= self.discard)
        return ~(value <= self.threshold), discarded

    def by_coordinate(self, positions: Tensor, cell: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
        """Return the value of each coordinate, of which :meth:`measure` is the largest, and the atoms of each.

        Args:
            positions: (n_frames, n_atoms, 3) in Å.
            cell: Cells of the frames, (n_frames, 3, 3) in Å; that of the system if None.

        Returns:
            Values, (n_frames, n_coordinates), and atoms, (n_coordinates, n_members); None unless each coordinate is of one
            molecule.
        """
        return None

    def offending_atoms(
        self, positions: Tensor, velocities: Tensor, cell: Tensor | None = None
    ) -> list[tuple[int, ...]]:
        """Return the atoms that determine the value of each replica, n_replicas tuples; empty if it has no such atoms.

        Args:
            positions: (n_replicas, n_atoms, 3) in Å.
            velocities: (n_replicas, n_atoms, 3) in Å per ASE time.
            cell: Cells of the replicas, (n_replicas, 3, 3) in Å; that of the system if None.
        """
        return [() for _ in positions]

    def describe(self, positions: Tensor, velocities: Tensor, cell: Tensor | None = None) -> list[str]:
        """Return what is worst in each replica, n_replicas descriptions: the atoms, the value, and the limit.

        Args:
            positions: (n_replicas, n_atoms, 3) in Å.
            velocities: (n_replicas, n_atoms, 3) in Å per ASE time.
            cell: Cells of the replicas, (n_replicas, 3, 3) in Å; that of the system if None.
        """
        values = self.measure(positions, velocities, *optional(cell)).tolist()
        return [f"{self}: {value:.3g} {self.unit}".rstrip() for value in values]

    def reset(self, n_replicas: int) -> None:
        """Clear the state before a new simulation of ``n_replicas`` replicas."""

    def state_dict(self) -> Any:
        """Return the state for :meth:`load_state_dict`; None for a stateless detector."""
        return None

    def load_state_dict(self, state: Any) -> None:
        """Restore what :meth:`state_dict` returned, so that the steps since then can be repeated."""

    def check_reference(self, frames: Tensor, name: str = "reference", cell: Tensor | None = None) -> None:
        """Raise an error if this detector classifies a reference frame as unstable.

        Args:
            frames: (n_frames, n_atoms, 3) in Å.
            name: Argument name of the frames, for the message.
            cell: Cells of these frames, (n_frames, 3, 3) in Å; that of the system if None.

        Raises:
            ValueError: If a frame is unstable.
        """
        value = self.measure(frames, torch.zeros_like(frames), *optional(cell))
        unstable = ~(value <= self.threshold)
        if unstable.any():
            worst = int(torch.nan_to_num(value, nan=torch.inf).argmax())
            measured = f"{value[worst]:.3g} {self.unit}".rstrip()
            raise ValueError(
                f"{int(unstable.sum())} of {len(frames)} {name} frames are unstable according to {self!r}: frame {worst} "
                f"measures {measured}. Remove those frames, or {self.remedy}."
            )

    def __str__(self) -> str:
        return f"{type(self).__name__}(threshold={self.threshold:g})"


class AnyOf(Detector):
    r"""Combination of detectors: unstable if any of them classifies the replica as unstable.

    The value combines the values :math:`v_i` of the detectors with their thresholds :math:`t_i`:

    .. math:: v = \max_i \left[ 1 + \frac{v_i - t_i}{|t_i|} \right],

    which exceeds the threshold of 1 if any :math:`v_i > t_i`; a threshold of zero is not divided by. It has no unit.

    Args:
        detectors: Detectors to combine, at least one.

    Raises:
        ValueError: If ``detectors`` is empty.

    Example:
        >>> from stable_plugin import AnyOf, BondDeviation, RunawayTemperature
        >>> AnyOf([BondDeviation(0.5), RunawayTemperature(2000.0)])
        AnyOf(detectors=[BondDeviation(threshold=0.5, discard=3.0), RunawayTemperature(threshold=2000.0)])
    """

    def __init__(self, detectors: Sequence[Detector]) -> None:
        if not detectors:
            raise ValueError("detectors=[] is empty: pass at least one detector.")
        super().__init__(threshold=1.0)
        self.detectors = list(detectors)
        self.capturable = all(detector.capturable for detector in self.detectors)

    def bind(self, system: System, reference: Tensor, cell: Tensor | None = None) -> None:
        for detector in self.detectors:
            detector.bind(system, reference, *optional(cell))
        # A detector may need the host in a large system only.
        self.capturable = all(detector.capturable for detector in self.detectors)

    def set_degrees_of_freedom(self, number: int) -> None:
        for detector in self.detectors:
            detector.set_degrees_of_freedom(number)

    def set_check_interval(self, interval_fs: float) -> None:
        for detector in self.detectors:
            detector.set_check_interval(interval_fs)

    def heated(self, ratio: float) -> Detector:
        return AnyOf([detector.heated(ratio) for detector in self.detectors])

    @property
    def parts(self) -> list[Detector]:
        return [part for detector in self.detectors for part in detector.parts]

    @property
    def averaging_fs(self) -> float:
        """Time in fs that a replica is followed before any of the detectors can classify it as unstable."""
        return min(detector.averaging_fs for detector in self.detectors)

    def measure(self, positions: Tensor, velocities: Tensor, cell: Tensor | None = None) -> Tensor:
        values = [
            1.0
            + (detector.measure(positions, velocities, *optional(cell)) - detector.threshold)
            / (abs(detector.threshold) or 1.0)
            for detector in self.detectors
        ]
        return torch.stack(values).amax(dim=0)

    def classify(self, positions: Tensor, velocities: Tensor, cell: Tensor | None = None) -> tuple[Tensor, Tensor]:
        flags = [detector.classify(positions, velocities, *optional(cell)) for detector in self.detectors]
        unstable, discarded = zip(*flags, strict=True)
        return torch.stack(unstable).any(dim=0), torch.stack(discarded).any(dim=0)

    def offending_atoms(
        self, positions: Tensor, velocities: Tensor, cell: Tensor | None = None
    ) -> list[tuple[int, ...]]:
        """Return the atoms of the first detector that classifies the replica as unstable."""
        return self._from_first_unstable("offending_atoms", (), positions, velocities, *optional(cell))

    def describe(self, positions: Tensor, velocities: Tensor, cell: Tensor | None = None) -> list[str]:
        """Return what the first detector says that classifies the replica as unstable."""
        return self._from_first_unstable("describe", "", positions, velocities, *optional(cell))

    def _from_first_unstable(self, method: str, nothing: Any, *frames: Tensor) -> list[Any]:
        """Return what a method of the first detector returns that classifies each replica as unstable."""
        found = [nothing for _ in frames[0]]
        for detector in reversed(self.detectors):
            unstable, _ = detector.classify(*frames)
            own = getattr(detector, method)(*frames)
            found = [mine if flag else other for mine, other, flag in zip(own, found, unstable.tolist(), strict=True)]
        return found

    def reset(self, n_replicas: int) -> None:
        for detector in self.detectors:
            detector.reset(n_replicas)

    def state_dict(self) -> Any:
        return [detector.state_dict() for detector in self.detectors]

    def load_state_dict(self, state: Any) -> None:
        for detector, own in zip(self.detectors, state, strict=True):
            detector.load_state_dict(own)

    def check_reference(self, frames: Tensor, name: str = "reference", cell: Tensor | None = None) -> None:
        for detector in self.detectors:
            detector.check_reference(frames, name, *optional(cell))

    def __str__(self) -> str:
        return " or ".join(str(detector) for detector in self.detectors)
