"""The state machine of StABlE training: simulate, learn, done. It holds numbers only and runs nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from math import inf
from typing import Any, Literal

from stable_plugin.config import Schedule

Phase = Literal["simulate", "learn", "done"]


@dataclass
class PhaseTracker:
    """Decides from the unstable fraction of each window which phase follows.

    Source: the loop of Raja et al., TMLR 2025, arXiv:2402.13984, section 3.

    Attributes:
        schedule: When to learn and when to stop.
        phase: The present phase.
        stable_ps: Time simulated in the present simulation phase.
        lr_cuts: Cuts of the learning rate in the present learning phase.
        learning_windows: Learning windows in all phases.
    """

    schedule: Schedule = field(default_factory=Schedule)
    phase: Phase = "simulate"
    stable_ps: float = 0.0
    lr_cuts: int = 0
    learning_windows: int = 0
    _smallest_fraction: float = inf
    _windows_without_progress: int = 0

    @property
    def lr_factor(self) -> float:
        """Factor of the learning rate in this learning phase."""
        return self.schedule.lr_cut**self.lr_cuts

    def after_simulation_window(self, unstable_fraction: float, window_ps: float) -> Phase:
        """Return the phase that follows a window of the simulation phase.

        Args:
            unstable_fraction: Fraction of the replicas that became unstable since the simulation phase began.
            window_ps: Length of the window in ps.

        Returns:
            ``learn`` when ``max_unstable_fraction`` is reached, or when ``stable_ps`` is over and the fraction is above
            ``min_unstable_fraction``; ``done`` when it is over and the fraction is not above; else ``simulate``.
        """
        self.stable_ps += window_ps
        # Windows add up with rounding errors.
        is_over = self.stable_ps >= self.schedule.stable_ps * (1 - 1e-9)
        if unstable_fraction >= self.schedule.max_unstable_fraction or (
            is_over and unstable_fraction > self.schedule.min_unstable_fraction
        ):
            self._enter_learning()
        elif is_over:
            self.phase = "done"
        return self.phase

    def after_learning_window(self, unstable_fraction: float) -> Phase:
        """Return the phase that follows a window of the learning phase.

        Args:
            unstable_fraction: Fraction of the replicas that became unstable in this window.

        Returns:
            ``simulate`` at ``min_unstable_fraction`` or when the learning rate is at its minimum; ``done`` after
            ``max_windows``; else ``learn``.
        """
        self.learning_windows += 1
        if unstable_fraction <= self.schedule.min_unstable_fraction:
            self._enter_simulation()
        elif unstable_fraction < self._smallest_fraction:
            self._smallest_fraction, self._windows_without_progress = unstable_fraction, 0
        else:
            self._windows_without_progress += 1
            if self._windows_without_progress >= self.schedule.lr_patience:
                self._cut_learning_rate()
        if self.schedule.max_windows is not None and self.learning_windows >= self.schedule.max_windows:
            self.phase = "done"
        return self.phase

    def simulate_again(self) -> None:
        """Begin another simulation phase, to verify weights that have changed since the last one."""
        self._enter_simulation()

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the schedule."""
        state = asdict(self)
        del state["schedule"]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        for name, value in state.items():
            setattr(self, name, value)

    def _enter_learning(self) -> None:
        self.phase, self.lr_cuts = "learn", 0
        self._smallest_fraction, self._windows_without_progress = inf, 0

    def _enter_simulation(self) -> None:
        self.phase, self.stable_ps = "simulate", 0.0

    def _cut_learning_rate(self) -> None:
        self._windows_without_progress = 0
        if self.lr_cuts == self.schedule.max_lr_cuts:
            self._enter_simulation()
        else:
            self.lr_cuts += 1
