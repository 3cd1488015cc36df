"""The state machine of training, transition by transition, and what a passed verification is worth."""

import json
from dataclasses import asdict
from math import inf, log

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import anything, check_argument_is_named, few

from stable_plugin import Schedule
from stable_plugin.algorithm.schedule import PhaseTracker
from stable_plugin.runtime.intervals import error_share

WINDOW_PS = 10.0
"""Time at risk of a window of all replicas."""


def schedule(**changes):
    """Return a schedule of which one window may have one failure: 100 per ns, 10 ps at risk."""
    return Schedule(**{"max_failures_per_ns": 100.0, **changes})


def probed(tracker, failures, n_replicas=10):
    return tracker.after_probe(failures, WINDOW_PS, failures / n_replicas)


def learned(tracker, n_windows):
    """Go through learning windows; return the phase after each."""
    phases = []
    for _ in range(n_windows):
        tracker.after_learning_window()
        phases.append(tracker.after_learning_steps())
    return phases


def verifying(**changes):
    """Return a tracker that has just passed a probe."""
    tracker = PhaseTracker(schedule(**changes))
    assert probed(tracker, 0) == "verify"
    return tracker


def test_tracker_starts_with_a_probe():
    tracker = PhaseTracker()
    assert (tracker.phase, tracker.exposure_ps, tracker.learning_windows) == ("probe", 0.0, 0)
    assert (tracker.lr_factor, tracker.lr_cuts, tracker.bound_per_ns) == (1.0, 0, inf)


@pytest.mark.parametrize(("failures", "phase"), [(0, "verify"), (1, "verify"), (2, "learn"), (10, "learn")])
def test_probe_compares_the_rate_with_the_one_asked_for(failures, phase):
    tracker = PhaseTracker(schedule())
    assert probed(tracker, failures) == phase
    assert tracker.verifications == (phase == "verify")


@pytest.mark.parametrize(
    ("most", "loss", "phase"),
    [(None, 100.0, "verify"), (1.0, 0.5, "verify"), (1.0, 1.5, "learn"), (1.0, float("nan"), "learn")],
)
def test_probe_compares_the_observables_with_what_was_asked_for(most, loss, phase):
    tracker = PhaseTracker(schedule(max_observable_loss=most))
    assert tracker.after_probe(0, WINDOW_PS, 0.0, loss) == phase


def test_a_smaller_loss_of_observables_is_progress():
    tracker = PhaseTracker(schedule(max_observable_loss=1.0, lr_patience=2, probe_every=1))
    tracker.after_probe(0, WINDOW_PS, 0.0, 9.0)
    factors = []
    for loss in (8.0, 7.0, 8.0, 6.0, 7.0, 7.0):
        learned(tracker, 1)
        assert tracker.after_probe(0, WINDOW_PS, 0.0, loss) == "learn"
        factors.append(tracker.lr_factor)
    assert factors == pytest.approx([1, 1, 1, 1, 1, 0.2])


def test_probe_bounds_the_rate():
    tracker = PhaseTracker(schedule())
    probed(tracker, 4)
    # The rate k at which exp(0.9 k t) / 10^4 is 30, for an error of 0.05 * 2 / 3.
    assert tracker.bound_per_ns == pytest.approx(log(30.0 * 10**4) / 0.9 / 0.01)


def test_learning_is_probed_every_few_windows():
    tracker = PhaseTracker(schedule(probe_every=3))
    probed(tracker, 9)
    assert tracker.after_learning_steps() == "learn", "nothing was learned yet"
    assert learned(tracker, 3) == ["learn", "learn", "probe"]
    assert tracker.after_learning_steps() == "probe", "asked again after an interruption"
    assert probed(tracker, 9) == "learn"
    assert learned(tracker, 3) == ["learn", "learn", "probe"]
    assert tracker.learning_windows == 6


def test_verification_without_failures_takes_the_planned_time():
    tracker = verifying()
    # exp(0.9 * rate * time) = 30: 37.8 ps at 100 per ns.
    assert tracker.remaining_ps == pytest.approx(10.0 * log(30.0) / 0.9)
    phases = [tracker.after_verification_window(0, WINDOW_PS) for _ in range(4)]
    assert phases == ["verify"] * 3 + ["done"]
    assert tracker.is_verified
    assert tracker.bound_per_ns == pytest.approx(25.0 * log(30.0) / 0.9) and tracker.bound_per_ns < 100.0


