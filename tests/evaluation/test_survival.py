"""Survival curve, median and failure rate against hand-computed values, lifelines, and simulations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stable_plugin.evaluation.survival import (
    SurvivalCurve,
    failure_rate_per_ns,
    kaplan_meier,
    median_stable_ps,
)

# P(count = 0 | mean) = exp(-mean) = 0.025.
NO_EVENT_BOUND = -np.log(0.025)


def at(curve: SurvivalCurve, time_ps: float) -> float:
    """Return the step function at a time."""
    return float(curve.probability[np.searchsorted(curve.time_ps, time_ps, side="right") - 1])


def test_kaplan_meier_hand_computed_curve() -> None:
    # 6, 5, 3, 2 replicas at risk at the failures 1, 2, 3, 5; one is censored at 2, after the failure, and one at 6.
    curve = kaplan_meier([1.0, 2.0, 2.0, 3.0, 5.0, 6.0], [True, True, False, True, True, False])
    np.testing.assert_allclose(curve.time_ps, [0, 1, 2, 3, 5, 6])
    np.testing.assert_allclose(
        curve.probability, [1, 5 / 6, 5 / 6 * 4 / 5, 2 / 3 * 2 / 3, 4 / 9 * 1 / 2, 2 / 9], rtol=1e-14
    )


def test_kaplan_meier_hand_computed_interval() -> None:
    curve = kaplan_meier([1.0, 2.0, 2.0, 3.0, 5.0, 6.0], [True, True, False, True, True, False])
    probability = 4 / 9
    greenwood = 1 / (6 * 5) + 1 / (5 * 4) + 1 / (3 * 2)
    spread = 1.959963984540054 * np.sqrt(greenwood) / abs(np.log(probability))
    assert curve.low[3] == pytest.approx(probability ** np.exp(spread), rel=1e-12)
    assert curve.high[3] == pytest.approx(probability ** np.exp(-spread), rel=1e-12)


def test_kaplan_meier_uses_censoring() -> None:
    times = [0.5, 1.0, 1.0, 2.0]
    censored = kaplan_meier(times, [False, True, False, True])
    assert at(censored, 1.0) == pytest.approx(2 / 3)
    assert at(kaplan_meier(times, [True] * 4), 1.0) == pytest.approx(1 / 4)


def test_kaplan_meier_agrees_with_lifelines() -> None:
    lifelines = pytest.importorskip("lifelines")
    random = np.random.default_rng(3)
    times = np.round(random.exponential(1.0, 60), 2) + 0.01
    failed = random.random(60) < 0.7
    curve = kaplan_meier(times, failed)
    fitter = lifelines.KaplanMeierFitter().fit(times, failed)
    np.testing.assert_allclose(curve.time_ps, fitter.survival_function_.index)
    np.testing.assert_allclose(curve.probability, fitter.survival_function_["KM_estimate"], rtol=1e-10)
    inside = (curve.probability > 0) & (curve.probability < 1)
    peer = fitter.confidence_interval_survival_function_
    np.testing.assert_allclose(curve.low[inside], peer["KM_estimate_lower_0.95"][inside], rtol=1e-8)
    np.testing.assert_allclose(curve.high[inside], peer["KM_estimate_upper_0.95"][inside], rtol=1e-8)
    assert median_stable_ps(curve) == pytest.approx(fitter.median_survival_time_)


def test_kaplan_meier_without_failures() -> None:
    curve = kaplan_meier(np.full(32, 1.0), np.zeros(32, bool))
    np.testing.assert_array_equal(curve.probability, [1, 1])
    np.testing.assert_array_equal(curve.high, [1, 1])
    # Clopper-Pearson for 32 of 32.
    np.testing.assert_allclose(curve.low, 0.025 ** (1 / 32))
    assert median_stable_ps(curve) is None


def test_kaplan_meier_bound_uses_replicas_at_risk() -> None:
    curve = kaplan_meier([1.0, 1.0, 2.0], [False, False, False])
    np.testing.assert_allclose(curve.low, [0.025 ** (1 / 3), 0.025, 0.025])


def test_kaplan_meier_all_fail_at_once() -> None:
    curve = kaplan_meier([0.3] * 8, [True] * 8)
    np.testing.assert_allclose(curve.probability, [1, 0])
    assert curve.low[-1] == 0
    assert curve.high[-1] == pytest.approx(1 - 0.025 ** (1 / 8))
    assert median_stable_ps(curve) == pytest.approx(0.3)


def test_kaplan_meier_upper_bound_after_last_one() -> None:
    curve = kaplan_meier([1.0, 2.0, 3.0], [True, True, True])
    assert curve.probability[-1] == 0
    assert curve.high[-1] == curve.high[-2] < 1


def test_kaplan_meier_failure_at_time_zero() -> None:
    curve = kaplan_meier([0.0, 1.0], [True, False])
    np.testing.assert_array_equal(curve.time_ps, [0, 0, 1])
    np.testing.assert_array_equal(curve.probability, [1, 0.5, 0.5])
    assert median_stable_ps(curve) == 0.0


def test_kaplan_meier_interval_encloses_curve() -> None:
    random = np.random.default_rng(0)
    for n_replicas in (1, 2, 7, 40):
        curve = kaplan_meier(random.exponential(1.0, n_replicas), random.random(n_replicas) < 0.6)
        assert (curve.low >= 0).all() and (curve.high <= 1).all()
        assert (curve.low <= curve.probability).all() and (curve.probability <= curve.high).all()
        assert (np.diff(curve.probability) <= 0).all()


def test_median_stable_ps_values() -> None:
    assert median_stable_ps(kaplan_meier([1, 2, 3, 4], [1, 1, 1, 1])) == 2.0
    assert median_stable_ps(kaplan_meier([1, 2, 2, 2], [1, 0, 0, 0])) is None
    # The last replica fails when no other one is at risk: (4/5) * 0.
    assert median_stable_ps(kaplan_meier([1, 2, 2, 2, 3], [1, 0, 0, 0, 1])) == 3.0


def test_median_stable_ps_tolerates_rounding() -> None:
    probability = np.array([1.0, 0.5 + 1e-15])
    assert median_stable_ps(SurvivalCurve(np.array([0.0, 1.0]), probability, probability, probability)) == 1.0


def test_kaplan_meier_interval_coverage() -> None:
    random = np.random.default_rng(11)
    truth, trials, hits = np.exp(-0.5), 1500, 0
    for _ in range(trials):
        lifetime, end = random.exponential(1.0, 32), random.uniform(0.3, 1.5, 32)
        curve = kaplan_meier(np.minimum(lifetime, end), lifetime <= end)
        index = np.searchsorted(curve.time_ps, 0.5, side="right") - 1
        hits += curve.low[index] <= truth <= curve.high[index]
    # Nominal 0.95, standard error 0.006.
    assert 0.93 < hits / trials < 0.975


def test_failure_rate_without_failures() -> None:
    rate = failure_rate_per_ns(0, 32.0)
    assert (rate.per_ns, rate.low) == (0.0, 0.0)
    assert rate.high == pytest.approx(NO_EVENT_BOUND / 0.032, rel=1e-12)
    assert failure_rate_per_ns(0, 1000.0).high == pytest.approx(3.689, abs=5e-4)


def test_failure_rate_with_one_failure() -> None:
    rate = failure_rate_per_ns(1, 1000.0)
    # P(count >= 1 | low) = 1 - exp(-low) = 0.025.
    assert rate.low == pytest.approx(-np.log(0.975), rel=1e-10)
    # P(count <= 1 | high) = exp(-high) (1 + high) = 0.025.
    assert np.exp(-rate.high) * (1 + rate.high) == pytest.approx(0.025, rel=1e-9)


@pytest.mark.parametrize(("count", "low", "high"), [(2, 0.2422, 7.2247), (10, 4.7954, 18.3904), (27, 17.7932, 39.2836)])
def test_failure_rate_agrees_with_printed_tables(count: int, low: float, high: float) -> None:
    rate = failure_rate_per_ns(count, 1000.0)
    assert rate.per_ns == pytest.approx(count)
    assert (rate.low, rate.high) == pytest.approx((low, high), abs=6e-5)


def test_failure_rate_scales_with_exposure() -> None:
    once, twice = failure_rate_per_ns(5, 20.0), failure_rate_per_ns(5, 40.0)
    doubled = (2 * twice.per_ns, 2 * twice.low, 2 * twice.high)
    assert (once.per_ns, once.low, once.high) == pytest.approx(doubled)
    assert once.per_ns == pytest.approx(250.0)


def coverage(mean_count: float, narrowed: float = 1.0) -> float:
    """Return the fraction of simulated counts whose interval, scaled by ``narrowed``, contains the true rate."""
    random = np.random.default_rng(7)
    counts, repeats = np.unique(random.poisson(mean_count, 40_000), return_counts=True)
    hits = 0
    for count, repeat in zip(counts, repeats, strict=True):
        rate = failure_rate_per_ns(int(count), 1000.0)
        low = rate.per_ns - narrowed * (rate.per_ns - rate.low)
        high = rate.per_ns + narrowed * (rate.high - rate.per_ns)
        hits += repeat * (low <= mean_count <= high)
    return hits / 40_000


@pytest.mark.parametrize("mean_count", [0.5, 2.0, 6.3, 20.0])
def test_failure_rate_interval_coverage(mean_count: float) -> None:
    # An exact interval covers at least the nominal 0.95 (standard error 0.001), and not much more.
    assert 0.947 < coverage(mean_count) < 0.995


def test_coverage_detects_a_narrow_interval() -> None:
    assert coverage(20.0, narrowed=0.8) < 0.93


def test_failure_rate_coverage_random_exposure() -> None:
    # The exposure is random here, so the coverage is only approximately nominal.
    random = np.random.default_rng(5)
    true_per_ns, trials, hits = 1500.0, 4000, 0
    for _ in range(trials):
        lifetime_ps = random.exponential(1000.0 / true_per_ns, 32)
        rate = failure_rate_per_ns(int((lifetime_ps <= 1.0).sum()), np.minimum(lifetime_ps, 1.0).sum())
        hits += rate.low <= true_per_ns <= rate.high
    assert 0.94 < hits / trials < 0.985


@pytest.mark.parametrize(
    ("times", "failed", "message"),
    [
        ([], [], r"times_ps has shape \(0,\): pass one time"),
        ([[1.0]], [[True]], r"times_ps has shape \(1, 1\)"),
        ([1.0, -0.5], [True, True], r"times_ps\[1\]=-0\.5 .* >= 0"),
        ([np.nan], [True], r"times_ps\[0\]=nan .* finite"),
        ([1.0, np.inf], [True, False], r"times_ps\[1\]=inf .* time at which its simulation ended"),
        ([1.0, 2.0], [True], r"failed has shape \(1,\), but times_ps has 2 values: pass one flag"),
        ([1.0], [0.5], r"failed=\[0\.5\] holds values that are not flags: pass True"),
    ],
)
def test_kaplan_meier_names_invalid_samples(times: Any, failed: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kaplan_meier(times, failed)


@pytest.mark.parametrize(
    ("count", "exposure", "message"),
    [
        (-1, 1.0, "n_failures=-1 .* >= 0"),
        (1.5, 1.0, r"n_failures=1\.5 .* integer"),
        (1, 0.0, r"exposure_ps=0\.0 .* > 0"),
        (1, float("nan"), "exposure_ps=nan .* finite"),
        (1, float("inf"), "exposure_ps=inf .* finite"),
    ],
)
def test_failure_rate_names_invalid_arguments(count: Any, exposure: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        failure_rate_per_ns(count, exposure)


def test_failure_rate_accepts_numpy_scalars() -> None:
    assert failure_rate_per_ns(np.int64(3), np.float32(10.0)) == failure_rate_per_ns(3, 10.0)  # type: ignore[arg-type]


def test_survival_curve_as_dict() -> None:
    form = kaplan_meier([1.0, 2.0], [True, False]).as_dict()
    assert form["time_ps"] == [0.0, 1.0, 2.0] and form["probability"] == [1.0, 0.5, 0.5]
    assert all(type(value) is float for values in form.values() for value in values)
