"""The estimator's sums against plain Python, sample by sample: whole frames, sites, chunks, several processes.

Fast enough to run once per mutant; slower references are in ``test_estimator_accuracy.py``.
"""

import logging
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ase import units
from threaded_contexts import ThreadedContexts
from torch import nn
from toys import TRIATOMIC, PairRepulsion

from stable_plugin import System
from stable_plugin.algorithm.estimator import BoltzmannEstimator, surrogate_weights
from stable_plugin.algorithm.reweighting import ess_fraction, reweight, uniform_weights
from stable_plugin.config import mean_squared_error
from stable_plugin.md.neighborhoods import Members
from stable_plugin.models import ModulePotential

TEMPERATURE = 350.0
BETA = 1.0 / (units.kB * TEMPERATURE)
N_FRAMES = 7


class ThreeTerms(nn.Module):
    """Atomic energies U = a x² + b sin(y) + c x z, and a parameter without effect."""

    def __init__(self):
        super().__init__()
        self.ab = nn.Parameter(torch.tensor([0.3, -0.7], dtype=torch.float64))
        self.idle = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.c = nn.Parameter(torch.tensor(0.2, dtype=torch.float64))

    def forward(self, positions):
        x, y, z = positions.unbind(-1)
        return self.ab[0] * x.square() + self.ab[1] * y.sin() + self.c * x * z


def slopes(position):
    """∂U/∂(a, b, c) of one atom."""
    x, y, z = position
    return np.array([x * x, np.sin(y), x * z])


def three_terms():
    return ModulePotential(ThreeTerms(), System.from_atoms(TRIATOMIC))


@pytest.fixture
def potential():
    return three_terms()


@pytest.fixture
def positions():
    return torch.tensor(np.random.default_rng(0).normal(size=(N_FRAMES, 3, 3)))


def observed(n_samples):
    """Values and targets of two observables, of two values and of one; some samples lack some values."""
    random = np.random.default_rng(1)
    values = [random.normal(size=(n_samples, 2)), random.normal(size=(n_samples, 1))]
    values[0][2, 1] = values[0][4, 0] = values[1][5, 0] = np.nan
    return values, [np.array([0.4, -0.3]), np.array([0.9])]


def unequal(n_samples):
    weights = np.random.default_rng(2).uniform(0.5, 2.0, size=n_samples)
    return weights / weights.sum()


def by_hand(positions, values, targets, weights, samples):
    """Loss, means, and the gradient for (a, b, c); ``samples`` are lists of (frame, atom)."""
    loss, means, surrogate = 0.0, [], np.zeros(len(samples))
    for value, target in zip(values, targets, strict=True):
        for k in range(len(target)):
            present = [i for i in range(len(samples)) if not np.isnan(value[i, k])]
            total = sum(weights[i] for i in present)
            held = {i: weights[i] / total for i in present}
            mean = sum(held[i] * value[i, k] for i in present)
            means.append(mean)
            loss += (mean - target[k]) ** 2 / len(target)
            upstream = 2.0 * (mean - target[k]) / len(target)
            for i in present:
                unbiased = held[i] * (value[i, k] - mean) / (1.0 - sum(each**2 for each in held.values()))
                surrogate[i] -= BETA * upstream * unbiased
    gradient = sum(
        weight * slopes(positions[frame, atom].numpy())
        for weight, sample in zip(surrogate, samples, strict=True)
        for frame, atom in sample
    )
    return loss, means, gradient


def assert_agrees(estimate, expected):
    loss, means, gradient = expected
    assert estimate.loss == pytest.approx(loss, rel=1e-12)
    np.testing.assert_allclose(estimate.mean.numpy(), means, rtol=1e-12)
    ab, idle, c = estimate.gradients
    np.testing.assert_allclose([*ab.tolist(), c.item()], gradient, rtol=1e-11)
    assert torch.equal(idle, torch.zeros(2, dtype=torch.float64))


def tensors(arrays):
    return [torch.tensor(array) for array in arrays]


FRAMES = [[(frame, atom) for atom in range(3)] for frame in range(N_FRAMES)]
SITES = [[(frame, first), (frame, 2)] for frame in range(N_FRAMES) for first in (0, 1)]


def members(samples):
    entries = [(index, 3 * frame + atom) for index, sample in enumerate(samples) for frame, atom in sample]
    sample, atom = torch.tensor(entries).unbind(1)
    return Members(sample, atom, len(samples), (N_FRAMES, 3))


