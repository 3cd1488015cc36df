"""The state machine of training, transition by transition."""

import json
from dataclasses import asdict
from math import inf, isinf

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import anything, check_argument_is_named, few, fractions

from stable_plugin import Schedule
from stable_plugin.algorithm.schedule import PhaseTracker


def learning(**settings):
    """PhaseTracker that have just begun to learn."""
    phases = PhaseTracker(Schedule(**settings))
    assert phases.after_simulation_window(1.0, 0.1) == "learn"
    return phases


def test_training_begins_with_a_simulation_at_the_full_learning_rate():
    phases = PhaseTracker()
    assert (phases.phase, phases.stable_ps, phases.lr_factor, phases.learning_windows) == ("simulate", 0.0, 1.0, 0)
    assert isinf(phases._best_share)


def test_a_simulation_goes_on_below_the_trigger_and_adds_up_its_time():
    phases = PhaseTracker(Schedule(max_unstable_fraction=0.5, min_unstable_fraction=0.1, stable_ps=2.0))
    assert phases.after_simulation_window(0.0, 0.4) == "simulate"
    assert phases.after_simulation_window(0.49, 0.4) == "simulate"
    assert phases.stable_ps == pytest.approx(0.8)


@pytest.mark.parametrize("share", [0.5, 0.7, 1.0])
def test_the_trigger_ends_a_simulation_at_once(share):
    phases = PhaseTracker(Schedule(max_unstable_fraction=0.5, stable_ps=2.0))
    assert phases.after_simulation_window(share, 0.4) == "learn"


@pytest.mark.parametrize(("share", "expected"), [(0.0, "done"), (0.1, "done"), (0.11, "learn"), (0.5, "learn")])
def test_the_end_of_the_time_asked_for_is_the_end_only_at_or_below_the_floor(share, expected):
    phases = PhaseTracker(Schedule(max_unstable_fraction=0.5, min_unstable_fraction=0.1, stable_ps=0.8))
    assert phases.after_simulation_window(0.0, 0.4) == "simulate"
    assert phases.after_simulation_window(share, 0.4) == expected


def test_times_that_add_up_with_rounding_errors_are_over_in_time():
    phases = PhaseTracker(Schedule(stable_ps=1.0))
    assert [phases.after_simulation_window(0.0, 0.1) for _ in range(10)] == ["simulate"] * 9 + ["done"]
    assert phases.stable_ps < 1.0


@pytest.mark.parametrize(("share", "expected"), [(0.0, "simulate"), (0.1, "simulate"), (0.2, "learn"), (1.0, "learn")])
def test_learning_ends_at_the_floor(share, expected):
    phases = learning(min_unstable_fraction=0.1, stable_ps=9.0)
    assert phases.after_learning_window(share) == expected
    assert phases.learning_windows == 1


def test_after_learning_the_time_is_counted_from_zero():
    phases = learning(stable_ps=0.4)
    assert phases.after_learning_window(0.0) == "simulate"
    assert phases.stable_ps == 0.0
    assert phases.after_simulation_window(0.0, 0.2) == "simulate"
    assert phases.after_simulation_window(0.0, 0.2) == "done"


def test_progress_keeps_the_learning_rate():
    phases = learning(lr_patience=2)
    for share in (0.9, 0.8, 0.85, 0.7, 0.75, 0.6):
        assert phases.after_learning_window(share) == "learn"
    assert phases.lr_factor == 1.0


def test_windows_without_progress_cut_the_learning_rate_and_finally_end_learning():
    phases = learning(lr_patience=3, lr_cut=0.2, max_lr_cuts=2)
    factors, names = [], []
    for _ in range(10):
        names.append(phases.after_learning_window(0.5))
        factors.append(phases.lr_factor)
    # The first window sets the mark; each third after it that does not beat it costs a cut.
    assert factors[:9] == pytest.approx([1, 1, 1, 0.2, 0.2, 0.2, 0.04, 0.04, 0.04])
    assert names == ["learn"] * 9 + ["simulate"]


def test_an_equal_share_is_no_progress():
    phases = learning(lr_patience=1, max_lr_cuts=5)
    phases.after_learning_window(0.5)
    phases.after_learning_window(0.5)
    assert phases.lr_cuts == 1
    phases.after_learning_window(0.49)
    assert phases.lr_cuts == 1


def test_without_cuts_learning_ends_when_the_first_would_be_due():
    phases = learning(lr_patience=2, max_lr_cuts=0)
    assert [phases.after_learning_window(0.5) for _ in range(3)] == ["learn", "learn", "simulate"]
    assert phases.lr_factor == 1.0


