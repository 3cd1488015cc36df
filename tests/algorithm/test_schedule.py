"""The state machine of training, transition by transition."""

import json
from dataclasses import asdict
from math import inf

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import anything, check_argument_is_named, few, fractions

from stable_plugin import Schedule
from stable_plugin.algorithm.schedule import PhaseTracker


def learning(**settings):
    """Return a tracker that has just entered the learning phase."""
    tracker = PhaseTracker(Schedule(**settings))
    assert tracker.after_simulation_window(1.0, 0.1) == "learn"
    return tracker


def test_tracker_starts_with_a_simulation():
    tracker = PhaseTracker()
    assert (tracker.phase, tracker.stable_ps, tracker.learning_windows) == ("simulate", 0.0, 0)
    assert (tracker.lr_factor, tracker.lr_cuts) == (1.0, 0)
    assert (tracker._smallest_fraction, tracker._windows_without_progress) == (inf, 0)


def test_simulation_below_maximum_continues():
    tracker = PhaseTracker(Schedule(max_unstable_fraction=0.5, min_unstable_fraction=0.1, stable_ps=2.0))
    assert tracker.after_simulation_window(0.0, 0.4) == "simulate"
    assert tracker.after_simulation_window(0.49, 0.4) == "simulate"
    assert tracker.stable_ps == pytest.approx(0.8)


@pytest.mark.parametrize("fraction", [0.5, 0.7, 1.0])
def test_simulation_at_maximum_ends_at_once(fraction):
    tracker = PhaseTracker(Schedule(max_unstable_fraction=0.5, stable_ps=2.0))
    assert tracker.after_simulation_window(fraction, 0.4) == "learn"


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, "done"), (0.1, "done"), (0.11, "learn"), (0.5, "learn")])
def test_simulation_is_done_only_at_minimum(fraction, expected):
    tracker = PhaseTracker(Schedule(max_unstable_fraction=0.5, min_unstable_fraction=0.1, stable_ps=0.8))
    assert tracker.after_simulation_window(0.0, 0.4) == "simulate"
    assert tracker.after_simulation_window(fraction, 0.4) == expected


def test_stable_time_tolerates_rounding_errors():
    tracker = PhaseTracker(Schedule(stable_ps=1.0))
    assert [tracker.after_simulation_window(0.0, 0.1) for _ in range(10)] == ["simulate"] * 9 + ["done"]
    assert tracker.stable_ps < 1.0


@pytest.mark.parametrize(
    ("fraction", "expected"), [(0.0, "simulate"), (0.1, "simulate"), (0.2, "learn"), (1.0, "learn")]
)
def test_learning_ends_at_minimum(fraction, expected):
    tracker = learning(min_unstable_fraction=0.1, stable_ps=9.0)
    assert tracker.after_learning_window(fraction) == expected
    assert tracker.learning_windows == 1


def test_stable_time_restarts_after_learning():
    tracker = learning(stable_ps=0.4)
    assert tracker.after_learning_window(0.0) == "simulate"
    assert tracker.stable_ps == 0.0
    assert tracker.after_simulation_window(0.0, 0.2) == "simulate"
    assert tracker.after_simulation_window(0.0, 0.2) == "done"


def test_lr_factor_stays_while_learning_progresses():
    tracker = learning(lr_patience=2)
    for fraction in (0.9, 0.8, 0.85, 0.7, 0.75, 0.6):
        assert tracker.after_learning_window(fraction) == "learn"
    assert tracker.lr_factor == 1.0


def test_lr_factor_is_cut_without_progress():
    tracker = learning(lr_patience=3, lr_cut=0.2, max_lr_cuts=2)
    factors, phases = [], []
    for _ in range(10):
        phases.append(tracker.after_learning_window(0.5))
        factors.append(tracker.lr_factor)
    # The first window sets the smallest fraction; each third window after it that is not below costs a cut.
    assert factors[:9] == pytest.approx([1, 1, 1, 0.2, 0.2, 0.2, 0.04, 0.04, 0.04])
    assert phases == ["learn"] * 9 + ["simulate"]


def test_equal_fraction_counts_as_no_progress():
    tracker = learning(lr_patience=1, max_lr_cuts=5)
    tracker.after_learning_window(0.5)
    tracker.after_learning_window(0.5)
    assert tracker.lr_cuts == 1
    tracker.after_learning_window(0.49)
    assert tracker.lr_cuts == 1


def test_learning_without_cuts_ends_at_the_first():
    tracker = learning(lr_patience=2, max_lr_cuts=0)
    assert [tracker.after_learning_window(0.5) for _ in range(3)] == ["learn", "learn", "simulate"]
    assert tracker.lr_factor == 1.0


def test_each_learning_phase_resets_cuts_and_progress():
    tracker = learning(lr_patience=1, max_lr_cuts=1)
    for _ in range(3):
        tracker.after_learning_window(0.4)
    assert tracker.phase == "simulate"
    assert tracker.after_simulation_window(1.0, 0.1) == "learn"
    assert tracker.lr_factor == 1.0
    # Above the smallest fraction of the phase before, but the first one of this phase.
    tracker.after_learning_window(0.9)
    assert tracker.lr_cuts == 0
    assert tracker.learning_windows == 4


