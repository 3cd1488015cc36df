"""Limits that a quantity does not exceed at thermal equilibrium, from its values in reference frames."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from math import sqrt
from typing import Self

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from stable_plugin.detectors.base import Detector
from stable_plugin.runtime import checks

FALSE_ALARMS = 1e-7
"""Fraction of frames at equilibrium that a detector flags by default."""

PRIOR_FRAMES = 30
"""Number of frames that the expected amplitude counts for, beside those of the reference."""

OUTLIER = 10.0
"""Robust standard deviations beyond which a value in the reference is not thermal."""

MAX_SKEWNESS = 1.5


@dataclass(frozen=True)
class Limits:
    """Mean of each coordinate in the reference, and the range that it does not leave, each (n_coordinates,)."""

    center: Tensor
    lower: Tensor
    upper: Tensor

    def to(self, other: Tensor) -> Limits:
        """Return the limits on the device and in the precision of another tensor."""
        return Limits(self.center.to(other), self.lower.to(other), self.upper.to(other))

    def relative(self, values: Tensor) -> Tensor:
        """Return deviations from the center over the largest that are allowed, with the shape of the values.

        Args:
            values: (..., n_coordinates).
        """
        center = self.center.to(values)
        above = (values - center) / (self.upper.to(values) - center)
        below = (center - values) / (center - self.lower.to(values))
        return torch.maximum(above, below)


def thermal_limits(
    values: Tensor, classes: Tensor, amplitude: float, false_alarms: float, scale: float = 1.0
) -> Limits:
    r"""Return limits that one equilibrium frame in ``1 / false_alarms`` exceeds in any coordinate.

    Each coordinate is taken as nearly normal around its own mean in the reference, with the variance and skewness of all
    equivalent coordinates. The variance is that of the posterior with a scaled inverse chi-square prior of
    :data:`PRIOR_FRAMES` values at the expected amplitude, so that few frames give wide limits instead of arbitrary ones,
    and the limit is a quantile of the posterior predictive distribution, which is Student's t. Skewness widens the longer
    tail (Pearson type III), as anharmonic bonds need; it never narrows the shorter one. Values more than
    :data:`OUTLIER` robust standard deviations off the median are left out: a broken frame must not widen the limits.

    Source: A. Gelman et al., Bayesian Data Analysis, 3rd ed. (2013), section 3.3.

    Args:
        values: Values in the reference, (n_frames, n_coordinates).
        classes: Class of equivalent coordinates of each coordinate, (n_coordinates,).
        amplitude: Expected standard deviation of a soft coordinate at the temperature of the simulation.
        false_alarms: Probability that any coordinate of a frame at equilibrium is outside its limits.
        scale: Standard deviations at the temperature of the simulation over those in the reference.
    """
    values = values.double()
    kept = _without_outliers(values, classes, amplitude)
    count = kept.sum(dim=0).clamp_min(1)
    mean = torch.where(kept, values, 0.0).sum(dim=0) / count
    residual = torch.where(kept, values - mean, 0.0)
    n_values = _class_sum(count[None].to(values), classes)
    own_freedom = _class_sum((count - 1)[None].to(values), classes)
    squares = _class_sum(residual.square(), classes)
    freedom = own_freedom + PRIOR_FRAMES
    spread = ((scale**2 * squares + amplitude**2 * PRIOR_FRAMES) / freedom).sqrt()
    # Skewness of few values is noise.
    weight = n_values / (n_values + 10 * PRIOR_FRAMES)
    skewness = weight * _class_sum(residual**3, classes) / n_values / (squares / n_values).clamp_min(1e-12) ** 1.5
    tail = false_alarms / (2 * values.shape[1])
    predictive = (1.0 + 1.0 / count).sqrt()
    below, above = ((spread * _quantile(tail, freedom, side))[classes] * predictive for side in (-skewness, skewness))
    return Limits(mean, mean - below, mean + above)


def _without_outliers(values: Tensor, classes: Tensor, amplitude: float) -> Tensor:
    """Return which values are no outliers, with the shape of the values."""
    # torch.median of two values is the lower one.
    off = (values - torch.as_tensor(np.median(values.cpu().numpy(), axis=0)).to(values)).abs()
    robust = torch.stack([1.4826 * off[:, classes == each].median() for each in range(int(classes.max()) + 1)])
    return off <= OUTLIER * robust.clamp_min(amplitude)[classes]


def _quantile(tail: float, freedom: Tensor, skewness: Tensor) -> Tensor:
    """Return how many standard deviations above the mean a fraction ``tail`` of each class lies, (n_classes,)."""
    few = stats.t.isf(tail, freedom.cpu().numpy()) / stats.norm.isf(tail)
    longer = stats.pearson3.isf(tail, skewness.clamp(0.0, MAX_SKEWNESS).cpu().numpy())
    return torch.as_tensor(few * longer).to(freedom)


def _class_sum(values: Tensor, classes: Tensor) -> Tensor:
    """Return sums over frames and equivalent coordinates, (n_classes,)."""
    sums = values.new_zeros(int(classes.max()) + 1)
    return sums.index_add(0, classes, values.sum(dim=0))


class LimitDetector(Detector):
    """Base class of detectors whose limits are exceeded at a stated rate of false alarms; the threshold is 1.

    Args:
        temperature_K: Temperature of the simulation in K.
        false_alarms: Fraction of frames at equilibrium that are flagged.
    """

    remedy = "pass a detector with a lower false_alarms"

    def __init__(self, temperature_K: float, false_alarms: float = FALSE_ALARMS) -> None:
        super().__init__(threshold=1.0)
        self.temperature_K = checks.number("temperature_K", temperature_K, above=0)
        self.false_alarms = checks.number("false_alarms", false_alarms, above=0, at_most=0.1)

    def heated(self, ratio: float) -> Self:
        hotter = copy.copy(self)
        hotter.temperature_K = ratio * self.temperature_K
        return hotter


class ReferenceLimitDetector(LimitDetector):
    """Base class of detectors whose limits come from the fluctuations of the reference.

    Args:
        temperature_K: Temperature of the simulation in K, which sets the fluctuations that a short reference does not show.
        false_alarms: Fraction of frames at equilibrium that are flagged.
        reference_temperature_K: Temperature of the reference in K; that of the simulation if None.
    """

    supports_margin = True

    def __init__(
        self,
        temperature_K: float,
        false_alarms: float = FALSE_ALARMS,
        reference_temperature_K: float | None = None,
    ) -> None:
        super().__init__(temperature_K, false_alarms)
        if reference_temperature_K is not None:
            checks.number("reference_temperature_K", reference_temperature_K, above=0)
        self.reference_temperature_K = reference_temperature_K

    def heated(self, ratio: float) -> Self:
        hotter = super().heated(ratio)
        hotter.reference_temperature_K = self.reference_temperature_K or self.temperature_K
        return hotter

    @property
    def scale(self) -> float:
        """Standard deviations at the temperature of the simulation over those in the reference, at least 1."""
        return sqrt(max(1.0, self.temperature_K / (self.reference_temperature_K or self.temperature_K)))