@pytest.mark.parametrize("chunk", [1, 3, 32])
def test_estimate_of_weighted_frames_equals_sums(chunk, potential, positions):
    (values, targets), weights = observed(N_FRAMES), unequal(N_FRAMES)
    estimate = BoltzmannEstimator(potential, TEMPERATURE, chunk).estimate(
        positions, tensors(values), tensors(targets), weights=torch.tensor(weights)
    )
    assert_agrees(estimate, by_hand(positions, values, targets, weights, FRAMES))
    assert estimate.ess_fraction == pytest.approx(1.0 / (N_FRAMES * sum(weights**2)), rel=1e-12)


def test_estimate_defaults_to_equal_whole_frames(potential, positions):
    values, targets = observed(N_FRAMES)
    estimate = BoltzmannEstimator(potential, TEMPERATURE).estimate(positions, tensors(values), tensors(targets))
    assert_agrees(estimate, by_hand(positions, values, targets, np.full(N_FRAMES, 1 / N_FRAMES), FRAMES))
    assert estimate.ess_fraction == pytest.approx(1.0, rel=1e-12)


def test_estimate_of_overlapping_sites_equals_sums(potential, positions):
    (values, targets), weights = observed(len(SITES)), unequal(len(SITES))
    estimator = BoltzmannEstimator(potential, TEMPERATURE, 2)
    weighted, equal = (
        estimator.estimate(positions, tensors(values), tensors(targets), weights=some, members=members(SITES))
        for some in (torch.tensor(weights), None)
    )
    assert_agrees(weighted, by_hand(positions, values, targets, weights, SITES))
    assert_agrees(equal, by_hand(positions, values, targets, np.full(len(SITES), 1 / len(SITES)), SITES))


def test_estimate_applies_the_chain_rule(potential, positions):
    def product(mean, target):
        assert mean.dtype == target.dtype
        return (mean[0] * mean[1] - target[0]).pow(3)

    values, target = np.random.default_rng(3).normal(size=(N_FRAMES, 2)), np.array([0.2], dtype=np.float32)
    estimate = BoltzmannEstimator(potential, TEMPERATURE).estimate(
        positions, tensors([values]), tensors([target]), product
    )
    first, second = values.mean(axis=0)
    error = first * second - float(target[0])
    # ∂L/∂⟨g⟩ = 3 error² (⟨g_2⟩, ⟨g_1⟩), so L has the gradient of the mean of this combination of both values.
    combined = 3.0 * error**2 * (second * values[:, 0] + first * values[:, 1])
    energy_slopes = np.array([sum(slopes(atom.numpy()) for atom in frame) for frame in positions])
    covariance = [np.cov(combined, column)[0, 1] for column in energy_slopes.T]
    found = [*estimate.gradients[0].tolist(), estimate.gradients[2].item()]
    assert estimate.loss == pytest.approx(error**3, rel=1e-12)
    np.testing.assert_allclose(found, -BETA * np.array(covariance), rtol=1e-11)


def test_estimate_orders_gradients_like_parameters(potential, positions):
    values, targets = observed(N_FRAMES)
    estimator = BoltzmannEstimator(potential, TEMPERATURE)
    of_all = estimator.estimate(positions, tensors(values), tensors(targets)).gradients
    assert [gradient.shape for gradient in of_all] == [(2,), (2,), ()]
    potential.module.ab.requires_grad_(False)
    of_rest = estimator.estimate(positions, tensors(values), tensors(targets)).gradients
    assert [gradient.shape for gradient in of_rest] == [(2,), ()]
    torch.testing.assert_close(of_rest[1], of_all[2], rtol=1e-12, atol=0)


def test_mean_squared_error_averages_squares():
    assert mean_squared_error(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 2.0])).item() == 2.5


def test_surrogate_weights_are_unbiased():
    values = torch.tensor([[1.0, 0.0], [2.0, 1.0], [6.0, -1.0]], dtype=torch.float64)
    upstream = torch.tensor([0.5, 2.0], dtype=torch.float64)
    found = surrogate_weights(values, upstream, uniform_weights(3, values), TEMPERATURE)
    # v·g is 0.5, 3 and 1, with mean 1.5.
    np.testing.assert_allclose(found.numpy(), -BETA * np.array([-1.0, 1.5, -0.5]) / 2, rtol=1e-12)


