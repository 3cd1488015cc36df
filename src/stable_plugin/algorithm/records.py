"""What the training loop reports: one record per window, and progress within a window."""

from __future__ import annotations

from dataclasses import dataclass

from stable_plugin.algorithm.schedule import Phase


@dataclass
class WindowRecord:
    """One simulated window and what was learned from it.

    Attributes:
        window: Number of the window, from one.
        phase: ``simulate`` or ``learn``.
        simulated_ps: Simulated time per replica, all windows so far, in ps.
        unstable_fraction: Fraction of unstable replicas: in this window in the learning phase, since the phase began in
            the simulation phase.
        observable_loss: Loss of the observables over the window as simulated.
        ess_fraction: Effective fraction of the sample at the last optimizer step on it.
        steps: Optimizer steps taken on it.
        learning_rate: Learning rate of the last of these steps.
        wall_s: Wall time of the simulation in s.
        system: Name of the system, where several are trained on; windows are then numbered for each.
    """

    window: int
    phase: str
    simulated_ps: float
    unstable_fraction: float
    observable_loss: float
    ess_fraction: float | None = None
    steps: int = 0
    learning_rate: float | None = None
    wall_s: float = 0.0
    system: str = ""


@dataclass(frozen=True)
class Progress:
    """What a progress bar shows while a window is simulated.

    Attributes:
        phase: ``simulate`` or ``learn``.
        window_ps: Time simulated in this window, in ps.
        simulated_ps: Time simulated in all windows, in ps.
        latest: Record of the window before; None in the first one.
        system: Name of the system, where several are trained on.
    """

    phase: Phase
    window_ps: float
    simulated_ps: float
    latest: WindowRecord | None
    system: str = ""
