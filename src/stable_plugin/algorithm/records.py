"""What the training loop reports: one record per window, progress within a window, and what was verified."""

from __future__ import annotations

from dataclasses import dataclass

from stable_plugin.algorithm.schedule import Phase


@dataclass
class WindowRecord:
    """One simulated window and what was learned from it.

    Attributes:
        window: Number of the window, from one.
        phase: ``probe``, ``learn`` or ``verify``. Only unstable fractions of probes can be compared with each other: they
            start from the same states. Start states of learning windows in which a replica failed are replaced.
        simulated_ps: Simulated time per replica, all windows so far, in ps.
        unstable_fraction: Fraction of the replicas that became unstable in this window.
        unstable_low: Lower end of its exact 95 % interval.
        unstable_high: Upper end of the interval.
        failures: Replicas of all processes that became unstable in this window.
        exposure_ps: Time until then or to the end of the window, summed over the replicas, in ps.
        observable_loss: Loss of the observables over the window as simulated; None if it is hotter than their targets.
        temperature_K: Temperature of the window in K.
        bound_per_ns: Upper bound of the failure rate in 1/ns, from the present probe or verification up to here; None in a
            learning window.
        ess_fraction: Effective fraction of the sample at the last optimizer step on it.
        margin_loss: Loss of the failure margin at the last optimizer step after it.
        steps: Optimizer steps taken on it.
        wall_s: Wall time of the simulation in s.
        system: Name of the system, where several are trained on; windows are then numbered for each.
    """

    window: int
    phase: str
    simulated_ps: float
    unstable_fraction: float
    unstable_low: float
    unstable_high: float
    failures: int
    exposure_ps: float
    observable_loss: float | None
    temperature_K: float
    bound_per_ns: float | None = None
    ess_fraction: float | None = None
    margin_loss: float | None = None
    steps: int = 0
    wall_s: float = 0.0
    system: str = ""


@dataclass(frozen=True)
class Progress:
    """What a progress bar shows while a window is simulated.

    Attributes:
        phase: ``probe``, ``learn`` or ``verify``.
        window_ps: Time simulated in this window, in ps.
        simulated_ps: Time simulated in all windows, in ps.
        latest: Record of the window before; None in the first one.
        unstable_fraction: Fraction of unstable replicas in the latest probe; None before its end.
        system: Name of the system, where several are trained on.
    """

    phase: Phase
    window_ps: float
    simulated_ps: float
    latest: WindowRecord | None
    unstable_fraction: float | None = None
    system: str = ""


@dataclass(frozen=True)
class Verification:
    """Whether the present weights were shown to fail more rarely than was asked for.

    Attributes:
        is_verified: Whether the bound is below ``max_failures_per_ns``.
        max_failures_per_ns: Failure rate that was asked for, in 1/ns.
        bound_per_ns: Upper bound of the failure rate that was reached with the present weights, in 1/ns; None if they were
            not simulated.
        confidence: Confidence of this bound alone; that of the verdict, over all verifications of the run, is 0.95.
        failures: Failures that the bound is computed from.
        exposure_ps: Time at risk that it is computed from, summed over the replicas, in ps.
        remaining_ps: Time per replica that would show the rate if no further failure came, in ps; zero if it is verified.
        reason: Why training ended, or has not ended.
        system: Name of the system, where several are trained on.
    """

    is_verified: bool
    max_failures_per_ns: float
    bound_per_ns: float | None
    confidence: float
    failures: int
    exposure_ps: float
    remaining_ps: float
    reason: str = ""
    system: str = ""

    def __str__(self) -> str:
        """Return a sentence with the bound, and the time that is missing."""
        subject = f"the potential{f' on {self.system}' if self.system else ''}"
        asked = f"{self.max_failures_per_ns:g} failures per ns"
        if self.bound_per_ns is None:
            found = "these weights were not simulated"
        else:
            found = (
                f"{self.failures} failure(s) in {self.exposure_ps:.4g} ps of all replicas, at most {self.bound_per_ns:.3g} "
                f"per ns ({100.0 * self.confidence:.4g} %)"
            )
        if self.is_verified:
            return f"{subject} is verified to have less than {asked}: {found}."
        return (
            f"{subject} is not verified to have less than {asked}: {self.reason}; {found}. It would take "
            f"{self.remaining_ps:.3g} ps per replica without a further failure to verify it."
        )