def test_verification_time_tolerates_rounding_errors():
    tracker = verifying(max_failures_per_ns=100.0 * log(30.0) / 0.9)
    assert [tracker.after_verification_window(0, 0.1) for _ in range(100)] == ["verify"] * 99 + ["done"]


def test_verification_does_not_use_the_probe():
    tracker = PhaseTracker(schedule())
    assert probed(tracker, 1) == "verify"
    assert (tracker.failures, tracker.exposure_ps) == (0, 0.0)


def test_verification_goes_on_after_a_failure():
    tracker = verifying()
    assert tracker.after_verification_window(1, WINDOW_PS) == "verify"
    # A failure takes a factor of ten from the evidence, which its 25.6 ps give back.
    assert tracker.remaining_ps == pytest.approx(10.0 * log(300.0) / 0.9 - WINDOW_PS)
    phases = [tracker.after_verification_window(0, WINDOW_PS) for _ in range(6)]
    assert phases == ["verify"] * 5 + ["done"]


def test_verification_with_many_failures_ends_at_once():
    tracker = verifying()
    assert tracker.after_verification_window(2, WINDOW_PS) == "learn"
    assert not tracker.is_verified


def test_each_verification_has_less_error():
    tracker = verifying(probe_every=1)
    for number in range(2, 5):
        assert tracker.after_verification_window(9, WINDOW_PS) == "learn"
        assert learned(tracker, 1) == ["probe"]
        assert probed(tracker, 0) == "verify"
        assert tracker.verifications == number
        assert tracker.remaining_ps == pytest.approx(10.0 * log(10.0 * 3**number) / 0.9)


def test_errors_of_all_verifications_sum_to_5_percent():
    assert sum(error_share(test) for test in range(1, 100)) == pytest.approx(0.05)
    assert error_share(1) == pytest.approx(1 / 30)


@pytest.mark.parametrize(("factor", "most"), [(1.0, 0.05), (1.5, 0.01)])
def test_failing_potential_rarely_passes(factor, most):
    """Failures at a constant rate, and learning that changes nothing: 40 cycles, each may verify."""
    random, passed, n_runs = np.random.default_rng(0), 0, 1000
    for _ in range(n_runs):
        tracker = PhaseTracker(schedule(probe_every=1))
        for _ in range(40):
            while tracker.phase in ("probe", "verify"):
                failures = int(random.poisson(factor))
                if tracker.phase == "probe":
                    probed(tracker, failures)
                else:
                    tracker.after_verification_window(failures, WINDOW_PS)
            if tracker.phase == "done":
                passed += 1
                break
            learned(tracker, 1)
    assert passed <= most * n_runs


def verify(random, expected, most=1000):
    """Return the outcome of one verification with so many failures expected in a window, and its windows."""
    tracker, n_windows = verifying(), 0
    while tracker.phase == "verify" and n_windows < most:
        n_windows += 1
        tracker.after_verification_window(int(random.poisson(expected)), WINDOW_PS)
    return tracker.is_verified, n_windows


@pytest.mark.parametrize(
    ("expected", "passing", "windows"), [(0.1, (0.97, 1.0), 5.5), (0.3, (0.65, 0.85), 9.0), (1.0, (0.0, 1 / 30), 5.0)]
)
def test_verification_tells_rates_apart_in_little_time(expected, passing, windows):
    """One failure is expected in a window at the rate asked for: 100 per ns, 10 ps."""
    random = np.random.default_rng(2)
    outcomes = [verify(random, expected) for _ in range(1000)]
    fraction, mean = np.mean(outcomes, axis=0)
    error = 3.0 * np.sqrt(fraction * (1 - fraction) / 1000)
    assert passing[0] - error <= fraction <= passing[1] + error
    assert mean < windows