@pytest.mark.parametrize("fraction", [0.0, 0.9])
def test_max_windows_ends_training(fraction):
    tracker = learning(max_windows=3)
    assert [tracker.after_learning_window(each) for each in (0.9, 0.9, fraction)] == ["learn", "learn", "done"]


def test_max_windows_counts_all_learning_phases():
    tracker = learning(max_windows=2)
    assert tracker.after_learning_window(0.0) == "simulate"
    assert tracker.after_simulation_window(1.0, 0.1) == "learn"
    assert tracker.after_learning_window(0.9) == "done"


def random_course(tracker, n_windows, generator):
    """Return the states after windows with random unstable fractions."""
    course = []
    for _ in range(n_windows):
        fraction = torch.rand((), generator=generator).item()
        if tracker.phase == "simulate":
            tracker.after_simulation_window(fraction, 0.1)
        elif tracker.phase == "learn":
            tracker.after_learning_window(fraction)
        course.append((tracker.phase, tracker.stable_ps, tracker.lr_factor, tracker.learning_windows))
    return course


@pytest.mark.parametrize("saved_after", [0, 3, 7, 20])
def test_state_dict_resumes_the_same_course(saved_after):
    schedule = Schedule(
        max_unstable_fraction=0.6, min_unstable_fraction=0.05, stable_ps=0.5, lr_patience=2, max_lr_cuts=1
    )
    generator = torch.Generator().manual_seed(3)
    tracker = PhaseTracker(schedule)
    random_course(tracker, saved_after, generator)
    saved, saved_random = json.loads(json.dumps(tracker.state_dict())), generator.get_state()
    expected = random_course(tracker, 40, generator)
    assert len({entry[0] for entry in expected}) > 1

    resumed = PhaseTracker(schedule)
    resumed.load_state_dict(saved)
    generator.set_state(saved_random)
    assert random_course(resumed, 40, generator) == expected
    assert resumed.schedule is schedule


def test_state_dict_holds_plain_values():
    state = PhaseTracker().state_dict()
    assert "schedule" not in state
    assert state["_smallest_fraction"] == inf
    assert all(isinstance(value, (str, int, float)) for value in state.values())


@st.composite
def schedules(draw):
    maximum = draw(st.floats(0.01, 1.0))
    return Schedule(
        max_unstable_fraction=maximum,
        min_unstable_fraction=draw(st.floats(0.0, 0.99)) * maximum,
        stable_ps=draw(st.floats(0.1, 3.0)),
        lr_patience=draw(st.integers(1, 4)),
        lr_cut=draw(st.floats(0.01, 1.0)),
        max_lr_cuts=draw(st.integers(0, 3)),
        max_windows=draw(st.none() | st.integers(1, 12)),
    )


def step(phases, fraction):
    if phases.phase == "simulate":
        return phases.after_simulation_window(fraction, 0.4)
    return phases.after_learning_window(fraction)


@settings(few, max_examples=100)
@given(schedules(), st.lists(fractions, min_size=1, max_size=40))
def test_phases_end_and_limit_the_cuts(schedule, outcomes):
    phases, stable = PhaseTracker(schedule), 0.0
    for fraction in outcomes:
        was = phases.phase
        after = step(phases, fraction)
        assert phases.lr_cuts <= schedule.max_lr_cuts
        assert schedule.lr_cut**schedule.max_lr_cuts * (1 - 1e-9) <= phases.lr_factor <= 1.0
        used_up = schedule.max_windows is not None and phases.learning_windows >= schedule.max_windows
        if was == "simulate":
            stable += 0.4
            assert (after == "learn") if fraction >= schedule.max_unstable_fraction else True
            if after == "done":
                assert fraction <= schedule.min_unstable_fraction and stable >= schedule.stable_ps * (1 - 1e-6)
        else:
            assert (after == "done") == used_up
            if not used_up and fraction <= schedule.min_unstable_fraction:
                assert after == "simulate"
        if after != "simulate":
            stable = 0.0
        if after == "done":
            break
    # Training ends if all further windows are stable.
    for _ in range(50 if phases.phase != "done" else 0):
        if step(phases, 0.0) == "done":
            break
    assert phases.phase == "done"


@few
@given(schedules(), st.lists(fractions, max_size=20), st.lists(fractions, min_size=1, max_size=20))
def test_load_state_dict_continues_any_course(schedule, before, after):
    whole = PhaseTracker(schedule)
    for fraction in before:
        if whole.phase != "done":
            step(whole, fraction)
    resumed = PhaseTracker(schedule)
    resumed.load_state_dict(whole.state_dict())
    for fraction in after:
        if whole.phase != "done":
            assert step(whole, fraction) == step(resumed, fraction)
    assert asdict(whole) == asdict(resumed)


@pytest.mark.parametrize(
    "name",
    [
        "max_unstable_fraction",
        "min_unstable_fraction",
        "stable_ps",
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
    check_argument_is_named(Schedule, name, value, also="min_unstable_fraction")
