"""How many optimizer steps follow a window of the failure margin, and how large they are."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field
from math import cos, isfinite, pi
from typing import Any

LEVEL_STEPS = 20
"""First steps of a run, at most one cycle, at a learning rate of zero: they measure the user's loss before the repair."""

FINAL_LR_FACTOR = 0.05
"""Factor of the learning rate at the last step of a cycle. The weights that are simulated next have settled, and noise of the
steps does not bring failures back."""

USERS_TOLERANCE = 0.02
"""Excess of the user's loss, relative to its level before the repair, that does not count."""

MARGIN_TOLERANCE = 0.1
"""Loss of the margin that does not count."""

PROGRESS = 0.8
"""Largest part of an excess that a cycle may leave; otherwise further cycles gain little. It ends the steps where a loss cannot
come back, as beside labels of the potential itself, whose level is zero, or in a model that is too small for its margins."""

MAX_CYCLES = 8
"""Cycles after one window at most."""


@dataclass
class _Descent:
    """Losses of one objective in a cycle, and its excess in the cycle before.

    Attributes:
        losses: Losses of the present cycle.
        excess: Excess of the cycle before; None in the first one after a window.
    """

    losses: list[float] = field(default_factory=list)
    excess: float | None = None

    def add(self, loss: float | None) -> None:
        """Add the loss of a step, if it is known."""
        if loss is not None and isfinite(loss):
            self.losses.append(loss)

    def end_cycle(self, level: float, tolerance: float) -> bool:
        """End a cycle.

        Args:
            level: Loss that is to be reached.
            tolerance: Excess that does not count.

        Returns:
            Whether another cycle would gain something: whether the loss is above its level, and falls.
        """
        late, before = self.losses[len(self.losses) // 2 :], self.excess
        self.losses = []
        if not late:
            return False
        self.excess = sum(late) / len(late) - level
        return self.excess > tolerance and (before is None or self.excess < PROGRESS * before)


@dataclass
class StepPlan:
    """Plans the optimizer steps after windows of the failure margin.

    A *cycle* of steps follows each window, with a learning rate that falls from step to step, as in warm restarts
    (Loshchilov and Hutter, ICLR 2017). Raising frames near failures disturbs the fit of energies and forces, and more of
    the same steps mend it, and raise what one cycle has left. They cost no simulation. So before the weights are probed, cycles
    on the frames at hand follow each other while the user's loss falls towards its level before the repair, or the loss of
    the margin towards zero.

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
    _users: _Descent = field(default_factory=_Descent)
    _margin: _Descent = field(default_factory=_Descent)

    @property
    def lr_factor(self) -> float:
        """Factor of the learning rate of the latest step."""
        if self.position == 0:
            return 0.0
        done = (self.position - 1) / max(self.cycle_steps - 1, 1)
        return FINAL_LR_FACTOR + (1.0 - FINAL_LR_FACTOR) * 0.5 * (1.0 + cos(pi * done))

    def begin_window(self) -> None:
        """Begin with the steps after a new window."""
        self._users, self._margin = _Descent(), _Descent()
        self.position, self.cycles = 0, 1

    def take_step(self, users_loss: float | None, margin_loss: float | None = None, *, settle: bool) -> bool:
        """Count a step, if one is due.

        Args:
            users_loss: The user's loss at the present weights; None if it is not known.
            margin_loss: Loss of the margin in the step before, in kT; None in the first step after a window.
            settle: Whether both losses are to be settled, as the weights are probed next.

        Returns:
            Whether a step is due: whether the steps after the present window go on.
        """
        if self.n_level_steps < min(LEVEL_STEPS, self.cycle_steps):
            self._measure_level(users_loss)
            return True
        self._users.add(users_loss)
        self._margin.add(margin_loss)
        if self.position == self.cycle_steps:
            if not (self._gains() and settle and self.cycles < MAX_CYCLES):
                return False
            self.position, self.cycles = 0, self.cycles + 1
        self.position += 1
        return True

    def _measure_level(self, users_loss: float | None) -> None:
        self.n_level_steps += 1
        if users_loss is not None and isfinite(users_loss):
            self._n_losses += 1
            self.level += (users_loss - self.level) / self._n_losses

    def _gains(self) -> bool:
        """End a cycle, and return whether another one would gain something."""
        users = self._users.end_cycle(self.level, USERS_TOLERANCE * abs(self.level)) and self._n_losses > 0
        return self._margin.end_cycle(0.0, MARGIN_TOLERANCE) or users

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the length of a cycle."""
        state = asdict(self)
        del state["cycle_steps"]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        for name, value in state.items():
            setattr(self, name, _Descent(**copy.deepcopy(value)) if isinstance(value, dict) else value)
