"""Statistical weights of frames against their formulas, also over several processes."""

from math import exp

import numpy as np
import pytest
import torch
from ase import units
from threaded_contexts import ThreadedContexts

from stable_plugin.algorithm.reweighting import ess_fraction, reweight, uniform_weights

TEMPERATURE = 350.0
BETA = 1.0 / (units.kB * TEMPERATURE)


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def energies(n_samples, seed=5):
    """Energies under present and sampled parameters, each (n_samples,) in eV."""
    random = np.random.default_rng(seed)
    sampled = random.normal(scale=0.1, size=n_samples)
    return torch.tensor(sampled + random.normal(scale=0.05, size=n_samples)), torch.tensor(sampled)


@pytest.mark.parametrize("n_samples", [1, 4])
def test_uniform_weights_sum_to_one(n_samples):
    weights = uniform_weights(n_samples, torch.ones(1))
    assert weights.tolist() == [1.0 / n_samples] * n_samples
    assert weights.dtype == torch.float64


def test_uniform_weights_of_no_samples_are_empty():
    assert uniform_weights(0, torch.ones(1)).shape == (0,)


def test_reweight_is_a_normalized_boltzmann_factor():
    now, then = [0.1, 0.3, 0.2], [0.15, 0.2, 0.25]
    factors = [exp(-BETA * (new - old)) for new, old in zip(now, then, strict=True)]
    expected = np.array(factors) / sum(factors)
    np.testing.assert_allclose(reweight(double(now), double(then), TEMPERATURE).numpy(), expected, rtol=1e-6)


def test_reweight_with_unchanged_energies_is_uniform():
    present, _ = energies(8)
    weights = reweight(present, present.clone(), TEMPERATURE)
    assert torch.equal(weights, uniform_weights(8, present))
    assert ess_fraction(weights) == 1.0


def test_reweight_ignores_a_constant_energy_shift():
    present, sampled = energies(5)
    expected = reweight(present, sampled, TEMPERATURE)
    for shift in (-1e5, 1e5):
        assert torch.allclose(reweight(present + shift, sampled, TEMPERATURE), expected, rtol=1e-6)


def test_reweight_subtracts_in_double_precision():
    now = torch.tensor([-4.0e6, -4.0e6, -4.0e6], dtype=torch.float32)
    then = double([-4.0e6, -4.0e6 + 0.05, -4.0e6 - 0.05])
    found = reweight(now, then, TEMPERATURE)
    factors = np.exp(BETA * np.array([0.0, 0.05, -0.05]))
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), factors / factors.sum(), rtol=1e-6)
    assert torch.isfinite(reweight(now, then + 1e6, TEMPERATURE)).all(), "exp() of the largest exponent is one"


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([0.25, 0.25, 0.25, 0.25], 1.0),
        ([0.5, 0.5, 0.0, 0.0], 0.5),
        ([1.0, 0.0, 0.0, 0.0], 0.25),
        ([0.5, 0.25, 0.25], 1 / (3 * 0.375)),
    ],
)
def test_ess_fraction_is_kishs_formula(weights, expected):
    assert ess_fraction(double(weights)) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("cuts", [(0, 3, 7), (0, 0, 7), (0, 1, 1, 7)], ids=["two", "one without", "three"])
def test_weights_are_over_all_processes(cuts):
    present, sampled = energies(7)
    expected = reweight(present, sampled, TEMPERATURE)

    def work(rank, context):
        part = slice(cuts[rank], cuts[rank + 1])
        weights = reweight(present[part], sampled[part], TEMPERATURE, context)
        torch.testing.assert_close(weights, expected[part], rtol=1e-12, atol=0)
        uniform = uniform_weights(len(weights), weights, context)
        assert uniform.tolist() == [1 / 7] * len(weights)
        return ess_fraction(weights, context), ess_fraction(uniform, context)

    for reweighted, uniform in ThreadedContexts(len(cuts) - 1).run(work):
        assert reweighted == pytest.approx(ess_fraction(expected), rel=1e-12)
        assert uniform == pytest.approx(1.0, rel=1e-12)
