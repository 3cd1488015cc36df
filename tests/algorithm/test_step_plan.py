"""Cycles of optimizer steps after windows of the failure margin."""

import math

import pytest

from stable_plugin.algorithm.step_plan import LEVEL_STEPS, MAX_CYCLES, StepPlan

CYCLE = 40
LEVEL = 10.0


def measured(level=LEVEL, cycle=CYCLE):
    """Return a plan at the first step after its first window, with a known level of the user's loss."""
    plan = StepPlan(cycle)
    plan.begin_window()
    for number in range(min(LEVEL_STEPS, cycle)):
        # The mean is the level.
        assert plan.take_step(level + (-1) ** number, settle=False)
        assert plan.lr_factor == 0.0
    return plan


def steps_after_window(plan, loss, margin=lambda cycle: None, *, settle):
    """Return the steps after a window; the losses are functions of the number of the cycle."""
    plan.begin_window()
    steps = 0
    while plan.take_step(loss(plan.cycles), margin(plan.cycles), settle=settle):
        steps += 1
        assert steps <= MAX_CYCLES * CYCLE
    return steps


def test_first_steps_measure_the_level_and_leave_the_weights():
    plan = measured()
    assert plan.level == pytest.approx(LEVEL)
    assert plan.take_step(LEVEL, settle=False)
    assert plan.lr_factor == 1.0
    assert measured(cycle=4).n_level_steps == 4


def test_learning_rate_falls_in_each_cycle():
    plan = measured()
    factors = []
    while plan.take_step(LEVEL, settle=True):
        factors.append(plan.lr_factor)
    assert len(factors) == CYCLE
    assert factors[0] == 1.0 and factors[-1] == pytest.approx(0.05)
    assert factors == sorted(factors, reverse=True)
    middle = 0.5 * (factors[CYCLE // 2 - 1] + factors[CYCLE // 2])
    assert middle == pytest.approx(0.525)


def test_cycles_repeat_until_the_loss_is_back():
    def loss(cycle):
        return LEVEL + 4.0 - cycle

    assert steps_after_window(measured(), loss, settle=True) == 4 * CYCLE


@pytest.mark.parametrize(
    ("loss", "cycles"),
    [
        (lambda cycle: LEVEL, 1),
        (lambda cycle: 0.5 * LEVEL, 1),
        (lambda cycle: 1.01 * LEVEL, 1),
        (lambda cycle: 2.0 * LEVEL, 2),
        (lambda cycle: 2.0 * LEVEL + cycle, 2),
        (lambda cycle: 2.0 * LEVEL - 0.1 * cycle, 2),
        (lambda cycle: LEVEL + 10.0 * 0.7**cycle, MAX_CYCLES),
        (lambda cycle: None, 1),
        (lambda cycle: math.nan, 1),
    ],
    ids=[
        "level",
        "below",
        "within the tolerance",
        "does not fall",
        "rises",
        "falls too slowly",
        "falls forever",
        "unknown",
        "nan",
    ],
)
def test_cycles_end(loss, cycles):
    assert steps_after_window(measured(), loss, settle=True) == cycles * CYCLE


@pytest.mark.parametrize(
    ("margin", "cycles"),
    [
        (lambda cycle: 0.05, 1),
        (lambda cycle: 1.0, 2),
        (lambda cycle: 2.0**-cycle, 4),
        (lambda cycle: 1.0 - 0.1 * cycle, 2),
        (lambda cycle: math.nan, 1),
    ],
    ids=["small", "does not fall", "falls", "falls too slowly", "nan"],
)
def test_cycles_repeat_while_the_margins_loss_falls(margin, cycles):
    assert steps_after_window(measured(), lambda cycle: LEVEL, margin, settle=True) == cycles * CYCLE
    assert steps_after_window(measured(), lambda cycle: None, margin, settle=False) == CYCLE


def test_cycles_repeat_until_both_losses_are_settled():
    plan = measured()
    assert (
        steps_after_window(plan, lambda cycle: LEVEL + 4.0 - cycle, lambda cycle: 0.5**cycle, settle=True) == 4 * CYCLE
    )
    assert steps_after_window(plan, lambda cycle: LEVEL, lambda cycle: 4 * 0.5**cycle, settle=True) == 6 * CYCLE


def test_negative_losses_settle_too():
    """As negative log-likelihoods may be."""
    assert steps_after_window(measured(-10.0), lambda cycle: -10.0, settle=True) == CYCLE
    assert steps_after_window(measured(-10.0), lambda cycle: -4.0 - 2.0 * cycle, settle=True) == 3 * CYCLE


def test_steps_end_where_the_level_is_zero():
    """With labels of the potential itself, any repair leaves a loss."""
    assert steps_after_window(measured(0.0), lambda cycle: 1.0 + 4.0 * 0.5**cycle, settle=True) == 4 * CYCLE


def test_one_cycle_follows_windows_without_a_probe_after_them():
    assert steps_after_window(measured(), lambda cycle: 2.0 * LEVEL, settle=False) == CYCLE


def test_unknown_losses_never_settle():
    plan = StepPlan(CYCLE)
    assert steps_after_window(plan, lambda cycle: None, settle=True) == LEVEL_STEPS + CYCLE
    assert steps_after_window(plan, lambda cycle: 5.0, settle=True) == CYCLE


def test_plan_resumes():
    plan, other = measured(), StepPlan(CYCLE)
    for _ in range(CYCLE + 7):
        plan.take_step(2.0 * LEVEL, 1.0, settle=True)
    other.load_state_dict(plan.state_dict())
    assert other == plan and other.cycles == 2 and other.position == 7
    plan.take_step(1.0, 1.0, settle=True)
    assert other != plan, "the states share nothing"
