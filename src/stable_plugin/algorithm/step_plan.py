"""How many optimizer steps follow a window of the failure margin, and how large they are."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from math import cos, isfinite, pi
from typing import Any

LEVEL_STEPS = 20
"""First steps of a run, at most one cycle, at a learning rate of zero: they measure the user's loss before the repair."""

FINAL_LR_FACTOR = 0.05
"""Factor of the learning rate at the last step of a cycle. The weights that are simulated next have settled, and noise of the
steps does not bring failures back."""

TOLERANCE = 0.02
"""Excess of the user's loss, relative to its level before the repair, that does not count."""

PROGRESS = 0.8
"""Largest excess that a cycle may leave of that which it began with; otherwise further cycles gain little. It ends the steps where
the loss cannot come back, as beside labels of the potential itself, whose level is zero."""

MAX_CYCLES = 8
"""Cycles after one window at most."""


@dataclass
class StepPlan:
    """Plans the optimizer steps after windows of the failure margin.

    A *cycle* of steps follows each window, with a learning rate that falls from step to step, as in warm restarts
    (Loshchilov and Hutter, ICLR 2017). Raising frames near failures disturbs the fit of energies and forces, and more of
    the same steps mend it. So before the weights are probed, cycles on the frames at hand follow each other while the
    user's loss is above its level before the repair, and falls towards it.

    Args:
        cycle_steps: Optimizer steps in a cycle.

    Attributes:
        n_level_steps: Steps so far that measure the level.
        level: Mean of the user's loss before the repair; zero as long as it is not known.
        position: Steps taken in the present cycle.
        cycles: Cycles begun after the present window.
    """

    cycle_steps: int
    n_level_steps: int = 0
    level: float = 0.0
    position: int = 0
    cycles: int = 0
    _n_losses: int = 0
    _losses: list[float] = field(default_factory=list)
    _excess_before: float | None = None

    @property
    def lr_factor(self) -> float:
        """Factor of the learning rate of the latest step."""
        if self.position == 0:
            return 0.0
        done = (self.position - 1) / max(self.cycle_steps - 1, 1)
        return FINAL_LR_FACTOR + (1.0 - FINAL_LR_FACTOR) * 0.5 * (1.0 + cos(pi * done))

    def begin_window(self) -> None:
        """Begin with the steps after a new window."""
        self.cycles, self._excess_before = 0, None
        self._begin_cycle()

    def take_step(self, users_loss: float | None, *, settle: bool) -> bool:
        """Count a step, if one is due.

        Args:
            users_loss: The user's loss at the present weights; None if it is not known.
            settle: Whether the user's loss is to be settled, as the weights are probed next.

        Returns:
            Whether a step is due: whether the steps after the present window go on.
        """
        if self.n_level_steps < min(LEVEL_STEPS, self.cycle_steps):
            self._measure_level(users_loss)
            return True
        if users_loss is not None and isfinite(users_loss):
            self._losses.append(users_loss)
        if self.position == self.cycle_steps:
            if not (settle and self._is_disturbed()):
                return False
            self._begin_cycle()
        self.position += 1
        return True

    def _measure_level(self, users_loss: float | None) -> None:
        self.n_level_steps += 1
        if users_loss is not None and isfinite(users_loss):
            self._n_losses += 1
            self.level += (users_loss - self.level) / self._n_losses

    def _begin_cycle(self) -> None:
        self.position, self._losses = 0, []
        self.cycles += 1

    def _is_disturbed(self) -> bool:
        """Return whether the user's loss is above its level, and falls towards it."""
        late = self._losses[len(self._losses) // 2 :]
        if not late or self._n_losses == 0 or self.cycles >= MAX_CYCLES:
            return False
        excess, before = sum(late) / len(late) - self.level, self._excess_before
        self._excess_before = excess
        return excess > TOLERANCE * abs(self.level) and (before is None or excess < PROGRESS * before)

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the length of a cycle."""
        state = asdict(self)
        del state["cycle_steps"]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        for name, value in state.items():
            setattr(self, name, value)
