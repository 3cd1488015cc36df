"""Rates of rare failures by adaptive multilevel splitting."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import exp, inf, log, log1p, sqrt
from typing import Any, Protocol

import torch
from scipy import stats
from torch import Tensor

from stable_plugin.evaluation.survival import failure_rate_per_ns
from stable_plugin.runtime.intervals import binomial_limits

KILLED = 0.25
"""Fraction of the replicas that is replaced at a level. Cost times variance hardly depends on it; a batch gains from many."""


class Replicas(Protocol):
    """Replicas that can be advanced, copied and put back."""

    def advance(self, active: Tensor) -> list[float]:
        """Simulate up to the next check.

        Args:
            active: Replicas that move, (n_replicas,).

        Returns:
            Value of each replica then; infinite if it has failed.
        """

    def copy(self, rows: Sequence[int]) -> list[Any]:
        """Return the states of some replicas."""

    def put(self, rows: Sequence[int], states: Sequence[Any]) -> None:
        """Give some replicas other states."""


@dataclass(frozen=True)
class Run:
    """One run of the splitting method.

    Attributes:
        probability: Unbiased estimate of the probability that a replica fails.
        variance: Relative variance of the estimate if replicas were independent at each level.
        n_levels: Number of levels at which replicas were replaced.
        failures: Replicas that failed before any was replaced.
        checks_before: Checks of all replicas before any was replaced.
        checks: Checks of all replicas.
    """

    probability: float
    variance: float
    n_levels: int
    failures: int
    checks_before: int
    checks: int


class _Trajectory:
    """Highest value of a trajectory, and where each higher value than before was reached: level, check and state."""

    def __init__(self, rise: tuple[float, int, Any] = (-inf, 0, None)) -> None:
        self.highest, self.n_checks, _ = rise
        self.rises = [rise] if self.n_checks else []

    def forget(self, level: float) -> None:
        """Drop the states that no replica will start from, those at or below a level."""
        self.rises = self.rises[bisect_right(self.rises, level, key=lambda rise: rise[0]) :]


def split(replicas: Replicas, n_replicas: int, n_checks: int, generator: torch.Generator) -> Run:
    r"""Return an estimate of the probability that a replica fails within a number of checks.

    The level of a trajectory is its largest value so far. The trajectories with the lowest levels are replaced by copies of
    others, which continue with noise of their own from the first check at which they were above that level:

    .. math:: p = \prod_l \left( 1 - \frac{K_l}{N} \right) \frac{N_\mathrm{failed}}{N}

    =====================  =====================================================================
    Symbol                 Variable
    =====================  =====================================================================
    N                      ``n_replicas``
    level :math:`z_l`      ``level``, the k-th lowest of the highest values, k a quarter of N
    :math:`K_l`            ``len(lowest)``: trajectories that were never above the level, ties included
    p                      ``factor * failed / n_replicas``
    =====================  =====================================================================

    The estimate has no bias, also with ties, in discrete time and for any k. Its relative variance is at least
    :math:`\sum_l K_l / ((N - K_l) N)`, which is reached if the level tells how likely a failure is.

    Source: Cérou and Guyader, Stoch. Anal. Appl. 25, 417 (2007); Bréhier et al., Ann. Appl. Probab. 26, 3559 (2016).

    Args:
        replicas: The replicas at their start.
        n_replicas: Number N of replicas.
        n_checks: Checks within which failures count.
        generator: Chooses the trajectories to copy, on the CPU.
    """
    kth = max(1, int(KILLED * n_replicas)) - 1
    trajectories = [_Trajectory() for _ in range(n_replicas)]
    checks = checks_before = _simulate(replicas, trajectories, n_checks, kth)
    failures = sum(each.highest == inf for each in trajectories)
    factor, variance, n_levels = 1.0, 0.0, 0
    while (level := sorted(each.highest for each in trajectories)[kth]) < inf:
        lowest = [row for row, each in enumerate(trajectories) if each.highest <= level]
        others = [row for row, each in enumerate(trajectories) if each.highest > level]
        factor *= len(others) / n_replicas
        if not others:
            break
        variance += len(lowest) / (len(others) * n_replicas)
        n_levels += 1
        _replace(replicas, trajectories, lowest, others, level, generator)
        checks += _simulate(replicas, trajectories, n_checks, kth)
    failed = sum(each.highest == inf for each in trajectories)
    if factor > 0.0:
        variance += (n_replicas - failed) / (failed * n_replicas)
    return Run(factor * failed / n_replicas, variance, n_levels, failures, checks_before, checks)


def _simulate(replicas: Replicas, trajectories: Sequence[_Trajectory], n_checks: int, kth: int) -> int:
    """Simulate all replicas up to their failure or the last check; return the number of checks."""
    total = 0
    while rows := [row for row, each in enumerate(trajectories) if each.n_checks < n_checks and each.highest < inf]:
        active = torch.zeros(len(trajectories), dtype=torch.bool)
        active[rows] = True
        values = replicas.advance(active)
        total += len(rows)
        risen = []
        for row in rows:
            trajectories[row].n_checks += 1
            if values[row] > trajectories[row].highest:
                trajectories[row].highest = values[row]
                risen.append(row)
        for row, state in zip(risen, replicas.copy(risen), strict=True):
            trajectories[row].rises.append((values[row], trajectories[row].n_checks, state))
        # Levels only rise, so the next one is not below this.
        lower_bound = sorted(each.highest for each in trajectories)[kth]
        for each in trajectories:
            each.forget(lower_bound)
    return total


def _replace(
    replicas: Replicas,
    trajectories: list[_Trajectory],
    lowest: Sequence[int],
    others: Sequence[int],
    level: float,
    generator: torch.Generator,
) -> None:
    """Replace the lowest trajectories by copies of others, up to their first check above the level."""
    for each in trajectories:
        each.forget(level)
    chosen = torch.randint(len(others), (len(lowest),), generator=generator).tolist()
    rises = [trajectories[others[number]].rises[0] for number in chosen]
    for row, rise in zip(lowest, rises, strict=True):
        trajectories[row] = _Trajectory(rise)
    replicas.put(lowest, [state for _, _, state in rises])


@dataclass(frozen=True)
class SplittingEstimate:
    """Failure rate by splitting, averaged over the simulated time from the start frames.

    Attributes:
        failures_per_ns: Failure rate in 1/ns; None if no run has found a failure.
        interval: Ends of its 95 % interval in 1/ns.
        horizon_ps: Simulated time in ps.
        probabilities: Probability of a failure within this time by each independent run.
        n_levels: Levels at which replicas were replaced, in all runs.
        followed_ns: Simulated time of all replicas in ns.
    """

    failures_per_ns: float | None
    interval: tuple[float, float]
    horizon_ps: float
    probabilities: list[float]
    n_levels: int
    followed_ns: float

    def as_dict(self) -> dict[str, Any]:
        """Return the estimate for JSON."""
        return asdict(self)


def estimate(runs: Sequence[Run], n_replicas: int, n_checks: int, check_ps: float) -> SplittingEstimate:
    r"""Return the failure rate from independent runs.

    The rate is the hazard :math:`-\ln(1 - p) / T` of the mean probability p. Its interval is normal in :math:`\ln p`: from the
    spread of the runs by Student's t, and not narrower than for independent replicas at each level. If no replica had to be replaced,
    failures are counted. If a run has found none, the upper end is that of a count before any replica was replaced.

    Args:
        runs: The runs, at least two.
        n_replicas: Replicas of each run.
        n_checks: Checks within which failures count.
        check_ps: Time between two checks in ps.
    """
    horizon = n_checks * check_ps
    p = [run.probability for run in runs]
    mean = sum(p) / len(p)
    failures = sum(run.failures for run in runs)
    upper = binomial_limits(failures, len(runs) * n_replicas)[1]
    if all(run.n_levels == 0 and run.probability > 0.0 for run in runs):
        # Counted over the time at risk, which is exact where most replicas fail, too.
        counted = failure_rate_per_ns(failures, check_ps * sum(run.checks for run in runs))
        rate, interval = counted.per_ns, (counted.low, counted.high)
    elif min(p) > 0.0:
        factor = exp(_half_width(p, [run.variance for run in runs]))
        high = mean * factor if mean * factor < 1.0 else upper
        rate, interval = _per_ns(mean, horizon), (_per_ns(mean / factor, horizon), _per_ns(high, horizon))
    else:
        rate, interval = _per_ns(mean, horizon), (0.0, _per_ns(max(upper, mean), horizon))
    return SplittingEstimate(
        failures_per_ns=rate if mean > 0.0 else None,
        interval=interval,
        horizon_ps=horizon,
        probabilities=p,
        n_levels=sum(run.n_levels for run in runs),
        followed_ns=check_ps * sum(run.checks for run in runs) / 1000.0,
    )


def _half_width(probabilities: Sequence[float], variances: Sequence[float]) -> float:
    """Return half the width of the 95 % interval of the logarithm of the mean probability."""
    n_runs = len(probabilities)
    spread = float(torch.tensor([log(each) for each in probabilities], dtype=torch.float64).std())
    independent = sqrt(sum(variances) / n_runs)
    return max(float(stats.t.isf(0.025, n_runs - 1)) * spread, float(stats.norm.isf(0.025)) * independent) / sqrt(
        n_runs
    )


def _per_ns(probability: float, time_ps: float) -> float:
    return -1000.0 * log1p(-probability) / time_ps
