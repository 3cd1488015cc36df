"""Verdict on a failure rate, against the interval of a Poisson count."""

import pytest
from scipy import stats

from stable_plugin.evaluation.verdict import judge, sentence


def upper(failures, followed_ns):
    """Return the upper end of Garwood's 95 % interval."""
    return stats.gamma.isf(0.025, failures + 1) / followed_ns


@pytest.mark.parametrize(
    ("failures", "followed_ns", "asked", "state"),
    [
        (0, 0.032, 1.0, "not known"),
        (0, 3.6, 1.0, "not known"),
        (0, 3.7, 1.0, "holds"),
        (1, 3.7, 1.0, "not known"),
        (3, 0.3, 1.0, "fails"),
        (1, 0.3, 1.0, "not known"),
        (5, 100.0, 1.0, "holds"),
        (0, 0.32, 12.0, "holds"),
    ],
)
def test_verdict_follows_the_interval(failures, followed_ns, asked, state):
    verdict = judge(failures, 1000.0 * followed_ns, "bonds", asked)
    assert verdict.state == state
    assert verdict.failures_per_ns == pytest.approx(failures / followed_ns)
    assert verdict.interval[1] == pytest.approx(upper(failures, followed_ns))
    assert (verdict.further_ns is None) == (state != "not known")
    assert sentence(verdict.as_dict()).lower().startswith(state)


def test_verdict_tells_how_long_it_takes_to_know():
    verdict = judge(0, 32.0, "bonds", 1.0)
    total = verdict.followed_ns + verdict.further_ns
    assert total == pytest.approx(3.69, rel=0.1)
    assert judge(0, 1000.0 * total, "bonds", 1.0).state == "holds"
    text = sentence(verdict.as_dict())
    assert text.startswith("Not known: no failures in 32 ps (at most 115 per ns with 95 % confidence); another 3.")
    assert text.endswith(" ns without a failure would show that it is below 1 per ns.")


@pytest.mark.parametrize(("failures", "followed_ns", "side"), [(1, 0.1, "above"), (2, 4.0, "below")])
def test_verdict_tells_what_the_same_rate_would_show(failures, followed_ns, side):
    verdict = judge(failures, 1000.0 * followed_ns, "bonds", 1.0)
    assert sentence(verdict.as_dict()).endswith(f" at this rate would show that it is {side} 1 per ns.")
    factor = 1.0 + verdict.further_ns / followed_ns
    later = judge(int(failures * factor + 1e-6), 1000.0 * followed_ns * factor, "bonds", 1.0)
    assert later.state == ("fails" if side == "above" else "holds")


def test_verdict_never_reads_zero_alone():
    for followed_ps in (1.0, 100.0, 1e5):
        assert "per ns with 95 % confidence" in sentence(judge(0, followed_ps, "bonds").as_dict())
