"""A learning rate that follows the effective sample size: steps as long as a window can bear."""

from __future__ import annotations

from math import inf, isfinite, sqrt

from stable_plugin import checks

LARGEST_CHANGE = 2.0
"""Of the factor, from one step to the next: what a single step says is noisy."""


def distance(effective_share: float) -> float:
    """How far the weights have gone since the frames were simulated: the relative spread of the frames' weights.

    √(1/ESS - 1), the root of the χ² divergence of the two ensembles. While it is small it grows in proportion to the
    change of the parameters. Infinite where the share is not a number.
    """
    return sqrt(max(1.0 / effective_share - 1.0, 0.0)) if effective_share > 0.0 else inf


class StepSize:
    """Scales the learning rate so that the steps taken on a window use it up together, and none of them alone.

    A trust region: the distance that a window allows, from its smallest effective share, is divided among its steps, and
    the learning rate is adapted to what each step has used of it.

    Args:
        largest: Bound of the factor; one over it is the other bound, and one leaves the learning rate alone.
        steps: Optimizer steps on one window.
        min_effective_share: Where a window is used up.

    Attributes:
        factor: What the learning rate is multiplied with.
    """

    def __init__(self, largest: float, steps: int, min_effective_share: float) -> None:
        self.largest = checks.number("largest_step", largest, least=1)
        self.factor = 1.0
        self._share_of_a_step = distance(min_effective_share) / steps
        self._gone = 0.0

    def begin_window(self) -> None:
        """Take note that the frames are new."""
        self._gone = 0.0

    def follow(self, effective_share: float) -> None:
        """Take note of how effective the frames still are after a step."""
        gone = distance(effective_share)
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