def test_a_new_learning_phase_begins_at_the_full_rate_and_without_a_mark():
    phases = learning(lr_patience=1, max_lr_cuts=1)
    for _ in range(3):
        phases.after_learning_window(0.4)
    assert phases.phase == "simulate"
    assert phases.after_simulation_window(1.0, 0.1) == "learn"
    assert phases.lr_factor == 1.0
    # Worse than the mark of the phase before, and yet the first of this one.
    phases.after_learning_window(0.9)
    assert phases.lr_cuts == 0
    assert phases.learning_windows == 4


@pytest.mark.parametrize("share", [0.0, 0.9])
def test_training_ends_after_the_learning_windows_allowed(share):
    phases = learning(max_windows=3)
    shares = [0.9, 0.9, share]
    assert [phases.after_learning_window(value) for value in shares] == ["learn", "learn", "done"]


def test_the_limit_of_learning_windows_counts_all_phases():
    phases = learning(max_windows=2)
    assert phases.after_learning_window(0.0) == "simulate"
    assert phases.after_simulation_window(1.0, 0.1) == "learn"
    assert phases.after_learning_window(0.9) == "done"


def random_course(phases, n_windows, generator):
    """What happens over windows with random outcomes."""
    course = []
    for _ in range(n_windows):
        share = torch.rand((), generator=generator).item()
        if phases.phase == "simulate":
            phases.after_simulation_window(share, 0.1)
        elif phases.phase == "learn":
            phases.after_learning_window(share)
        course.append((phases.phase, phases.stable_ps, phases.lr_factor, phases.learning_windows))
    return course


@pytest.mark.parametrize("saved_after", [0, 3, 7, 20])
def test_a_saved_state_goes_on_as_if_nothing_had_happened(saved_after):
    schedule = Schedule(
        max_unstable_fraction=0.6, min_unstable_fraction=0.05, stable_ps=0.5, lr_patience=2, max_lr_cuts=1
    )
    generator = torch.Generator().manual_seed(3)
    phases = PhaseTracker(schedule)
    random_course(phases, saved_after, generator)
    saved, at = json.loads(json.dumps(phases.state_dict())), generator.get_state()
    expected = random_course(phases, 40, generator)
    assert len({entry[0] for entry in expected}) > 1

    resumed = PhaseTracker(schedule)
    resumed.load_state_dict(saved)
    generator.set_state(at)
    assert random_course(resumed, 40, generator) == expected
    assert resumed.schedule is schedule


def test_the_state_holds_numbers_only():
    state = PhaseTracker().state_dict()
    assert "schedule" not in state
    assert state["_best_share"] == inf
    assert all(isinstance(value, (str, int, float)) for value in state.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_unstable_fraction": 0.0}, r"max_unstable_fraction=0\.0 is out of range.*> 0 and <= 1"),
        ({"max_unstable_fraction": 1.5}, r"max_unstable_fraction=1\.5"),
        ({"max_unstable_fraction": float("nan")}, r"max_unstable_fraction=nan"),
        ({"min_unstable_fraction": -0.1}, r"min_unstable_fraction=-0\.1"),
        (
            {"max_unstable_fraction": 0.5, "min_unstable_fraction": 0.5},
            r"min_unstable_fraction=0\.5 is not below max_unstable_fraction=0\.5: lower it",
        ),
        ({"stable_ps": 0}, r"stable_ps=0"),
        ({"lr_patience": 0}, r"lr_patience=0"),
        ({"lr_patience": 1.5}, r"lr_patience=1\.5"),
        ({"lr_cut": 0.0}, r"lr_cut=0\.0"),
        ({"lr_cut": 2.0}, r"lr_cut=2\.0"),
        ({"max_lr_cuts": -1}, r"max_lr_cuts=-1 .*>= 0"),
        ({"max_windows": 0}, r"max_windows=0"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**settings)


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
    if phases.name == "simulate":
        return phases.after_simulation_window(fraction, 0.4)
    return phases.after_learning_window(fraction)


@settings(few, max_examples=100)
@given(schedules(), st.lists(fractions, min_size=1, max_size=40))
def test_phases_end_and_limit_the_cuts(schedule, outcomes):
    phases, stable = PhaseTracker(schedule), 0.0
    for fraction in outcomes:
        was = phases.name
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
    for _ in range(50 if phases.name != "done" else 0):
        if step(phases, 0.0) == "done":
            break
    assert phases.name == "done"


@few
@given(schedules(), st.lists(fractions, max_size=20), st.lists(fractions, min_size=1, max_size=20))
def test_load_state_dict_continues_any_course(schedule, before, after):
    whole = PhaseTracker(schedule)
    for fraction in before:
        if whole.name != "done":
            step(whole, fraction)
    resumed = PhaseTracker(schedule)
    resumed.load_state_dict(whole.state_dict())
    for fraction in after:
        if whole.name != "done":
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
