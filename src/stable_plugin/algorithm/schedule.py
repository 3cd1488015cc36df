"""The state machine of StABlE training: probe, learn, verify, done. It holds numbers only and runs nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from math import inf, log
from typing import Any, Literal

from stable_plugin.config import Schedule
from stable_plugin.runtime.intervals import error_share, log_evidence, sequential_limit

Phase = Literal["probe", "learn", "verify", "done"]

HOPELESS = 0.1
"""Evidence of a smaller rate than the one asked for at which a verification ends: a potential with a tenth of that rate gets
there in 2 % of cases, one with three tenths in 26 %."""


@dataclass
class PhaseTracker:
    """Decides from the failures of each window which phase follows.

    A *probe* is one window from fixed start states. If its failure rate is above ``max_failures_per_ns``, or its observables
    are off by more than ``max_observable_loss``, some *learning* windows and the next probe follow, else a *verification*:
    windows in which stable replicas continue, until the evidence of a smaller rate than ``max_failures_per_ns`` is strong, or
    weak enough to give up.

    A verification is a sequential test: it looks after each window, and is the shorter the clearer the case is. The v-th
    one of a run has an error probability of 0.05 * 2 / 3^v, together 0.05. It counts from its first window on, however it
    ends, and does not use the time of the probe that led to it. So a potential that fails more often than
    ``max_failures_per_ns`` passes in at most 5 % of runs, however many times it is verified.

    Source: the loop of Raja et al., TMLR 2025, arXiv:2402.13984, section 3; for the test see
    :func:`~stable_plugin.runtime.intervals.log_evidence`.

    Attributes:
        schedule: When to learn and when to stop.
        phase: The present phase.
        failures: Failures in the present probe or verification.
        exposure_ps: Time at risk in it, summed over the replicas, in ps.
        bound_per_ns: Upper bound of the failure rate from them, in 1/ns, as of the latest window.
        error: Probability with which this bound may be too small.
        verifications: Verifications so far.
        is_verified: Whether training ended with a verification that was passed.
        lr_cuts: Cuts of the learning rate in the present learning phase.
        learning_windows: Learning windows in all phases.
        windows_since_probe: Learning windows since the latest probe.
    """

    schedule: Schedule = field(default_factory=Schedule)
    phase: Phase = "probe"
    failures: int = 0
    exposure_ps: float = 0.0
    bound_per_ns: float = inf
    error: float = error_share(1)
    verifications: int = 0
    is_verified: bool = False
    lr_cuts: int = 0
    learning_windows: int = 0
    windows_since_probe: int = 0
    _smallest_fraction: float = inf
    _smallest_loss: float = inf
    _windows_without_progress: int = 0

    @property
    def lr_factor(self) -> float:
        """Factor of the learning rate in this learning phase."""
        return self.schedule.lr_cut**self.lr_cuts

    @property
    def remaining_ps(self) -> float:
        """Time, summed over the replicas, that would show a rate below ``max_failures_per_ns`` without further failures."""
        if self.phase == "verify":
            needed = self.schedule.verification_ps(self.verifications, self.failures)
            return max(needed - self.exposure_ps, 0.0)
        return self.schedule.verification_ps(self.verifications + 1)

    def after_probe(
        self, failures: int, exposure_ps: float, unstable_fraction: float, observable_loss: float = 0.0
    ) -> Phase:
        """Return the phase that follows a probe.

        Args:
            failures: Replicas that became unstable in it.
            exposure_ps: Time until then or to its end, summed over the replicas, in ps.
            unstable_fraction: Fraction of the replicas that became unstable.
            observable_loss: Loss of the observables in it.

        Returns:
            ``verify`` if neither the failure rate is above ``max_failures_per_ns`` nor the loss above
            ``max_observable_loss``, and ``min_windows`` have been learned from; else ``learn``, or ``done`` after
            ``max_windows``.
        """
        self.failures, self.exposure_ps = failures, exposure_ps
        self._bound()
        most = self.schedule.max_observable_loss
        is_off = most is not None and not observable_loss <= most  # also if it is NaN
        if failures > self._tolerated(exposure_ps) or is_off:
            self._note_progress(unstable_fraction, observable_loss)
            self._enter_learning()
        elif self.learning_windows < self.schedule.min_windows:
            self._enter_learning()
        else:
            self.lr_cuts, self._windows_without_progress = 0, 0
            self._smallest_fraction, self._smallest_loss = inf, inf
            self.phase, self.failures, self.exposure_ps = "verify", 0, 0.0
            self.verifications += 1
        return self.phase

    def after_verification_window(self, failures: int, exposure_ps: float) -> Phase:
        """Return the phase that follows a window of a verification.

        Args:
            failures: Replicas that became unstable in it.
            exposure_ps: Time until then or to its end, summed over the replicas, in ps.

        Returns:
            ``done`` if the bound of the failure rate is below ``max_failures_per_ns``; ``learn``, or ``done`` after
            ``max_windows``, if there were too many failures; else ``verify``.
        """
        self.failures += failures
        self.exposure_ps += exposure_ps
        self._bound()
        # Windows add up with rounding errors.
        if self.bound_per_ns <= self.schedule.max_failures_per_ns * (1 + 1e-9):
            self.phase, self.is_verified = "done", True
        elif log_evidence(self.failures, self._tolerated(self.exposure_ps)) < log(HOPELESS):
            self._enter_learning()
        return self.phase

    def after_learning_window(self, failures: int | None = None, exposure_ps: float = 0.0) -> None:
        """Count a learning window; the phase stays until the window is used up.

        Args:
            failures: Replicas that became unstable in it, if a probe is due as soon as these are few. Before ``min_windows``
                no verification can follow it, and once one has failed, few failures say nothing new, and ``probe_every``
                windows cost less than the next verification.
            exposure_ps: Time until then or to its end, summed over the replicas, in ps.
        """
        self.learning_windows += 1
        self.windows_since_probe += 1
        may_verify = self.verifications == 0 and self.learning_windows >= self.schedule.min_windows
        if failures is not None and may_verify and failures <= self._tolerated(exposure_ps):
            self.windows_since_probe = self.schedule.probe_every

    @property
    def is_probe_due(self) -> bool:
        """Whether a probe follows the learning window at hand."""
        return self.windows_since_probe >= self.schedule.probe_every or self._is_used_up()

    def after_learning_steps(self) -> Phase:
        """Return the phase that follows when the frames at hand are used up: ``learn``, or ``probe`` when one is due."""
        if self.phase == "learn" and self.is_probe_due:
            self.phase = "probe"
        return self.phase

    def probe_again(self) -> None:
        """Begin with a probe, because the weights have changed since the last verification."""
        self.phase, self.is_verified = "probe", False

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the schedule."""
        state = asdict(self)
        del state["schedule"]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        for name, value in state.items():
            setattr(self, name, value)

    def _tolerated(self, exposure_ps: float) -> float:
        return self.schedule.max_failures_per_ns * exposure_ps / 1000.0

    def _bound(self) -> None:
        self.error = error_share(max(self.verifications, 1))
        most = sequential_limit(self.failures, self.error)
        self.bound_per_ns = 1000.0 * most / self.exposure_ps if self.exposure_ps else inf

    def _is_used_up(self) -> bool:
        return self.schedule.max_windows is not None and self.learning_windows >= self.schedule.max_windows

    def _enter_learning(self) -> None:
        self.phase, self.windows_since_probe = "done" if self._is_used_up() else "learn", 0

    def _note_progress(self, unstable_fraction: float, observable_loss: float) -> None:
        measure = unstable_fraction, observable_loss if self.schedule.max_observable_loss is not None else 0.0
        if measure < (self._smallest_fraction, self._smallest_loss):
            (self._smallest_fraction, self._smallest_loss), self._windows_without_progress = measure, 0
            return
        self._windows_without_progress += self.windows_since_probe
        if self._windows_without_progress >= self.schedule.lr_patience:
            self._windows_without_progress = 0
            self.lr_cuts = 0 if self.lr_cuts == self.schedule.max_lr_cuts else self.lr_cuts + 1
