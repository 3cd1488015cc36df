"""Exact confidence limits of counts: failures in a time at risk, and a fraction of replicas."""

from __future__ import annotations

from scipy import stats


def poisson_limits(number: int, tail: float) -> tuple[float, float]:
    """Return the exact lower and upper limit of the mean of a Poisson count, each missed with probability ``tail``.

    Source: Garwood, Biometrika 28, 437 (1936).

    Args:
        number: The count.
        tail: Probability that the mean is beyond one of the limits.
    """
    low = float(stats.chi2.ppf(tail, 2 * number)) / 2.0 if number else 0.0
    return low, float(stats.chi2.ppf(1.0 - tail, 2 * (number + 1))) / 2.0


def binomial_limits(number: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the exact two-sided interval of a fraction.

    Source: Clopper and Pearson, Biometrika 26, 404 (1934).

    Args:
        number: How many of ``total`` have the property.
        total: How many there are, at least one.
        confidence: Confidence of the interval.
    """
    interval = stats.binomtest(number, total).proportion_ci(confidence, method="exact")
    return float(interval.low), float(interval.high)


def look_error(look: int, error: float = 0.05) -> float:
    """Return the part of an error probability that is spent on one of any number of looks at data.

    Look k = 1, 2, 3, ... gets ``error`` / (k (k + 1)); all of them together spend ``error``.

    Source: error spending of Lan and DeMets, Biometrika 70, 659 (1983), with a series that sums to one, so that by Boole's
    inequality the looks may be as many, and the data as dependent, as they like.

    Args:
        look: Number of the look, from one.
        error: Error probability of all looks together.
    """
    return error / (look * (look + 1))
