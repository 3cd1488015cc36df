"""Survival curve, median stable time and failure rate of replicas, with 95 % confidence intervals."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from stable_plugin.runtime import checks
from stable_plugin.runtime.intervals import binomial_limits, poisson_limits

CONFIDENCE = 0.95
_TAIL = (1.0 - CONFIDENCE) / 2.0
_PS_PER_NS = 1000.0

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class SurvivalCurve:
    """Fraction of replicas that are still stable, as a step function of time.

    Each value holds from its own time up to the next one; the last time is the end of the longest replica.

    Attributes:
        time_ps: Ascending times in ps, (n_times,); the first is 0.
        probability: Estimated fraction of stable replicas, (n_times,); the first is 1.
        low: Lower end of the pointwise 95 % confidence interval, (n_times,).
        high: Upper end of the interval, (n_times,).
    """

    time_ps: Floats
    probability: Floats
    low: Floats
    high: Floats

    def as_dict(self) -> dict[str, list[float]]:
        """Return the four arrays as lists, for JSON."""
        return {
            "time_ps": self.time_ps.tolist(),
            "probability": self.probability.tolist(),
            "low": self.low.tolist(),
            "high": self.high.tolist(),
        }


@dataclass(frozen=True)
class FailureRate:
    """Failures per ns of time at risk.

    Attributes:
        per_ns: Estimated rate in 1/ns.
        low: Lower end of the 95 % interval in 1/ns.
        high: Upper end in 1/ns.
    """

    per_ns: float
    low: float
    high: float


def kaplan_meier(times_ps: ArrayLike, failed: ArrayLike) -> SurvivalCurve:
    """Estimate the fraction of replicas that are still stable (Kaplan-Meier).

    The estimate and its log-log ("exponential Greenwood") interval, which stays within 0 and 1, are those of
    :func:`scipy.stats.ecdf`. The interval is undefined where no replica or every replica has failed: the exact
    binomial (Clopper-Pearson) bound of the replicas at risk is used there.

    Source: Kaplan and Meier, J. Am. Stat. Assoc. 53, 457 (1958).

    Args:
        times_ps: Time in ps at which each replica failed or its simulation ended, (n_replicas,).
        failed: Whether each replica failed, (n_replicas,); a replica that did not is censored at its time.

    Returns:
        The curve from 0 ps to the largest of ``times_ps``.

    Raises:
        ValueError: If there are no replicas, a time is negative or not finite, ``failed`` holds other values than
            true and false, or the lengths differ.
    """
    times = _checked_times(times_ps)
    events = _checked_flags(failed, len(times))
    survival = stats.ecdf(stats.CensoredData.right_censored(times, ~events)).sf
    probability = np.asarray(survival.probabilities, dtype=np.float64)
    low, high = _log_log_interval(survival, probability)

    grid = np.concatenate(([0.0], np.asarray(survival.quantiles, dtype=np.float64)))
    probability, low, high = (np.concatenate(([1.0], values)) for values in (probability, low, high))
    # Replicas at risk during the whole of each step, which ends where the next one starts.
    ends = np.append(grid[1:], grid[-1])
    at_risk = len(times) - np.searchsorted(np.sort(times), ends, side="left")
    for i in np.flatnonzero(probability == 1.0):
        low[i] = binomial_limits(int(at_risk[i]), int(at_risk[i]))[0]
    for i in np.flatnonzero(probability == 0.0):
        # The curve never rises, so the upper bound of the previous step still holds.
        high[i] = high[i - 1] if high[i - 1] < 1.0 else binomial_limits(0, int(at_risk[i]))[1]
    return SurvivalCurve(time_ps=grid, probability=probability, low=low, high=high)


def median_stable_ps(curve: SurvivalCurve) -> float | None:
    """Return the time after which half of the replicas have failed.

    Args:
        curve: Survival curve from :func:`kaplan_meier`.

    Returns:
        The first time in ps at which the curve is at or below one half; None if it stays above, so that the median is
        beyond the end of the curve.
    """
    # Products of fractions may miss 0.5 by rounding.
    reached = np.flatnonzero(curve.probability <= 0.5 + 1e-12)
    return float(curve.time_ps[reached[0]]) if len(reached) else None


def failure_rate_per_ns(n_failures: int, exposure_ps: float) -> FailureRate:
    """Divide the failures by the total time at risk, with the exact 95 % interval of a Poisson count.

    The interval is Garwood's: for a fixed exposure it covers the true rate in at least 95 % of cases. A single rate
    assumes a constant hazard; where failures cluster early or late, read the survival curve as well.

    Source: Garwood, Biometrika 28, 437 (1936).

    Args:
        n_failures: Number of replicas that failed.
        exposure_ps: Sum over the replicas of the time in ps at which each failed or its simulation ended.

    Returns:
        Rate and interval in 1/ns. Without failures the lower end is 0 and the upper end is finite.

    Raises:
        ValueError: If ``n_failures`` is not a non-negative integer or ``exposure_ps`` is not positive and finite.
    """
    number = checks.count("n_failures", _plain(n_failures), at_least=0, hint="Pass the number of failed replicas.")
    exposure = checks.number("exposure_ps", _plain(exposure_ps), above=0, hint="Sum the times of all replicas.")
    exposure_ns = exposure / _PS_PER_NS
    low, high = poisson_limits(number, _TAIL)
    return FailureRate(per_ns=number / exposure_ns, low=low / exposure_ns, high=high / exposure_ns)


def _log_log_interval(survival: Any, probability: Floats) -> tuple[Floats, Floats]:
    """Return scipy's interval where it is defined, and 0 and 1 elsewhere."""
    low, high = np.zeros_like(probability), np.ones_like(probability)
    inside = (probability > 0.0) & (probability < 1.0)
    if inside.any():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The confidence interval is undefined", RuntimeWarning)
            interval = survival.confidence_interval(CONFIDENCE, method="log-log")
        low[inside] = interval.low.probabilities[inside]
        high[inside] = interval.high.probabilities[inside]
    return low, high


def _plain(value: Any) -> Any:
    """Return the Python number of a NumPy scalar, and any other value unchanged."""
    return value.item() if isinstance(value, np.generic) else value


def _checked_times(times_ps: ArrayLike) -> Floats:
    times = np.asarray(times_ps, dtype=np.float64)
    if times.ndim != 1 or len(times) == 0:
        raise ValueError(f"times_ps has shape {times.shape}: pass one time for each of at least one replica.")
    bad = np.flatnonzero(~(np.isfinite(times) & (times >= 0.0)))
    if len(bad):
        raise ValueError(
            f"times_ps[{bad[0]}]={times[bad[0]]} is not a valid time: pass a finite number of ps >= 0. For a replica "
            "that did not fail, pass the time at which its simulation ended, and failed=False."
        )
    return times


def _checked_flags(failed: ArrayLike, n_replicas: int) -> NDArray[np.bool_]:
    flags = np.asarray(failed)
    if flags.shape != (n_replicas,):
        raise ValueError(
            f"failed has shape {flags.shape}, but times_ps has {n_replicas} values: pass one flag for each."
        )
    if not np.isin(flags, (0, 1)).all():
        raise ValueError(
            f"failed={flags.tolist()} holds values that are not flags: pass True for failed, False otherwise."
        )
    return flags.astype(bool)
