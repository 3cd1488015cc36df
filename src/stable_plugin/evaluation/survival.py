"""How long replicas stay stable: survival curve, median stable time and failure rate, with 95 % intervals."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from stable_plugin.runtime import checks

CONFIDENCE = 0.95
_TAIL = (1.0 - CONFIDENCE) / 2.0
_PS_PER_NS = 1000.0

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class SurvivalCurve:
    """Share of replicas still stable, a step function of time.

    Each value holds from its own time up to the next one; the last time is the end of the longest replica.

    Attributes:
        time_ps: Ascending times in ps, (n_times,); the first is 0.
        probability: Estimated share still stable, (n_times,); the first is 1.
        low: Lower end of the pointwise 95 % confidence interval, (n_times,).
        high: Upper end, (n_times,).
    """

    time_ps: Floats
    probability: Floats
    low: Floats
    high: Floats

    def as_dict(self) -> dict[str, list[float]]:
        """The four arrays as lists, ready for JSON."""
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
        per_ns: Estimate in 1/ns.
        low: Lower end of the 95 % interval in 1/ns.
        high: Upper end in 1/ns.
    """

    per_ns: float
    low: float
    high: float


def kaplan_meier(times_ps: ArrayLike, failed: ArrayLike) -> SurvivalCurve:
    """Kaplan-Meier estimate of the share of replicas that are still stable.

    The estimate is that of :func:`scipy.stats.ecdf`, its interval the log-log ("exponential Greenwood") one,
    which stays inside 0 and 1. That interval does not exist where no replica or every replica has failed:
    there the exact binomial (Clopper-Pearson) bound of the replicas still followed stands in for it.

    Source: Kaplan and Meier, J. Am. Stat. Assoc. 53, 457 (1958).

    Args:
        times_ps: Time in ps until each replica failed, or until it was no longer followed, (n_replicas,).
        failed: Whether it failed, (n_replicas,); a replica that did not is censored at its time.

    Returns:
        The curve from 0 ps to the largest of ``times_ps``.

    Raises:
        ValueError: If there are no replicas, a time is negative or not finite, ``failed`` is not made of true
            and false, or the lengths differ.
    """
    times = _checked_times(times_ps)
    events = _checked_flags(failed, len(times))
    sample = stats.CensoredData.right_censored(times, ~events)
    survival = stats.ecdf(sample).sf
    steps = np.asarray(survival.quantiles, dtype=np.float64)
    share = np.asarray(survival.probabilities, dtype=np.float64)
    low, high = np.zeros_like(share), np.ones_like(share)
    inside = (share > 0.0) & (share < 1.0)
    if inside.any():
        with warnings.catch_warnings():
            # Undefined where the share is 0 or 1; those ends are filled below.
            warnings.filterwarnings("ignore", "The confidence interval is undefined", RuntimeWarning)
            interval = survival.confidence_interval(CONFIDENCE, method="log-log")
        low[inside] = interval.low.probabilities[inside]
        high[inside] = interval.high.probabilities[inside]

    grid = np.concatenate(([0.0], steps))
    share, low, high = (np.concatenate(([1.0], values)) for values in (share, low, high))
    # A step ends where the next one starts: so many replicas were followed all through it.
    ends = np.append(grid[1:], grid[-1])
    followed = len(times) - np.searchsorted(np.sort(times), ends, side="left")
    for i in np.flatnonzero(share == 1.0):
        low[i] = _share_bounds(followed[i], followed[i])[0]
    for i in np.flatnonzero(share == 0.0):
        # The curve only falls, so a bound that held just before still holds.
        high[i] = high[i - 1] if high[i - 1] < 1.0 else _share_bounds(0, followed[i])[1]
    return SurvivalCurve(time_ps=grid, probability=share, low=low, high=high)


def median_stable_ps(curve: SurvivalCurve) -> float | None:
    """Time after which half of the replicas have failed.

    Args:
        curve: From :func:`kaplan_meier`.

    Returns:
        The first time in ps at which the curve is at or below one half; None if it never is: then the median is
        only known to be later than the end of the curve.
    """
    # Products of exact fractions miss 0.5 by rounding.
    reached = np.flatnonzero(curve.probability <= 0.5 + 1e-12)
    return float(curve.time_ps[reached[0]]) if len(reached) else None


def failure_rate_per_ns(n_failures: int, exposure_ps: float) -> FailureRate:
    """Failures divided by the total time at risk, with the exact 95 % interval of a Poisson count.

    The interval is Garwood's: over a fixed exposure it covers the true rate in at least 95 % of cases. A single
    rate takes the hazard as constant; where failures come early or late, read the survival curve as well.

    Source: Garwood, Biometrika 28, 437 (1936).

    Args:
        n_failures: Replicas that failed.
        exposure_ps: Sum over the replicas of the time in ps until each failed or was no longer followed.

    Returns:
        Rate and interval in 1/ns. Zero failures give a low end of 0 and a finite high end.

    Raises:
        ValueError: If the number is not a non-negative integer or the exposure is not positive and finite.
    """
    number = checks.count("n_failures", _plain(n_failures), at_least=0, hint="It is how many replicas failed.")
    exposure = checks.number("exposure_ps", _plain(exposure_ps), above=0, hint="Sum the times of all replicas.")
    exposure_ns = exposure / _PS_PER_NS
    low = float(stats.chi2.ppf(_TAIL, 2 * number)) / 2.0 if number else 0.0
    high = float(stats.chi2.ppf(1.0 - _TAIL, 2 * (number + 1))) / 2.0
    return FailureRate(per_ns=number / exposure_ns, low=low / exposure_ns, high=high / exposure_ns)


def _share_bounds(survivors: int, replicas: int) -> tuple[float, float]:
    """Clopper-Pearson interval of a share."""
    interval = stats.binomtest(int(survivors), int(replicas)).proportion_ci(CONFIDENCE, method="exact")
    return float(interval.low), float(interval.high)


def _plain(value: Any) -> Any:
    """A NumPy scalar as the Python number it holds; anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def _checked_times(times_ps: ArrayLike) -> Floats:
    times = np.asarray(times_ps, dtype=np.float64)
    if times.ndim != 1 or len(times) == 0:
        raise ValueError(f"times_ps has shape {times.shape}: give one time for each of at least one replica.")
    bad = np.flatnonzero(~(np.isfinite(times) & (times >= 0.0)))
    if len(bad):
        raise ValueError(
            f"times_ps[{bad[0]}]={times[bad[0]]} is not a time: give a finite number of ps >= 0. A replica that "
            "never failed has the time until which it was followed, and failed=False."
        )
    return times


def _checked_flags(failed: ArrayLike, n_replicas: int) -> NDArray[np.bool_]:
    flags = np.asarray(failed)
    if flags.shape != (n_replicas,):
        raise ValueError(
            f"failed has shape {flags.shape}, but times_ps has {n_replicas} values: give one flag for each."
        )
    if not np.isin(flags, (0, 1)).all():
        raise ValueError(f"failed={flags.tolist()} is not made of flags: give True for failed, else False.")
    return flags.astype(bool)