@pytest.mark.parametrize("factor", [0.0, 0.1])
def test_stable_potential_passes_soon(factor):
    random, windows = np.random.default_rng(1), []
    for _ in range(300):
        tracker, n_windows = PhaseTracker(schedule(probe_every=1)), 0
        while tracker.phase != "done":
            n_windows += 1
            if tracker.phase == "learn":
                learned(tracker, 1)
            elif tracker.phase == "probe":
                probed(tracker, int(random.poisson(factor)))
            else:
                tracker.after_verification_window(int(random.poisson(factor)), WINDOW_PS)
        windows.append(n_windows)
    assert np.median(windows) == 5
    assert max(windows) < 60


def failing_probes(tracker, counts):
    """Go through cycles of learning windows and failing probes; return the factors of the learning rate."""
    factors = []
    for failures in counts:
        learned(tracker, tracker.schedule.probe_every)
        assert probed(tracker, failures) == "learn"
        factors.append(tracker.lr_factor)
    return factors


def test_lr_factor_stays_while_probes_improve():
    tracker = PhaseTracker(schedule(lr_patience=2, probe_every=1))
    probed(tracker, 10)
    assert failing_probes(tracker, [9, 8, 9, 7, 8, 6]) == [1.0] * 6


def test_lr_factor_is_cut_without_progress():
    tracker = PhaseTracker(schedule(lr_patience=4, probe_every=2, lr_cut=0.2, max_lr_cuts=2))
    probed(tracker, 5)
    factors = failing_probes(tracker, [5] * 7)
    # Two probes, of four learning windows, that are not better cost a cut; the third cut starts over.
    assert factors == pytest.approx([1, 0.2, 0.2, 0.04, 0.04, 1, 1])


def test_passed_probe_ends_the_learning_phase():
    tracker = PhaseTracker(schedule(lr_patience=1, probe_every=1))
    probed(tracker, 5)
    assert failing_probes(tracker, [5]) == [0.2]
    learned(tracker, 1)
    assert probed(tracker, 0) == "verify"
    assert tracker.after_verification_window(5, WINDOW_PS) == "learn"
    # Above the smallest fraction of the phase before, but the first one of this phase.
    assert tracker.lr_factor == 1.0
    assert failing_probes(tracker, [9]) == [1.0]


def test_min_windows_are_learned_from_although_no_probe_fails():
    tracker = PhaseTracker(schedule(min_windows=5, probe_every=3))
    phases = [tracker.after_probe(0, 12.8, 0.0)]
    while phases[-1] != "verify":
        tracker.after_learning_window(0, 12.8)
        phases.append(tracker.after_learning_steps())
        if phases[-1] == "probe":
            phases.append(tracker.after_probe(0, 12.8, 0.0))
    # The first two windows without failures bring no probe forward, the last one does.
    assert phases == ["learn", "learn", "learn", "probe", "learn", "learn", "probe", "verify"]


def test_min_windows_fit_into_max_windows():
    with pytest.raises(ValueError, match="min_windows=3 is more than max_windows=2: raise max_windows"):
        Schedule(min_windows=3, max_windows=2)


@pytest.mark.parametrize(("failures", "phase"), [(9, "done"), (0, "verify")])
def test_max_windows_ends_with_a_probe(failures, phase):
    tracker = PhaseTracker(schedule(max_windows=4, probe_every=3))
    probed(tracker, 9)
    assert learned(tracker, 3) == ["learn", "learn", "probe"]
    probed(tracker, 9)
    assert learned(tracker, 1) == ["probe"]
    assert probed(tracker, failures) == phase
    assert not tracker.is_verified


@pytest.mark.parametrize(("failures", "is_verified"), [(0, True), (9, False)])
def test_max_windows_allows_a_last_verification(failures, is_verified):
    tracker = PhaseTracker(schedule(max_windows=1))
    probed(tracker, 9)
    learned(tracker, 1)
    probed(tracker, 0)
    while tracker.phase != "done":
        tracker.after_verification_window(failures, WINDOW_PS)
    assert tracker.is_verified == is_verified
    assert (tracker.bound_per_ns < 100.0) == is_verified
    assert tracker.learning_windows == 1


