"""Losses of an observable's mean."""

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance

from stable_plugin.config import mean_squared_error, wasserstein

BINS = torch.arange(60, dtype=torch.float64)


def peak(place, width=2.0):
    curve = torch.exp(-0.5 * ((BINS - place) / width) ** 2)
    return curve / curve.sum()


def test_distance_is_that_of_scipy():
    one, other = peak(20.0) + peak(31.0), 2 * peak(25.0)
    expected = wasserstein_distance(BINS.numpy(), BINS.numpy(), one.numpy(), other.numpy())
    # Both curves have an area of two, over 60 bins.
    assert wasserstein(one, other).item() == pytest.approx(2 * expected / 60, rel=1e-9)


@pytest.mark.parametrize(("loss", "pulls"), [(wasserstein, True), (mean_squared_error, False)])
def test_peaks_that_do_not_overlap(loss, pulls):
    place = torch.tensor(10.0, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(peak(place), peak(40.0)), place)
    assert gradient.item() == pytest.approx(-1 / 60 if pulls else 0.0, abs=1e-6)


def test_gradient_estimated_from_samples_is_less_noisy():
    """Of a peak that is 0.7 and 2.7 of its widths off: signal over noise in estimates from 240 frames of 64 distances."""
    generator, width = np.random.default_rng(0), 0.15
    edges = torch.arange(0, 6, 0.05, dtype=torch.float64)

    def counts(distances):
        return torch.stack([torch.histc(each, len(edges) - 1, 0.0, edges[-1].item()) for each in distances])

    for shift, least in ((0.1, 1.0), (0.4, 1.5)):
        found = {mean_squared_error: [], wasserstein: []}
        target = counts(torch.tensor(generator.normal(3 + shift, width, (1, 64000))))[0] / 1000
        for _ in range(60):
            distances = torch.tensor(generator.normal(3, width, (240, 64)))
            values, slope = counts(distances), -(distances - 3).sum(dim=1) / width**2
            response = -((values - values.mean(dim=0)) * (slope - slope.mean())[:, None]).mean(dim=0)
            for loss, gradients in found.items():
                mean = values.mean(dim=0).requires_grad_(True)
                (upstream,) = torch.autograd.grad(loss(mean, target), mean)
                gradients.append((upstream @ response).item())
        squared, linear = (abs(np.mean(each)) / np.std(each) for each in found.values())
        assert linear > least * squared
