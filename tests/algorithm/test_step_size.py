"""The learning rate that follows the effective sample size."""

from math import inf, isclose, nan, sqrt

import pytest
import torch

from stable_plugin.algorithm.reweighting import ess_fraction, reweight
from stable_plugin.algorithm.step_size import LearningRateScale, distance
from stable_plugin.units import BOLTZMANN


def test_distance_is_the_root_of_chi_square():
    """For oscillators of stiffness k and k (1 + s), χ² = (1 + s) / √(1 + 2 s) - 1."""
    kT, change = BOLTZMANN * 300.0, 0.2
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * sqrt(kT)
    weights = reweight(0.5 * (1.0 + change) * x.square(), 0.5 * x.square(), 300.0)
    exact = sqrt((1.0 + change) / sqrt(1.0 + 2.0 * change) - 1.0)
    assert distance(ess_fraction(weights)) == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize(("fraction", "expected"), [(1.0, 0.0), (0.5, 1.0), (0.1, 3.0), (nan, inf), (0.0, inf)])
def test_distance_of_ess_fraction(fraction, expected):
    assert isclose(distance(fraction), expected, abs_tol=1e-12) or distance(fraction) == expected


def fraction_at(moved):
    """Effective fraction at a distance: the inverse of :func:`distance`."""
    return 1.0 / (1.0 + moved * moved)


@pytest.mark.parametrize("step", [0.05, 4.0])
def test_factor_converges_to_equal_steps(step):
    """Where distances are proportional to the factor, four steps to an ESS of 0.1, a distance of 3, are 0.75 each."""
    scale = LearningRateScale(max_scale=100.0, steps=4, min_ess_fraction=0.1)
    for _ in range(5):
        moved = 0.0
        scale.begin_window()
        for _ in range(4):
            moved += step * scale.factor
            scale.update(fraction_at(moved))
    assert step * scale.factor == pytest.approx(0.75)
    assert moved == pytest.approx(3.0)


@pytest.mark.parametrize(("moved", "bound"), [(1e-6, 3.0), (1e6, 1.0 / 3.0)])
def test_factor_is_bounded_and_at_most_doubled(moved, bound):
    scale = LearningRateScale(max_scale=3.0, steps=4, min_ess_fraction=0.1)
    scale.update(fraction_at(moved))
    assert scale.factor == (2.0 if moved < 1 else 0.5)
    scale.begin_window()
    scale.update(fraction_at(moved))
    assert scale.factor == bound


def test_factor_is_halved_by_nan_and_kept_by_return():
    scale = LearningRateScale(max_scale=8.0, steps=4, min_ess_fraction=0.1)
    scale.update(nan)
    assert scale.factor == 0.5
    scale.update(fraction_at(1.0))
    assert scale.factor == 0.5, "closer to the sampled parameters than before"


def test_max_scale_of_one_keeps_the_learning_rate():
    scale = LearningRateScale(max_scale=1.0, steps=4, min_ess_fraction=0.3)
    for moved in (0.01, 5.0, inf):
        scale.update(fraction_at(moved))
        assert scale.factor == 1.0


def test_max_scale_below_one_is_refused():
    with pytest.raises(ValueError, match=r"max_lr_scale=0.5 is out of range: pass a finite number >= 1"):
        LearningRateScale(0.5, 4, 0.3)


def test_state_dict_restores_factor_and_distance():
    scale, resumed = (LearningRateScale(max_scale=8.0, steps=4, min_ess_fraction=0.1) for _ in range(2))
    scale.update(fraction_at(0.6))
    resumed.load_state_dict(scale.state_dict())
    for each in (scale, resumed):
        each.update(fraction_at(1.5))
    assert resumed.factor == scale.factor != 1.0
    assert repr(resumed) == f"LearningRateScale(max_scale=8, factor={scale.factor:g})"
