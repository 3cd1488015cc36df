"""A learning rate that follows the effective sample size: a trust region for reweighted steps."""

from __future__ import annotations

from math import inf, isfinite, sqrt

from stable_plugin.runtime import checks

MAX_CHANGE = 2.0
"""Bound of the change of the factor from one step to the next: a single step is a noisy measurement."""


def distance(ess_fraction: float) -> float:
    """Return how far the parameters have moved since the frames were simulated, as the relative spread of the weights.

    √(1/ESS - 1), the square root of the χ² divergence of the two ensembles. While it is small it is proportional to the
    change of the parameters.

    Args:
        ess_fraction: Effective sample size over the number of samples.

    Returns:
        The distance; infinite if ``ess_fraction`` is zero or not a number.
    """
    return sqrt(max(1.0 / ess_fraction - 1.0, 0.0)) if ess_fraction > 0.0 else inf


class LearningRateScale:
    """Scales the learning rate so that the steps on a window together use up its effective sample size.

    The distance that a window allows, from ``min_ess_fraction``, is divided among its steps, and the learning rate is
    adapted to the part that each step has used.

    Args:
        max_scale: Upper bound of the factor; its inverse is the lower bound. 1 leaves the learning rate as it is.
        steps: Optimizer steps on one window.
        min_ess_fraction: Effective fraction at which a window is used up.

    Attributes:
        factor: Factor of the learning rate.
    """

    def __init__(self, max_scale: float, steps: int, min_ess_fraction: float) -> None:
        self.max_scale = checks.number("max_lr_scale", max_scale, at_least=1)
        self.factor = 1.0
        self._distance_per_step = distance(min_ess_fraction) / steps
        self._moved = 0.0

    def __repr__(self) -> str:
        return f"{type(self).__name__}(max_scale={self.max_scale:g}, factor={self.factor:g})"

    def begin_window(self) -> None:
        """Reset the distance: the frames have just been simulated."""
        self._moved = 0.0

    def update(self, ess_fraction: float) -> None:
        """Adapt the factor to the effective fraction after a step."""
        moved = distance(ess_fraction)
        used, self._moved = moved - self._moved, moved
        if used <= 0.0:
            return  # a step back towards the sampled parameters says nothing about the next one
        change = self._distance_per_step / used if isfinite(used) else 0.0
        change = min(max(change, 1.0 / MAX_CHANGE), MAX_CHANGE)
        self.factor = min(max(change * self.factor, 1.0 / self.max_scale), self.max_scale)

    def state_dict(self) -> dict[str, float]:
        """Return what a resumed run needs."""
        return {"factor": self.factor, "moved": self._moved}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.factor, self._moved = state["factor"], state["moved"]
