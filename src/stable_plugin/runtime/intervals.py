"""Confidence limits of counts: failures in a time at risk, and a fraction of replicas."""

from __future__ import annotations

from functools import lru_cache
from math import log

from scipy import stats

ERROR = 0.05
"""Error probability of all tests together."""

ALTERNATIVE = 0.1
"""Mean of a count, relative to the tested one, that a sequential test is made to find: smaller, and a test without events is
shorter, and one with events longer."""


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


def error_share(test: int) -> float:
    """Return the part of an error probability of 5 % that one of several tests may spend: 2/3 of what those before it left.

    By Boole's inequality there may be any number of tests, each with data of its own.

    Args:
        test: Number of the test, from one.
    """
    return ERROR * 2.0 / 3.0**test


def log_evidence(number: int, expected: float) -> float:
    r"""Return the logarithm of the evidence that events come more rarely than expected.

    The evidence is the likelihood ratio of a Poisson process of :math:`c = 0.1` times the rate and one of the rate itself,
    :math:`e^{(1 - c) \lambda} c^n` for :math:`n` events where :math:`\lambda` are expected. If the rate is at least the expected
    one, evidence of 1/α is reached with a probability of at most α, however often it is looked at, and also if the rate
    varies in time or with what happened before.

    Source: the sequential probability ratio test of Wald, Ann. Math. Stat. 16, 117 (1945), section 3; the inequality is
    Ville's.

    Args:
        number: Events up to now.
        expected: Mean of their number at the tested rate.
    """
    return (1.0 - ALTERNATIVE) * expected + number * log(ALTERNATIVE)


def sequential_limit(number: int, error: float) -> float:
    """Return the upper limit of the mean of a Poisson count that may be looked at while it grows.

    The limits at all times hold together with a probability of 1 - ``error``; a limit for one time that is fixed before is
    :func:`poisson_limits`. It is where :func:`log_evidence` is ``-log(error)``.

    Args:
        number: Events up to now.
        error: Probability that any of the limits is too small.
    """
    return -(log(error) + number * log(ALTERNATIVE)) / (1.0 - ALTERNATIVE)