def test_expected_windows_count_probes_and_verification():
    # 10 learning windows, 5 probes, and 37.9 ps of 12.8 ps.
    assert Schedule().expected_windows(0.4, 32) == 10 + 5 + 3
    assert Schedule(max_windows=3, probe_every=1).expected_windows(0.4, 32) == 3 + 4 + 3


@st.composite
def schedules(draw):
    return Schedule(
        max_failures_per_ns=draw(st.floats(20.0, 1000.0)),
        probe_every=draw(st.integers(1, 4)),
        lr_patience=draw(st.integers(1, 4)),
        lr_cut=draw(st.floats(0.01, 1.0)),
        max_lr_cuts=draw(st.integers(0, 3)),
        max_windows=draw(st.none() | st.integers(1, 12)),
    )


counts = st.integers(0, 10)


def step(tracker, failures):
    if tracker.phase == "probe":
        return probed(tracker, failures)
    if tracker.phase == "verify":
        return tracker.after_verification_window(failures, WINDOW_PS)
    tracker.after_learning_window()
    return tracker.after_learning_steps()


@settings(few, max_examples=100)
@given(schedules(), st.lists(counts, min_size=1, max_size=40))
def test_phases_end_and_limit_the_cuts(schedule, outcomes):
    tracker = PhaseTracker(schedule)
    for failures in outcomes:
        was = tracker.phase
        after = step(tracker, failures)
        assert tracker.lr_cuts <= schedule.max_lr_cuts
        assert schedule.lr_cut**schedule.max_lr_cuts * (1 - 1e-9) <= tracker.lr_factor <= 1.0
        used_up = schedule.max_windows is not None and tracker.learning_windows >= schedule.max_windows
        assert was != "learn" or after in ("learn", "probe")
        assert after != "learn" or not used_up
        if after == "done":
            assert used_up or tracker.is_verified
            assert tracker.is_verified == (was == "verify" and tracker.bound_per_ns <= schedule.max_failures_per_ns)
            break
    # Training ends if all further windows are stable.
    for _ in range(500 if tracker.phase != "done" else 0):
        if step(tracker, 0) == "done":
            break
    assert tracker.phase == "done"


@few
@given(schedules(), st.lists(counts, max_size=20), st.lists(counts, min_size=1, max_size=20))
def test_load_state_dict_continues_any_course(schedule, before, after):
    whole = PhaseTracker(schedule)
    for failures in before:
        if whole.phase != "done":
            step(whole, failures)
    resumed = PhaseTracker(schedule)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for failures in after:
        if whole.phase != "done":
            assert step(whole, failures) == step(resumed, failures)
    assert asdict(whole) == asdict(resumed)
    assert resumed.schedule is schedule


def test_state_dict_holds_plain_values():
    state = PhaseTracker().state_dict()
    assert "schedule" not in state
    assert state["_smallest_fraction"] == inf
    assert all(isinstance(value, (str, int, float)) for value in state.values())


@pytest.mark.parametrize(
    "name",
    [
        "max_failures_per_ns",
        "max_observable_loss",
        "probe_every",
        "lr_patience",
        "lr_cut",
        "max_lr_cuts",
        "max_windows",
    ],
)
@settings(few, max_examples=15)
@given(value=anything)
@example(value=float("nan"))
@example(value=10**30)
@example(value="1")
def test_schedule_names_any_invalid_argument(name, value):
    check_argument_is_named(Schedule, name, value)


def test_few_failures_end_learning_until_a_verification_has_failed():
    tracker = PhaseTracker(Schedule(max_failures_per_ns=100.0, probe_every=3))
    assert tracker.after_probe(5, 10.0, 0.5) == "learn"
    tracker.after_learning_window(3, 10.0)
    assert tracker.after_learning_steps() == "learn", "300 failures per ns"
    tracker.after_learning_window(0, 10.0)
    assert tracker.after_learning_steps() == "probe"
    assert tracker.after_probe(0, 10.0, 0.0) == "verify"
    assert tracker.after_verification_window(10, 10.0) == "learn"
    phases = []
    for _ in range(3):
        tracker.after_learning_window(0, 10.0)
        phases.append(tracker.after_learning_steps())
    assert phases == ["learn", "learn", "probe"]
