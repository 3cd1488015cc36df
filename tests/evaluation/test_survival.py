"""Survival curve, median and failure rate against hand-computed values, closed forms and simulated truth."""

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
    """The step function at a time."""
    return float(curve.probability[np.searchsorted(curve.time_ps, time_ps, side="right") - 1])


def test_hand_computed_curve_with_censoring() -> None:
    # At risk 6, 5, 3, 2 at the failures 1, 2, 3, 5; one replica leaves at 2, after the failure there, one at 6.
    curve = kaplan_meier([1.0, 2.0, 2.0, 3.0, 5.0, 6.0], [True, True, False, True, True, False])
    np.testing.assert_allclose(curve.time_ps, [0, 1, 2, 3, 5, 6])
    np.testing.assert_allclose(
        curve.probability, [1, 5 / 6, 5 / 6 * 4 / 5, 2 / 3 * 2 / 3, 4 / 9 * 1 / 2, 2 / 9], rtol=1e-14
    )


def test_hand_computed_interval() -> None:
    curve = kaplan_meier([1.0, 2.0, 2.0, 3.0, 5.0, 6.0], [True, True, False, True, True, False])
    share = 4 / 9
    greenwood = 1 / (6 * 5) + 1 / (5 * 4) + 1 / (3 * 2)
    spread = 1.959963984540054 * np.sqrt(greenwood) / abs(np.log(share))
    assert curve.low[3] == pytest.approx(share ** np.exp(spread), rel=1e-12)
    assert curve.high[3] == pytest.approx(share ** np.exp(-spread), rel=1e-12)


def test_ignoring_the_censoring_would_give_another_curve() -> None:
    times = [0.5, 1.0, 1.0, 2.0]
    censored = kaplan_meier(times, [False, True, False, True])
    assert at(censored, 1.0) == pytest.approx(2 / 3)
    assert at(kaplan_meier(times, [True] * 4), 1.0) == pytest.approx(1 / 4)


def test_agrees_with_lifelines() -> None:
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


def test_no_failure_still_has_a_lower_bound() -> None:
    curve = kaplan_meier(np.full(32, 1.0), np.zeros(32, bool))
    np.testing.assert_array_equal(curve.probability, [1, 1])
    np.testing.assert_array_equal(curve.high, [1, 1])
    # Clopper-Pearson for 32 of 32.
    np.testing.assert_allclose(curve.low, 0.025 ** (1 / 32))
    assert median_stable_ps(curve) is None


def test_lower_bound_counts_only_replicas_still_followed() -> None:
    curve = kaplan_meier([1.0, 1.0, 2.0], [False, False, False])
    np.testing.assert_allclose(curve.low, [0.025 ** (1 / 3), 0.025, 0.025])


def test_all_failing_at_once_still_has_an_upper_bound() -> None:
    curve = kaplan_meier([0.3] * 8, [True] * 8)
    np.testing.assert_allclose(curve.probability, [1, 0])
    assert curve.low[-1] == 0
    assert curve.high[-1] == pytest.approx(1 - 0.025 ** (1 / 8))
    assert median_stable_ps(curve) == pytest.approx(0.3)


def test_upper_bound_is_carried_to_the_last_failure() -> None:
    curve = kaplan_meier([1.0, 2.0, 3.0], [True, True, True])
    assert curve.probability[-1] == 0
    assert curve.high[-1] == curve.high[-2] < 1


def test_failure_in_the_first_frame() -> None:
    curve = kaplan_meier([0.0, 1.0], [True, False])
    np.testing.assert_array_equal(curve.time_ps, [0, 0, 1])
    np.testing.assert_array_equal(curve.probability, [1, 0.5, 0.5])
    assert median_stable_ps(curve) == 0.0


def test_interval_encloses_the_curve() -> None:
    random = np.random.default_rng(0)
    for n_replicas in (1, 2, 7, 40):
        curve = kaplan_meier(random.exponential(1.0, n_replicas), random.random(n_replicas) < 0.6)
        assert (curve.low >= 0).all() and (curve.high <= 1).all()
        assert (curve.low <= curve.probability).all() and (curve.probability <= curve.high).all()
        assert (np.diff(curve.probability) <= 0).all()


def test_median() -> None:
    assert median_stable_ps(kaplan_meier([1, 2, 3, 4], [1, 1, 1, 1])) == 2.0
    assert median_stable_ps(kaplan_meier([1, 2, 2, 2], [1, 0, 0, 0])) is None
    # The last replica fails alone, long after four of five were censored: (4/5) * 0.
    assert median_stable_ps(kaplan_meier([1, 2, 2, 2, 3], [1, 0, 0, 0, 1])) == 3.0


