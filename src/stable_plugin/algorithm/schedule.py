"""The state machine of StABlE training: simulate, learn, done. Numbers only; it holds no tensor and runs nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from math import inf
from typing import Any, Literal

from stable_plugin.runtime import checks

PhaseName = Literal["simulate", "learn", "done"]


@dataclass(frozen=True)
class Schedule:
    """When to learn and when to stop.

    Source: the loop of Raja et al., TMLR 2025, arXiv:2402.13984, section 3.

    Args:
        trigger: Share of unstable replicas that ends a simulation phase at once.
        floor: Share of unstable replicas at or below which a window counts as stable.
        stable_ps: Time that the replicas must stay stable for training to end.
        lr_patience: Learning windows without improvement of the unstable share before the learning rate is cut.
        lr_cut: Factor of a cut.
        max_lr_cuts: A learning phase ends when one more cut would be due.
        max_windows: Learning windows after which training ends whatever the share; no limit if not given.
    """

    max_unstable_fraction: float = 0.75
    min_unstable_fraction: float = 0.0
    stable_ps: float = 2.0
    lr_patience: int = 10
    lr_cut: float = 0.2
    max_lr_cuts: int = 2
    max_windows: int | None = None

    def __post_init__(self) -> None:
        checks.number("max_unstable_fraction", self.max_unstable_fraction, above=0, at_most=1)
        checks.number("min_unstable_fraction", self.min_unstable_fraction, at_least=0)
        if self.min_unstable_fraction >= self.max_unstable_fraction:
            raise ValueError(
                f"min_unstable_fraction={self.min_unstable_fraction:g} is not below max_unstable_fraction={self.max_unstable_fraction:g}: lower it."
            )
        checks.number("stable_ps", self.stable_ps, above=0)
        checks.count("lr_patience", self.lr_patience)
        checks.number("lr_cut", self.lr_cut, above=0, at_most=1)
        checks.count("max_lr_cuts", self.max_lr_cuts, at_least=0)
        if self.max_windows is not None:
            checks.count("max_windows", self.max_windows)


@dataclass
class PhaseTracker:
    """Where training stands, and what the outcome of a window means.

    Attributes:
        schedule: When to learn and when to stop.
        name: The present phase.
        stable_ps: Time simulated in the present simulation phase.
        lr_cuts: Cuts of the learning rate in the present learning phase.
        learning_windows: Learning windows in all phases.
    """

    schedule: Schedule = field(default_factory=Schedule)
    name: PhaseName = "simulate"
    stable_ps: float = 0.0
    lr_cuts: int = 0
    learning_windows: int = 0
    _best_share: float = inf
    _windows_without_progress: int = 0

    @property
    def lr_factor(self) -> float:
        """What the learning rate is multiplied with in this learning phase."""
        return self.schedule.lr_cut**self.lr_cuts

    def after_simulation_window(self, unstable_fraction: float, window_ps: float) -> PhaseName:
        """Take note of a window of the simulation phase.

        Args:
            unstable_fraction: Share of the replicas that became unstable since the simulation phase began.
            window_ps: Length of the window.

        Returns:
            The phase that follows: ``learn`` at the trigger, or at the end of the time asked for if the share is
            above the floor; ``done`` if it is not; else ``simulate``.
        """
        self.stable_ps += window_ps
        asked_time_over = self.stable_ps >= self.schedule.stable_ps * (1 - 1e-9)
        if unstable_fraction >= self.schedule.max_unstable_fraction or (
            asked_time_over and unstable_fraction > self.schedule.min_unstable_fraction
        ):
            self._enter_learning()
        elif asked_time_over:
            self.name = "done"
        return self.name

    def after_learning_window(self, unstable_fraction: float) -> PhaseName:
        """Take note of a window of the learning phase.

        Args:
            unstable_fraction: Share of the replicas that became unstable in this window.

        Returns:
            The phase that follows: ``simulate`` at the floor or when the learning rate is at its minimum.
        """
        self.learning_windows += 1
        if unstable_fraction <= self.schedule.min_unstable_fraction:
            self._enter_simulation()
        elif unstable_fraction < self._best_share:
            self._best_share, self._windows_without_progress = unstable_fraction, 0
        else:
            self._windows_without_progress += 1
            if self._windows_without_progress >= self.schedule.lr_patience:
                self._cut()
        if self.schedule.max_windows is not None and self.learning_windows >= self.schedule.max_windows:
            self.name = "done"
        return self.name

    def state_dict(self) -> dict[str, Any]:
        """Everything but the schedule."""
        state = asdict(self)
        del state["schedule"]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave."""
        for name, value in state.items():
            setattr(self, name, value)

    def _enter_learning(self) -> None:
        self.name, self.lr_cuts = "learn", 0
        self._best_share, self._windows_without_progress = inf, 0

    def _enter_simulation(self) -> None:
        self.name, self.stable_ps = "simulate", 0.0

    def _cut(self) -> None:
        self._windows_without_progress = 0
        if self.lr_cuts == self.schedule.max_lr_cuts:
            self._enter_simulation()
        else:
            self.lr_cuts += 1
