"""Thermal limits: quantiles in closed form, false alarms counted on samples, and what few or broken frames do to them."""

import numpy as np
import pytest
import torch
from ase.build import molecule
from scipy import stats

from stable_plugin import (
    AngleLimits,
    AnyOf,
    BondDeviation,
    BondLimits,
    ContactLimits,
    RunawayTemperature,
    System,
    TemperatureLimits,
)
from stable_plugin.detectors.limits import PRIOR_FRAMES, thermal_limits

ALONE = torch.zeros(1, dtype=torch.long)


def normal(n_frames, n_coordinates=1, scale=1.0, seed=0):
    return torch.tensor(np.random.default_rng(seed).normal(scale=scale, size=(n_frames, n_coordinates)))


def test_limits_of_many_frames_are_normal_quantiles():
    values = normal(200_000)
    limits = thermal_limits(values, ALONE, amplitude=1.0, false_alarms=2e-6)
    assert limits.center.item() == pytest.approx(0.0, abs=0.01)
    assert limits.upper.item() == pytest.approx(stats.norm.isf(1e-6), rel=0.02)
    assert limits.lower.item() == pytest.approx(-stats.norm.isf(1e-6), rel=0.02)


def test_limits_of_one_frame_are_those_of_the_prior():
    limits = thermal_limits(torch.tensor([[3.0]], dtype=torch.float64), ALONE, amplitude=0.5, false_alarms=2e-4)
    expected = 0.5 * np.sqrt(2.0) * stats.t.isf(1e-4, PRIOR_FRAMES)
    assert (limits.upper - 3.0).item() == pytest.approx(expected)
    assert (3.0 - limits.lower).item() == pytest.approx(expected)


@pytest.mark.parametrize("n_frames", [5, 50, 1000])
@pytest.mark.parametrize("n_coordinates", [1, 20])
def test_false_alarms_are_at_most_those_asked_for(n_frames, n_coordinates):
    rate, n_trials, flagged = 1e-2, 40, 0
    classes = torch.arange(n_coordinates) % 4
    for trial in range(n_trials):
        limits = thermal_limits(normal(n_frames, n_coordinates, seed=trial), classes, 1.0, rate)
        fresh = normal(1000, n_coordinates, seed=1000 + trial)
        flagged += int((limits.relative(fresh).amax(dim=1) > 1.0).sum())
    # Few frames give wider limits; many come close to the rate.
    assert flagged / (1000 * n_trials) <= 1.25 * rate
    if n_frames == 1000:
        assert flagged / (1000 * n_trials) >= 0.5 * rate


def test_skewed_coordinates_have_a_longer_tail():
    shape = 16.0  # of a gamma distribution, with a skewness of 2 / sqrt(16)
    draws = np.random.default_rng(0).gamma(shape, size=(100_000, 1)) / np.sqrt(shape)
    limits = thermal_limits(torch.tensor(draws), ALONE, 1.0, 2e-6)
    assert limits.upper.item() == pytest.approx(stats.gamma.isf(1e-6, shape) / np.sqrt(shape), rel=0.05)
    # The shorter tail is not narrowed.
    assert limits.lower.item() == pytest.approx(np.sqrt(shape) - stats.norm.isf(1e-6), rel=0.1, abs=0.1)


def test_equivalent_coordinates_share_fluctuations_but_not_means():
    values = torch.cat([normal(4, seed=1), 5.0 + normal(4, seed=2), normal(4, scale=9.0, seed=3)], dim=1)
    limits = thermal_limits(values, torch.tensor([0, 0, 1]), 1.0, 1e-4)
    widths = limits.upper - limits.lower
    assert widths[0] == pytest.approx(widths[1].item())
    assert widths[2] > 2.0 * widths[0]
    assert limits.center.tolist() == pytest.approx(values.mean(dim=0).tolist())


def test_a_broken_frame_does_not_widen_the_limits():
    values = normal(50, scale=0.03)
    broken = values.clone()
    broken[7] = 2.0
    clean, robust = (thermal_limits(each, ALONE, 0.03, 1e-7) for each in (values, broken))
    assert (robust.upper - robust.lower).item() == pytest.approx((clean.upper - clean.lower).item(), rel=0.05)
    assert robust.relative(broken)[7] > 1.0


def test_limits_scale_with_the_square_root_of_the_temperature():
    values = normal(20_000, scale=0.05)
    at_reference = thermal_limits(values, ALONE, 0.05, 1e-6)
    scale = BondLimits(1000.0, reference_temperature_K=250.0).scale
    hot = thermal_limits(values, ALONE, scale * 0.05, 1e-6, scale)
    assert scale == 2.0
    ratio = (hot.upper - hot.lower) / (at_reference.upper - at_reference.lower)
    assert ratio.item() == pytest.approx(2.0, rel=1e-3)
    # A colder simulation keeps the limits of its reference.
    assert BondLimits(250.0, reference_temperature_K=1000.0).scale == BondLimits(250.0).scale == 1.0


def test_limits_of_hotter_replicas_are_those_of_their_temperature():
    """A detector of 300 K for replicas at 390 K has the limits of one that is made for 390 K from the same reference."""
    atoms = molecule("C2H6")
    generator = torch.Generator().manual_seed(0)
    reference = torch.tensor(atoms.positions) + 0.05 * torch.randn(200, 8, 3, generator=generator, dtype=torch.float64)
    system = System.from_atoms(atoms)
    for kind in (BondLimits, AngleLimits, ContactLimits):
        made, heated = kind(390.0, reference_temperature_K=300.0), kind(300.0).heated(1.3)
        for detector in (made, heated):
            detector.bind(system, reference)
        moved = reference + 0.1
        moved[:, 0] += 0.3
        velocities = torch.zeros_like(moved)
        torch.testing.assert_close(heated.measure(moved, velocities), made.measure(moved, velocities))


def test_combined_detectors_are_heated_together():
    heated = AnyOf([BondDeviation(0.25, 0.26), RunawayTemperature(1000.0), TemperatureLimits(300.0)]).heated(1.44)
    bonds, runaway, limits = heated.parts
    assert (bonds.threshold, bonds.discard) == (pytest.approx(0.3), pytest.approx(0.3))
    assert runaway.threshold == pytest.approx(1440.0)
    assert limits.temperature_K == pytest.approx(432.0)