def test_median_forgives_rounding() -> None:
    share = np.array([1.0, 0.5 + 1e-15])
    assert median_stable_ps(SurvivalCurve(np.array([0.0, 1.0]), share, share, share)) == 1.0


def test_pointwise_interval_covers_the_true_survival() -> None:
    random = np.random.default_rng(11)
    truth, trials, hits = np.exp(-0.5), 1500, 0
    for _ in range(trials):
        lifetime, end = random.exponential(1.0, 32), random.uniform(0.3, 1.5, 32)
        curve = kaplan_meier(np.minimum(lifetime, end), lifetime <= end)
        index = np.searchsorted(curve.time_ps, 0.5, side="right") - 1
        hits += curve.low[index] <= truth <= curve.high[index]
    # Nominal 0.95, standard error 0.006.
    assert 0.93 < hits / trials < 0.975


def test_rate_without_failures() -> None:
    rate = failure_rate_per_ns(0, 32.0)
    assert (rate.per_ns, rate.low) == (0.0, 0.0)
    assert rate.high == pytest.approx(NO_EVENT_BOUND / 0.032, rel=1e-12)
    assert failure_rate_per_ns(0, 1000.0).high == pytest.approx(3.689, abs=5e-4)


def test_rate_with_one_failure() -> None:
    rate = failure_rate_per_ns(1, 1000.0)
    # P(count >= 1 | low) = 1 - exp(-low) = 0.025.
    assert rate.low == pytest.approx(-np.log(0.975), rel=1e-10)
    # P(count <= 1 | high) = exp(-high) (1 + high) = 0.025.
    assert np.exp(-rate.high) * (1 + rate.high) == pytest.approx(0.025, rel=1e-9)


@pytest.mark.parametrize(("count", "low", "high"), [(2, 0.2422, 7.2247), (10, 4.7954, 18.3904), (27, 17.7932, 39.2836)])
def test_rate_agrees_with_printed_tables(count: int, low: float, high: float) -> None:
    rate = failure_rate_per_ns(count, 1000.0)
    assert rate.per_ns == pytest.approx(count)
    assert (rate.low, rate.high) == pytest.approx((low, high), abs=6e-5)


def test_rate_scales_with_exposure() -> None:
    once, twice = failure_rate_per_ns(5, 20.0), failure_rate_per_ns(5, 40.0)
    doubled = (2 * twice.per_ns, 2 * twice.low, 2 * twice.high)
    assert (once.per_ns, once.low, once.high) == pytest.approx(doubled)
    assert once.per_ns == pytest.approx(250.0)


def coverage(mean_count: float, narrowed: float = 1.0) -> float:
    """Share of simulated counts whose interval, its ends pulled in by a factor, holds the true rate."""
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
def test_rate_interval_covers_a_poisson_count(mean_count: float) -> None:
    # Exact means never below the nominal 0.95 (standard error 0.001); nor may it be wide for nothing.
    assert 0.947 < coverage(mean_count) < 0.995


def test_coverage_test_would_notice_a_narrow_interval() -> None:
    assert coverage(20.0, narrowed=0.8) < 0.93


def test_rate_interval_covers_replicas_followed_to_their_failure() -> None:
    # Here the exposure is random: close to nominal is what can be asked for.
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
        ([], [], r"times_ps has shape \(0,\): give one time"),
        ([[1.0]], [[True]], r"times_ps has shape \(1, 1\)"),
        ([1.0, -0.5], [True, True], r"times_ps\[1\]=-0\.5 .* >= 0"),
        ([np.nan], [True], r"times_ps\[0\]=nan .* finite"),
        ([1.0, np.inf], [True, False], r"times_ps\[1\]=inf .* until which it was followed"),
        ([1.0, 2.0], [True], r"failed has shape \(1,\), but times_ps has 2 values: give one flag"),
        ([1.0], [0.5], r"failed=\[0\.5\] is not made of flags: give True"),
    ],
)
def test_bad_samples_are_named(times: Any, failed: Any, message: str) -> None:
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
def test_bad_rates_are_named(count: Any, exposure: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        failure_rate_per_ns(count, exposure)


def test_numpy_scalars_are_welcome() -> None:
    assert failure_rate_per_ns(np.int64(3), np.float32(10.0)) == failure_rate_per_ns(3, 10.0)  # type: ignore[arg-type]


def test_json_form() -> None:
    form = kaplan_meier([1.0, 2.0], [True, False]).as_dict()
    assert form["time_ps"] == [0.0, 1.0, 2.0] and form["probability"] == [1.0, 0.5, 0.5]
    assert all(type(value) is float for values in form.values() for value in values)
