"""Exact confidence limits of counts: failures in a time at risk, and a fraction of replicas."""

from __future__ import annotations

from functools import lru_cache

from scipy import stats

ERROR = 0.05
"""Error probability of all looks together."""

LATER_LOOKS = 0.1
"""Fraction of a test's error that is left for the looks after each one."""


@lru_cache(maxsize=1024)
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


def look_error(test: int, look: int = 1) -> float:
    """Return the part of an error probability of 5 % that is spent on one look at the data of one test.

    Test t = 1, 2, 3, ... gets 0.05 / (t (t + 1)), which sums to 0.05. Within it, look k gets a fraction of
    0.9 * 0.1^(k - 1), which sums to one.

    Source: error spending of Lan and DeMets, Biometrika 70, 659 (1983). By Boole's inequality the tests may be as many as
    they like if each has data of its own.

    Args:
        test: Number of the test, from one.
        look: Number of the look at its data, from one.
    """
    return ERROR / (test * (test + 1)) * (1.0 - LATER_LOOKS) * LATER_LOOKS ** (look - 1)