def test_surrogate_weights_are_in_double_precision():
    values, upstream = torch.tensor([[1.0], [2.0], [6.0]]), torch.tensor([2.0])
    found = surrogate_weights(values, upstream, torch.full((3,), 1 / 3, dtype=torch.float64), TEMPERATURE)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), -BETA * np.array([-2.0, -1.0, 3.0]), rtol=1e-12)


def test_surrogate_weights_of_one_frame_are_zero():
    """All weight on one frame: its deviation from the mean is zero, and 0/0 must not be NaN."""
    values, upstream = torch.tensor([[1.0], [2.0], [6.0]]), torch.tensor([2.0])
    all_on_one = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    assert surrogate_weights(values, upstream, all_on_one, TEMPERATURE).tolist() == [0.0, 0.0, 0.0]


def test_energies_are_sums_of_atomic_energies(potential, positions):
    estimator = BoltzmannEstimator(potential, TEMPERATURE, 3)
    atomic = [[np.array([0.3, -0.7, 0.2]) @ slopes(atom.numpy()) for atom in frame] for frame in positions]
    found = estimator.atomic_energies(positions)
    np.testing.assert_allclose(found.numpy(), atomic, rtol=1e-12)
    np.testing.assert_allclose(estimator.energies(positions).numpy(), np.sum(atomic, axis=1), rtol=1e-12)
    assert not found.requires_grad
    empty = estimator.atomic_energies(positions[:0].float())
    assert (empty.shape, empty.dtype) == ((0, 3), torch.float64)
    assert all(parameter.requires_grad for parameter in potential.module.parameters())


def test_energies_use_the_neighbors_of_each_frame(positions):
    system, strength = System.from_atoms(TRIATOMIC), 0.5
    estimator = BoltzmannEstimator(PairRepulsion(system, strength, cutoff=2.5), TEMPERATURE, 3)
    for frame, energy in zip(positions.numpy(), estimator.energies(positions).tolist(), strict=True):
        lengths = [np.linalg.norm(frame[i] - frame[j]) for i, j in [(0, 1), (0, 2), (1, 2)]]
        expected = sum(2 * strength * max(0.0, 1.0 - length / 2.5) ** 2 for length in lengths)
        assert energy == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n_frames", [0, 1])
def test_estimate_rejects_fewer_than_two_frames(n_frames, potential, positions):
    few = positions[:n_frames]
    message = (
        rf"^the estimator got {n_frames} frame\(s\), but a covariance needs two: record more frames, or use more "
        r"replicas\.$"
    )
    with pytest.raises(ValueError, match=message):
        BoltzmannEstimator(potential, TEMPERATURE).estimate(few, [few[:, 0]], [few[:, 0].sum(0)])


def test_estimate_accepts_two_frames(potential, positions):
    values, targets = [np.array([[1.0], [2.0]])], [np.array([0.0])]
    estimate = BoltzmannEstimator(potential, TEMPERATURE).estimate(positions[:2], tensors(values), tensors(targets))
    assert_agrees(estimate, by_hand(positions, values, targets, [0.5, 0.5], FRAMES[:2]))


def test_estimate_rejects_values_without_target(potential, positions):
    values, targets = observed(N_FRAMES)
    with pytest.raises(ValueError, match=r"zip\(\)"):
        BoltzmannEstimator(potential, TEMPERATURE).estimate(positions, tensors(values), tensors(targets[:1]))


class LimitedMemory(ThreeTerms):
    """Raises an error for more than ``max_frames`` frames at once, and records the number of frames of each call."""

    def __init__(self, max_frames, error):
        super().__init__()
        self.max_frames, self.error, self.calls = max_frames, error, []

    def forward(self, positions):
        self.calls.append(len(positions))
        if len(positions) > self.max_frames:
            raise self.error
        return super().forward(positions)


def limited(max_frames, error):
    return ModulePotential(LimitedMemory(max_frames, error), System.from_atoms(TRIATOMIC))


OUT = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate"), MemoryError()]


