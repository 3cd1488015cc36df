"""A learning rate that follows the effective sample size: steps as long as a window can bear."""

from __future__ import annotations

from math import inf, isfinite, sqrt

from stable_plugin.runtime import checks

LARGEST_CHANGE = 2.0
"""Of the factor, from one step to the next: what a single step says is noisy."""


def distance(ess_fraction: float) -> float:
    """How far the weights have gone since the frames were simulated: the relative spread of the frames' weights.

    √(1/ESS - 1), the root of the χ² divergence of the two ensembles. While it is small it grows in proportion to the
    change of the parameters. Infinite where the share is not a number.
    """
    return sqrt(max(1.0 / ess_fraction - 1.0, 0.0)) if ess_fraction > 0.0 else inf


class LearningRateScale:
    """Scales the learning rate so that the steps taken on a window use it up together, and none of them alone.

    A trust region: the distance that a window allows, from its smallest effective share, is divided among its steps, and
    the learning rate is adapted to what each step has used of it.

    Args:
        largest: Bound of the factor; one over it is the other bound, and one leaves the learning rate alone.
        steps: Optimizer steps on one window.
        min_ess_fraction: Where a window is used up.

    Attributes:
        factor: What the learning rate is multiplied with.
    """

    def __init__(self, largest: float, steps: int, min_ess_fraction: float) -> None:
        self.largest = checks.number("max_lr_scale", largest, at_least=1)
        self.factor = 1.0
        self._share_of_a_step = distance(min_ess_fraction) / steps
        self._gone = 0.0

    def begin_window(self) -> None:
        """Take note that the frames are new."""
        self._gone = 0.0

    def follow(self, ess_fraction: float) -> None:
        """Take note of how effective the frames still are after a step."""
        gone = distance(ess_fraction)
        used, self._gone = gone - self._gone, gone
        if used <= 0.0:
            return  # a step back towards where the frames come from says nothing about the next
        change = self._share_of_a_step / used if isfinite(used) else 0.0
        change = min(max(change, 1.0 / LARGEST_CHANGE), LARGEST_CHANGE)
        self.factor = min(max(change * self.factor, 1.0 / self.largest), self.largest)

    def state_dict(self) -> dict[str, float]:
        """What a resumed run needs."""
        return {"factor": self.factor, "gone": self._gone}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Put back what :meth:`state_dict` gave."""
        self.factor, self._gone = state["factor"], state["gone"]
