"""Steps as long as a window can bear."""

from math import inf, isclose, nan, sqrt

import pytest
import torch
from springs import SOFT, adam, make_loop, optimizer_step
from toys import triatomic

from stable_plugin.algorithm.reweighting import ess_fraction, reweight
from stable_plugin.algorithm.step_size import LearningRateScale, distance
from stable_plugin.units import BOLTZMANN


def test_the_distance_is_the_root_of_the_chi_square_divergence():
    """Of oscillators of stiffness k and k (1 + s): χ² = (1 + s) / √(1 + 2 s) - 1."""
    kT, change = BOLTZMANN * 300.0, 0.2
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * sqrt(kT)
    weights = reweight(0.5 * (1.0 + change) * x.square(), 0.5 * x.square(), 300.0)
    exact = sqrt((1.0 + change) / sqrt(1.0 + 2.0 * change) - 1.0)
    assert distance(ess_fraction(weights)) == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize(("share", "expected"), [(1.0, 0.0), (0.5, 1.0), (0.1, 3.0), (nan, inf), (0.0, inf)])
def test_distances(share, expected):
    assert isclose(distance(share), expected, abs_tol=1e-12) or distance(share) == expected


def share_at(gone):
    return 1.0 / (1.0 + gone * gone)


def test_where_steps_go_as_far_as_their_learning_rate_the_steps_of_a_window_use_it_up():
    """With four steps to a floor of 0.1, a distance of 3, each goes 0.75 in the end, wherever it began."""
    for reach in (0.05, 4.0):
        size = LearningRateScale(max_scale=100.0, steps=4, min_ess_fraction=0.1)
        for _ in range(5):
            gone = 0.0
            size.begin_window()
            for _ in range(4):
                gone += reach * size.factor
                size.update(share_at(gone))
        assert reach * size.factor == pytest.approx(0.75)
        assert gone == pytest.approx(3.0)


@pytest.mark.parametrize(("reach", "bound"), [(1e-6, 3.0), (1e6, 1.0 / 3.0)])
def test_the_factor_has_bounds_and_changes_by_two_at_most(reach, bound):
    size = LearningRateScale(max_scale=3.0, steps=4, min_ess_fraction=0.1)
    size.update(share_at(reach))
    assert size.factor == (2.0 if reach < 1 else 0.5)
    size.begin_window()
    size.update(share_at(reach))
    assert size.factor == bound


def test_a_sample_that_is_not_a_number_halves_the_step_and_one_that_comes_back_leaves_it():
    size = LearningRateScale(max_scale=8.0, steps=4, min_ess_fraction=0.1)
    size.update(nan)
    assert size.factor == 0.5
    size.update(share_at(1.0))
    assert size.factor == 0.5


def test_by_default_the_learning_rate_is_left_alone():
    size = LearningRateScale(max_scale=1.0, steps=4, min_ess_fraction=0.3)
    for gone in (0.01, 5.0, inf):
        size.update(share_at(gone))
        assert size.factor == 1.0
    with pytest.raises(ValueError, match=r"max_lr_scale=0.5 is out of range"):
        LearningRateScale(0.5, 4, 0.3)


def test_the_loop_follows_its_samples_and_says_so_after_resuming(reference):
    loop = make_loop(triatomic(SOFT), reference, max_lr_scale=4.0, min_ess_fraction=0.2)
    optimizer = adam(loop.potential, lr=0.01)
    for _ in range(4):
        optimizer_step(loop, optimizer)
    assert 1.0 < loop.lr_scale.factor <= 4.0, "steps this short leave the window unused"
    assert loop.lr_factor == loop.tracker.lr_factor * loop.lr_scale.factor
    resumed = make_loop(triatomic(SOFT), reference, max_lr_scale=4.0, min_ess_fraction=0.2)
    resumed.load_state_dict(loop.state_dict())
    assert resumed.step_size.state_dict() == loop.lr_scale.state_dict()
