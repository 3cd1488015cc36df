"""Verdict on the stability of a potential, from the failures and the time that replicas were followed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from stable_plugin.evaluation.formatting import number
from stable_plugin.evaluation.survival import failure_rate_per_ns

MAX_FAILURES_PER_NS = 1.0
"""Failure rate that a potential may have by default."""

State = Literal["holds", "fails", "not known"]
Method = Literal["direct", "splitting"]


@dataclass(frozen=True)
class StabilityVerdict:
    """Whether the failure rate of a potential is below what was asked for.

    Attributes:
        state: ``"holds"`` if the upper end of the 95 % interval of the failure rate is at most what was asked for, ``"fails"`` if
            the lower end is above it, ``"not known"`` otherwise.
        failures: Number of replicas that failed.
        followed_ns: Time that the replicas were followed, each up to its failure, summed, in ns.
        failures_per_ns: Failure rate in 1/ns; None if splitting has found no failure.
        interval: Ends of its 95 % interval in 1/ns.
        max_failures_per_ns: Failure rate that was asked for, in 1/ns.
        further_ns: Time in ns to follow replicas for longer until the verdict is known, if they fail at the same rate; None
            if it is known, or by splitting.
        watched: What the replicas were watched by.
        method: How the rate and its interval were found: by counting these failures, or by splitting.
    """

    state: State
    failures: int
    followed_ns: float
    failures_per_ns: float | None
    interval: tuple[float, float]
    max_failures_per_ns: float
    further_ns: float | None
    watched: str
    method: Method = "direct"

    def as_dict(self) -> dict[str, Any]:
        """Return the verdict for JSON."""
        return asdict(self)


def judge(
    failures: int, followed_ps: float, watched: str, max_failures_per_ns: float = MAX_FAILURES_PER_NS
) -> StabilityVerdict:
    """Return the verdict on a potential.

    Args:
        failures: Number of replicas that failed.
        followed_ps: Time that the replicas were followed, each up to its failure, summed, in ps.
        watched: What they were watched by.
        max_failures_per_ns: Failure rate that the potential may have, in 1/ns.
    """
    rate = failure_rate_per_ns(failures, followed_ps)
    state = _state(rate.low, rate.high, max_failures_per_ns)
    return StabilityVerdict(
        state=state,
        failures=failures,
        followed_ns=followed_ps / 1000.0,
        failures_per_ns=rate.per_ns,
        interval=(rate.low, rate.high),
        max_failures_per_ns=max_failures_per_ns,
        further_ns=_further_ps(failures, followed_ps, max_failures_per_ns) / 1000.0 if state == "not known" else None,
        watched=watched,
    )


def judge_by_splitting(
    counted: Mapping[str, Any], failures_per_ns: float | None, interval: tuple[float, float]
) -> dict[str, Any]:
    """Return the verdict by a failure rate from splitting, for JSON.

    Args:
        counted: Verdict on the replicas that were simulated directly, see :meth:`StabilityVerdict.as_dict`.
        failures_per_ns: Failure rate in 1/ns; None if no failure was found.
        interval: Ends of its 95 % interval in 1/ns.
    """
    return {
        **counted,
        "state": _state(*interval, counted["max_failures_per_ns"]),
        "failures_per_ns": failures_per_ns,
        "interval": interval,
        "further_ns": None,
        "method": "splitting",
    }


def sentence(verdict: Mapping[str, Any]) -> str:
    """Return the verdict in words.

    Args:
        verdict: See :meth:`StabilityVerdict.as_dict`.
    """
    if verdict.get("method") == "splitting":
        more = "; pass more replicas" if verdict["state"] == "not known" else ""
        asked = f"{number(verdict['max_failures_per_ns'])} per ns asked for"
        return f"{verdict['state'].capitalize()}: {splitting_rate(verdict)} by splitting ({asked}){more}."
    low, high = verdict["interval"]
    count = verdict["failures"]
    seen = f"{count or 'no'} {'failure' if count == 1 else 'failures'} in {_time(verdict['followed_ns'])}"
    asked = f"{number(verdict['max_failures_per_ns'])} per ns"
    rate = f"{number(verdict['failures_per_ns'])} per ns, 95 % interval {number(low)} to {number(high)}"
    if verdict["state"] == "holds":
        return f"Holds: {seen}, so fewer than {number(high)} per ns with 95 % confidence ({asked} asked for)."
    if verdict["state"] == "fails":
        return f"Fails: {seen} ({rate}; {asked} asked for)."
    bound = f"at most {number(high)} per ns with 95 % confidence" if count == 0 else rate
    side = "above" if count and verdict["failures_per_ns"] > verdict["max_failures_per_ns"] else "below"
    provided = "at this rate" if count else "without a failure"
    more = f"another {_time(verdict['further_ns'])} {provided} would show that it is {side} {asked}"
    return f"Not known: {seen} ({bound}); {more}."


def splitting_rate(found: Mapping[str, Any]) -> str:
    """Return a failure rate from splitting with its interval; without failures, the upper bound.

    Args:
        found: With ``failures_per_ns`` and ``interval`` in 1/ns.
    """
    low, high = found["interval"]
    if found["failures_per_ns"] is None:
        return f"no failure found, at most {number(high)} per ns (95 %)"
    return f"{number(found['failures_per_ns'])} failures per ns (95 %: {number(low)} to {number(high)})"


def _time(time_ns: float) -> str:
    return f"{number(1000.0 * time_ns)} ps" if time_ns < 1.0 else f"{number(time_ns)} ns"


def _state(low: float, high: float, max_failures_per_ns: float) -> State:
    if high <= max_failures_per_ns:
        return "holds"
    return "fails" if low > max_failures_per_ns else "not known"


def _further_ps(failures: int, followed_ps: float, max_failures_per_ns: float) -> float:
    """Return how much longer to follow the replicas, in ps, to a precision of 10 %."""
    factor = 1.1
    while factor < 1e6:
        rate = failure_rate_per_ns(int(failures * factor), followed_ps * factor)
        if _state(rate.low, rate.high, max_failures_per_ns) != "not known":
            break
        factor *= 1.1
    return followed_ps * (factor - 1.0)
