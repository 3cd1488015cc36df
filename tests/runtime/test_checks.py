"""Argument checks and the constraints in the annotations of dataclasses."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Optional

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stable_plugin.runtime import checks
from stable_plugin.runtime.checks import Count, Number, Seed, check_fields

few = settings(max_examples=25, deadline=None, derandomize=True)

numbers = st.floats(allow_nan=True, allow_infinity=True) | st.integers(-(10**40), 10**40) | st.booleans() | st.none()
anything = numbers | st.text(max_size=5) | st.lists(st.integers(), max_size=2)


def accepted(check, *arguments, **bounds):
    """Return what the check returns, or None if it rejects the argument by name."""
    try:
        return check(*arguments, **bounds)
    except ValueError as error:
        assert str(error).startswith("x="), error
        return None


def test_number_returns_values_in_bounds():
    assert checks.number("x", 2, at_least=2, at_most=2) == 2
    assert checks.number("x", 0.5, above=0) == 0.5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1", None, True, 0, 5.1])
def test_number_rejects_values_out_of_bounds(value):
    with pytest.raises(ValueError, match=r"x=.* is out of range: pass a finite number .*> 0 and <= 5\. Mind\.$"):
        checks.number("x", value, above=0, at_most=5, hint="Mind.")


def test_count_returns_values_in_bounds():
    assert checks.count("n", 3, at_least=3) == 3


@pytest.mark.parametrize("value", [0, 1.0, True, "2"])
def test_count_rejects_what_is_not_a_count(value):
    with pytest.raises(ValueError, match=r"n=.* is out of range: pass an integer >= 1\.$"):
        checks.count("n", value)


def test_count_names_the_maximum_only_above_it():
    with pytest.raises(ValueError, match=r"^n=5 is out of range: pass an integer >= 1 and <= 4\.$"):
        checks.count("n", 5, at_most=4)
    with pytest.raises(ValueError, match=r"^n=0 is out of range: pass an integer >= 1\.$"):
        checks.count("n", 0, at_most=4)


@few
@given(anything, anything, anything, anything)
def test_number_and_count_accept_exactly_their_range(value, above, at_least, at_most):
    bounds = {
        name: bound
        for name, bound in (("above", above), ("at_least", at_least), ("at_most", at_most))
        if isinstance(bound, float) and math.isfinite(bound)
    }
    plain = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63
    inside = plain and all(
        {"above": value > bound, "at_least": value >= bound, "at_most": value <= bound}[name]
        for name, bound in bounds.items()
    )
    found = accepted(checks.number, "x", value, **bounds)
    if not isinstance(value, float) or abs(value) < 2**63 or not math.isfinite(value):
        assert (found is not None) == inside
    whole = isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**63
    assert (accepted(checks.count, "x", value) is not None) == whole


def test_seed_leaves_room_for_the_next_one():
    assert checks.seed(2**63 - 2) == 2**63 - 2
    for value in (2**63 - 1, -1, 0.5):
        with pytest.raises(ValueError, match=r"^seed=.* is out of range: pass an integer >= 0"):
            checks.seed(value)


@pytest.mark.parametrize("value", [0, 1, "true", None])
def test_flag_rejects_what_is_not_a_boolean(value):
    assert checks.flag("x", True) is True
    with pytest.raises(ValueError, match=r"^x=.* is not a boolean: pass true or false\.$"):
        checks.flag("x", value)


def test_bins_rejects_more_than_memory_holds():
    assert checks.bins("bin_width", 1e-4, 10.0) == 1e-4
    with pytest.raises(
        ValueError, match=r"^bin_width=1e-05 results in 1e\+06 bins up to 10.*: pass a larger bin_width"
    ):
        checks.bins("bin_width", 1e-5, 10.0)


@pytest.mark.parametrize(("duration", "timestep", "n_steps"), [(400.0, 0.5, 800), (0.3, 0.1, 3), (25.0, 0.25, 100)])
def test_steps_counts_timesteps(duration, timestep, n_steps):
    assert checks.steps("window", duration, timestep) == n_steps


@pytest.mark.parametrize(
    ("name", "duration", "suggested"),
    [("check_every_fs", 25.2, "25 fs"), ("check_every_fs", 0.1, "0.5 fs"), ("window_ps", 25.2, "0.025 ps")],
)
def test_steps_suggests_a_multiple(name, duration, suggested):
    with pytest.raises(
        ValueError, match=rf"^{name}=.*timesteps of 0\.5 fs: pass a multiple, for instance {suggested}\.$"
    ):
        checks.steps(name, duration, 0.5)


def test_steps_rejects_durations_beyond_the_maximum():
    with pytest.raises(ValueError, match=r"^window_ps=1e\+12 ps is 2e\+15 timesteps .*: pass a shorter duration"):
        checks.steps("window_ps", 1e15, 0.5)


@few
@given(st.floats(1e-3, 10.0), st.integers(1, 10**9))
def test_steps_accepts_every_multiple(timestep_fs, n_steps):
    assert checks.steps("x", n_steps * timestep_fs, timestep_fs) == n_steps


@few
@given(st.floats(1e-3, 10.0), st.integers(1, 999), st.floats(2e-3, 0.4))
def test_steps_rejects_fractions_of_a_timestep(timestep_fs, n_steps, off):
    with pytest.raises(ValueError, match=r"^x=.* is not a whole number of timesteps"):
        checks.steps("x", (n_steps + off) * timestep_fs, timestep_fs)


@dataclass
class Settings:
    """Fields with every kind of constraint."""

    n_replicas: Annotated[int, Count(at_most=100)] = 8
    fraction: Annotated[float, Number(above=0, at_most=1, hint="It is a fraction.")] = 0.5
    seed: Annotated[int, Seed()] = 0
    discard: Annotated[float | None, Number(at_least=0)] = None
    chunk: Annotated[int, Count()] | None = None
    cutoff: Optional[Annotated[float, Number(above=0)]] = None  # noqa: UP045  (both spellings are in use)
    weight: Annotated[float, Number(at_least=0)] | Literal["auto"] = "auto"
    label: Annotated[str, "not a constraint"] = ""
    even: list[int] | None = None

    def __post_init__(self):
        check_fields(self)


@pytest.mark.parametrize(
    "change",
    [
        {"n_replicas": 100},
        {"fraction": 1},
        {"discard": 0.0},
        {"chunk": 3},
        {"cutoff": 5.0},
        {"weight": 2.0},
        {"weight": "auto"},
        {"label": 3, "even": "x"},
    ],
)
def test_check_fields_accepts_values_in_bounds(change):
    changed = replace(Settings(), **change)
    assert {name: getattr(changed, name) for name in change} == change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_replicas": 0}, r"n_replicas=0 is out of range: pass an integer >= 1\.$"),
        ({"n_replicas": 101}, r"n_replicas=101 is out of range: pass an integer >= 1 and <= 100\.$"),
        ({"n_replicas": None}, r"n_replicas=None is out of range"),
        ({"fraction": 0.0}, r"fraction=0.0 is out of range: pass a finite number > 0 and <= 1\. It is a fraction\.$"),
        ({"seed": -1}, r"seed=-1 is out of range: pass an integer >= 0\.$"),
        ({"discard": -0.1}, r"discard=-0\.1 is out of range: pass a finite number >= 0\.$"),
        ({"chunk": 0}, r"chunk=0 is out of range: pass an integer >= 1\.$"),
        ({"cutoff": 0}, r"cutoff=0 is out of range: pass a finite number > 0\.$"),
        ({"weight": "Auto"}, r"weight='Auto' is out of range: pass a finite number >= 0\.$"),
        ({"weight": None}, r"weight=None is out of range"),
    ],
)
def test_check_fields_rejects_values_out_of_bounds(change, message):
    with pytest.raises(ValueError, match=rf"^{message}"):
        Settings(**change)


def test_check_fields_covers_inherited_fields():
    @dataclass
    class Wider(Settings):
        extra: int = 0

    with pytest.raises(ValueError, match=r"^seed=-1"):
        Wider(seed=-1)