@pytest.mark.parametrize("error", OUT, ids=lambda error: type(error).__name__)
def test_chunk_is_halved_when_out_of_memory(error, positions, caplog):
    potential = limited(2, error)
    (values, targets), weights = observed(N_FRAMES), unequal(N_FRAMES)
    estimator = BoltzmannEstimator(potential, TEMPERATURE, chunk=11)
    with caplog.at_level(logging.WARNING, "stable_plugin"):
        estimate = estimator.estimate(positions, tensors(values), tensors(targets), weights=torch.tensor(weights))
    assert_agrees(estimate, by_hand(positions, values, targets, weights, FRAMES))
    assert potential.module.calls == [7, 5, 2, 2, 2, 1], "each frame once, in chunks that fit"
    assert estimator.chunk == 2
    assert [record.getMessage() for record in caplog.records] == [
        f"out of memory: the estimator continues with chunk={chunk} frames per model call." for chunk in (5, 2)
    ]
    estimator.energies(positions)
    assert potential.module.calls[6:] == [2, 2, 2, 1]


def test_chunk_of_one_frame_is_not_halved(positions):
    potential = limited(0, MemoryError("too large"))
    with pytest.raises(MemoryError, match="too large"):
        BoltzmannEstimator(potential, TEMPERATURE, chunk=4).energies(positions)
    assert potential.module.calls == [4, 2, 1]


@pytest.mark.parametrize(("chunk", "calls"), [(7, [7]), (6, [6, 1]), (8, [7])])
def test_chunks_cover_all_frames_and_are_not_empty(chunk, calls, positions):
    potential = limited(99, MemoryError())
    BoltzmannEstimator(potential, TEMPERATURE, chunk).energies(positions)
    assert potential.module.calls == calls


def test_other_errors_are_not_retried(positions):
    potential = limited(2, RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        BoltzmannEstimator(potential, TEMPERATURE, chunk=4).energies(positions)
    assert potential.module.calls == [4]


@pytest.mark.parametrize(("device", "n_atoms", "chunk"), [("cpu", 21, 64), ("cuda", 21, 952), ("cpu", 5000, 1)])
def test_chunk_follows_device_and_atoms(device, n_atoms, chunk):
    potential = SimpleNamespace(device=torch.device(device), system=SimpleNamespace(n_atoms=n_atoms))
    assert BoltzmannEstimator(potential, 300.0).chunk == chunk
    assert BoltzmannEstimator(potential, 300.0, chunk=7).chunk == 7


def test_estimator_repr_shows_its_arguments(potential):
    assert repr(BoltzmannEstimator(potential, 350.0, 8)) == (
        f"BoltzmannEstimator({potential!r}, temperature_K=350, chunk=8)"
    )


@pytest.mark.parametrize("cuts", [(0, 3, 7), (0, 0, 7), (0, 1, 1, 7)], ids=["two", "one without", "three"])
def test_estimate_is_over_all_processes(cuts, positions):
    values, targets = observed(N_FRAMES)
    parts = [slice(*ends) for ends in pairwise(cuts)]
    change = torch.tensor(np.random.default_rng(5).normal(scale=0.05, size=N_FRAMES))
    energies = BoltzmannEstimator(three_terms(), TEMPERATURE).energies(positions)
    weights = reweight(energies, energies + change, TEMPERATURE)

    def work(rank, context):
        part = parts[rank]
        estimator = BoltzmannEstimator(three_terms(), TEMPERATURE, 2, context)
        own = [value[part] for value in tensors(values)]
        return [
            estimator.estimate(positions[part], own, tensors(targets), weights=some) for some in (weights[part], None)
        ]

    expected = [
        by_hand(positions, values, targets, some, FRAMES) for some in (weights.numpy(), np.full(N_FRAMES, 1 / N_FRAMES))
    ]
    for reweighted, equal in ThreadedContexts(len(parts)).run(work):
        assert_agrees(reweighted, expected[0])
        assert_agrees(equal, expected[1])
        assert reweighted.ess_fraction == pytest.approx(ess_fraction(weights), rel=1e-12)
        assert equal.ess_fraction == pytest.approx(1.0, rel=1e-12)


def test_surrogate_weights_are_over_all_processes():
    values = torch.tensor(np.random.default_rng(6).normal(size=(6, 2)))
    upstream, weights = torch.tensor([0.5, -2.0]).double(), torch.tensor(unequal(6))
    whole = surrogate_weights(values, upstream, weights, TEMPERATURE)

    def work(rank, context):
        part = slice(0, 2) if rank == 0 else slice(2, 6)
        return surrogate_weights(values[part], upstream, weights[part], TEMPERATURE, context)

    torch.testing.assert_close(torch.cat(ThreadedContexts(2).run(work)), whole, rtol=1e-12, atol=0)
