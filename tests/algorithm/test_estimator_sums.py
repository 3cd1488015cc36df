"""The estimator's sums written out in plain Python, sample by sample: whole frames, sites, chunks, several processes."""

import logging
from itertools import pairwise
from math import exp
from threading import Barrier, Thread

import numpy as np
import pytest
import torch
from ase import units
from torch import nn
from toys import TRIATOMIC, PairRepulsion

from stable_plugin import System
from stable_plugin.algorithm.estimator import (
    BoltzmannEstimator,
    ess_fraction,
    mean_squared_error,
    reweighting,
    surrogate_weights,
    uniform_weights,
)
from stable_plugin.md.neighborhoods import Members
from stable_plugin.models import ModulePotential

TEMPERATURE = 350.0
BETA = 1.0 / (units.kB * TEMPERATURE)
N_FRAMES = 7


class ThreeTerms(nn.Module):
    """An energy for each atom, U = a x² + b sin(y) + c x z, and a parameter that it does not use."""

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


@pytest.fixture
def potential():
    return ModulePotential(ThreeTerms(), System.from_atoms(TRIATOMIC))


@pytest.fixture
def positions():
    return torch.tensor(np.random.default_rng(0).normal(size=(N_FRAMES, 3, 3)))


def observed(n_samples):
    """Two observables, of two values and of one; some samples lack some values."""
    random = np.random.default_rng(1)
    values = [random.normal(size=(n_samples, 2)), random.normal(size=(n_samples, 1))]
    values[0][2, 1] = values[0][4, 0] = values[1][5, 0] = np.nan
    return values, [np.array([0.4, -0.3]), np.array([0.9])]


def unequal(n_samples):
    weights = np.random.default_rng(2).uniform(0.5, 2.0, size=n_samples)
    return weights / weights.sum()


def by_hand(positions, values, targets, weights, samples):
    """Loss, means, and the gradient for (a, b, c); ``samples`` are lists of (frame, atom)."""
    loss, means, pulls = 0.0, [], np.zeros(len(samples))
    for value, target in zip(values, targets, strict=True):
        for k in range(len(target)):
            there = [i for i in range(len(samples)) if not np.isnan(value[i, k])]
            total = sum(weights[i] for i in there)
            held = {i: weights[i] / total for i in there}
            mean = sum(held[i] * value[i, k] for i in there)
            means.append(mean)
            loss += (mean - target[k]) ** 2 / len(target)
            upstream = 2.0 * (mean - target[k]) / len(target)
            for i in there:
                unbiased = held[i] * (value[i, k] - mean) / (1.0 - sum(each**2 for each in held.values()))
                pulls[i] -= BETA * upstream * unbiased
    gradient = sum(
        pull * slopes(positions[frame, atom].numpy())
        for pull, sample in zip(pulls, samples, strict=True)
        for frame, atom in sample
    )
    return loss, means, gradient


def agree(estimate, expected):
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
def test_whole_frames_of_unequal_weight(potential, positions, chunk):
    (values, targets), weights = observed(N_FRAMES), unequal(N_FRAMES)
    estimate = BoltzmannEstimator(potential, TEMPERATURE, chunk).estimate(
        positions, tensors(values), tensors(targets), weights=torch.tensor(weights)
    )
    agree(estimate, by_hand(positions, values, targets, weights, FRAMES))
    assert estimate.ess_fraction == pytest.approx(1.0 / (N_FRAMES * sum(weights**2)), rel=1e-12)


def test_weights_are_equal_and_frames_whole_unless_given(potential, positions):
    values, targets = observed(N_FRAMES)
    estimate = BoltzmannEstimator(potential, TEMPERATURE).estimate(positions, tensors(values), tensors(targets))
    agree(estimate, by_hand(positions, values, targets, np.full(N_FRAMES, 1 / N_FRAMES), FRAMES))
    assert estimate.ess_fraction == pytest.approx(1.0, rel=1e-12)


def test_sites_that_share_an_atom(potential, positions):
    (values, targets), weights = observed(len(SITES)), unequal(len(SITES))
    estimator = BoltzmannEstimator(potential, TEMPERATURE, 2)
    given, equal = (
        estimator.estimate(positions, tensors(values), tensors(targets), weights=some, members=members(SITES))
        for some in (torch.tensor(weights), None)
    )
    agree(given, by_hand(positions, values, targets, weights, SITES))
    agree(equal, by_hand(positions, values, targets, np.full(len(SITES), 1 / len(SITES)), SITES))


def test_the_estimate_of_a_loss_that_is_given_and_of_the_usual_one_differ(potential, positions):
    def cubes(mean, target):
        assert mean.dtype == target.dtype
        return (mean - target).pow(3).sum()

    values, targets = [np.random.default_rng(3).normal(size=(N_FRAMES, 1))], [np.array([0.2], dtype=np.float32)]
    estimate = BoltzmannEstimator(potential, TEMPERATURE).estimate(positions, tensors(values), tensors(targets), cubes)
    away = values[0].mean() - float(targets[0][0])
    loss, _, gradient = by_hand(positions, values, targets, np.full(N_FRAMES, 1 / N_FRAMES), FRAMES)
    assert estimate.loss == pytest.approx(away**3, rel=1e-6)
    assert loss == pytest.approx(away**2, rel=1e-6)
    # The chain rule: 3 (mean - target)² in place of 2 (mean - target).
    np.testing.assert_allclose(estimate.gradients[0].tolist(), 1.5 * away * gradient[:2], rtol=1e-6)


def test_the_parts_are_what_their_formulas_say():
    assert uniform_weights(4, torch.ones(1)).tolist() == [0.25] * 4
    assert uniform_weights(4, torch.ones(1)).dtype == torch.float64
    assert uniform_weights(1, torch.ones(1)).tolist() == [1.0]
    assert ess_fraction(torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)) == pytest.approx(1 / (3 * 0.375))
    now, then = [0.1, 0.3, 0.2], [0.15, 0.2, 0.25]
    factors = [exp(-BETA * (new - old)) for new, old in zip(now, then, strict=True)]
    found = reweighting(torch.tensor(now).double(), torch.tensor(then).double(), TEMPERATURE)
    np.testing.assert_allclose(found.numpy(), np.array(factors) / sum(factors), rtol=1e-6)
    assert mean_squared_error(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 2.0])).item() == 2.5


def test_differences_of_large_energies_are_taken_in_double_precision():
    now = torch.tensor([-4.0e6, -4.0e6, -4.0e6], dtype=torch.float32)
    then = torch.tensor([-4.0e6, -4.0e6 + 0.05, -4.0e6 - 0.05], dtype=torch.float64)
    found = reweighting(now, then, TEMPERATURE)
    factors = np.exp(BETA * np.array([0.0, 0.05, -0.05]))
    np.testing.assert_allclose(found.numpy(), factors / factors.sum(), rtol=1e-6)
    assert torch.isfinite(reweighting(now, then + 1e6, TEMPERATURE)).all(), "exp() of the largest is one"


def test_surrogate_weights_of_single_precision_values_are_double():
    values, upstream = torch.tensor([[1.0], [2.0], [6.0]]), torch.tensor([2.0])
    found = surrogate_weights(values, upstream, torch.full((3,), 1 / 3, dtype=torch.float64), TEMPERATURE)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), -BETA * np.array([-2.0, -1.0, 3.0]), rtol=1e-12)
    all_on_one = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    assert not surrogate_weights(values, upstream, all_on_one, TEMPERATURE).any()


def test_energies_are_those_of_the_atoms_of_each_frame(potential, positions):
    estimator = BoltzmannEstimator(potential, TEMPERATURE, 3)
    atomic = [[np.array([0.3, -0.7, 0.2]) @ slopes(atom.numpy()) for atom in frame] for frame in positions]
    found = estimator.atomic_energies(positions)
    np.testing.assert_allclose(found.numpy(), atomic, rtol=1e-12)
    np.testing.assert_allclose(estimator.energies(positions).numpy(), np.sum(atomic, axis=1), rtol=1e-12)
    assert not found.requires_grad
    none = estimator.atomic_energies(positions[:0].float())
    assert (none.shape, none.dtype) == ((0, 3), torch.float64)
    assert all(parameter.requires_grad for parameter in potential.module.parameters())


def test_the_model_is_told_who_is_near_whom(positions):
    system, strength = System.from_atoms(TRIATOMIC), 0.5
    estimator = BoltzmannEstimator(PairRepulsion(system, strength, cutoff=2.5), TEMPERATURE, 3)
    for frame, energy in zip(positions.numpy(), estimator.energies(positions).tolist(), strict=True):
        lengths = [np.linalg.norm(frame[i] - frame[j]) for i, j in [(0, 1), (0, 2), (1, 2)]]
        expected = sum(2 * strength * max(0.0, 1.0 - length / 2.5) ** 2 for length in lengths)
        assert energy == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n_frames", [0, 1])
def test_a_covariance_of_fewer_than_two_samples_is_refused(potential, positions, n_frames):
    few = positions[:n_frames]
    with pytest.raises(
        ValueError,
        match=rf"^the estimator got {n_frames} frame\(s\): a covariance needs two\. Record more frames or replicas\.$",
    ):
        BoltzmannEstimator(potential, TEMPERATURE).estimate(few, [few[:, 0]], [few[:, 0].sum(0)])


def test_two_samples_are_enough(potential, positions):
    values, targets = [np.array([[1.0], [2.0]])], [np.array([0.0])]
    estimate = BoltzmannEstimator(potential, TEMPERATURE).estimate(positions[:2], tensors(values), tensors(targets))
    agree(estimate, by_hand(positions, values, targets, [0.5, 0.5], FRAMES[:2]))


def test_as_many_values_as_targets(potential, positions):
    values, targets = observed(N_FRAMES)
    with pytest.raises(ValueError, match=r"zip\(\)"):
        BoltzmannEstimator(potential, TEMPERATURE).estimate(positions, tensors(values), tensors(targets[:1]))


class Narrow(ThreeTerms):
    """Holds a few frames at a time, as a device with little memory does."""

    def __init__(self, room, error):
        super().__init__()
        self.room, self.error, self.calls = room, error, []

    def forward(self, positions):
        self.calls.append(len(positions))
        if len(positions) > self.room:
            raise self.error
        return super().forward(positions)


OUT = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate"), MemoryError()]


@pytest.mark.parametrize("error", OUT, ids=lambda error: type(error).__name__)
def test_chunks_are_halved_for_good_where_memory_does_not_suffice(positions, error, caplog):
    narrow = ModulePotential(Narrow(2, error), System.from_atoms(TRIATOMIC))
    (values, targets), weights = observed(N_FRAMES), unequal(N_FRAMES)
    estimator = BoltzmannEstimator(narrow, TEMPERATURE, chunk=11)
    with caplog.at_level(logging.WARNING, "stable_plugin"):
        estimate = estimator.estimate(positions, tensors(values), tensors(targets), weights=torch.tensor(weights))
    agree(estimate, by_hand(positions, values, targets, weights, FRAMES))
    assert narrow.module.calls == [7, 5, 2, 2, 2, 1], "each frame once, with no more than was found to fit"
    assert estimator.chunk == 2
    assert [record.getMessage() for record in caplog.records] == [
        f"out of memory: the estimator goes on with chunk={chunk} frames per model call." for chunk in (5, 2)
    ]
    estimator.energies(positions)
    assert narrow.module.calls[6:] == [2, 2, 2, 1]


def test_a_single_frame_that_does_not_fit_is_an_error(positions):
    narrow = ModulePotential(Narrow(0, MemoryError("too large")), System.from_atoms(TRIATOMIC))
    with pytest.raises(MemoryError, match="too large"):
        BoltzmannEstimator(narrow, TEMPERATURE, chunk=4).energies(positions)
    assert narrow.module.calls == [4, 2, 1]


@pytest.mark.parametrize(("chunk", "calls"), [(7, [7]), (6, [6, 1]), (8, [7])])
def test_the_model_is_called_with_whole_chunks_and_never_with_nothing(positions, chunk, calls):
    recording = ModulePotential(Narrow(99, MemoryError()), System.from_atoms(TRIATOMIC))
    BoltzmannEstimator(recording, TEMPERATURE, chunk).energies(positions)
    assert recording.module.calls == calls


def test_other_errors_are_not_tried_again(positions):
    narrow = ModulePotential(Narrow(2, RuntimeError("shapes differ")), System.from_atoms(TRIATOMIC))
    with pytest.raises(RuntimeError, match="shapes differ"):
        BoltzmannEstimator(narrow, TEMPERATURE, chunk=4).energies(positions)
    assert narrow.module.calls == [4]


class Threads:
    """Several processes, played by threads that wait for each other."""

    def __init__(self, size):
        self.items, self.barrier = [None] * size, Barrier(size, timeout=20)

    def run(self, work):
        """``work(rank, processes)`` of each, by rank."""
        results = [None] * len(self.items)

        def one(rank):
            try:
                results[rank] = work(rank, Member(self, rank))
            except BaseException:
                self.barrier.abort()
                raise

        threads = [Thread(target=one, args=(rank,)) for rank in range(len(self.items))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(result is not None for result in results)
        return results


class Member:
    """What :class:`stable_plugin.runtime.distributed.DistributedContext` offers the estimator."""

    def __init__(self, threads, rank):
        self.threads, self.rank = threads, rank

    def _all(self, item):
        self.threads.items[self.rank] = item
        self.threads.barrier.wait()
        items = list(self.threads.items)
        self.threads.barrier.wait()
        return items

    def sum(self, tensor):
        return torch.stack(self._all(tensor)).sum(dim=0)

    def max(self, tensor):
        return torch.stack(self._all(tensor)).amax(dim=0)

    def count(self, number, device):
        assert device == torch.device("cpu")
        return sum(self._all(number))

    def sum_all(self, tensors):
        return [sum(parts) for parts in zip(*self._all(tensors), strict=True)]


@pytest.mark.parametrize("cuts", [(0, 3, 7), (0, 0, 7), (0, 1, 1, 7)], ids=["two", "one has none", "three"])
def test_samples_of_several_processes_are_one_sample(positions, cuts):
    values, targets = observed(N_FRAMES)
    parts = [slice(*ends) for ends in pairwise(cuts)]
    then = torch.tensor(np.random.default_rng(5).normal(scale=0.05, size=N_FRAMES))
    plain = BoltzmannEstimator(ModulePotential(ThreeTerms(), System.from_atoms(TRIATOMIC)), TEMPERATURE)
    energies = plain.energies(positions)
    weights = reweighting(energies, energies + then, TEMPERATURE)

    def work(rank, processes):
        part = parts[rank]
        mine = ModulePotential(ThreeTerms(), System.from_atoms(TRIATOMIC))
        estimator = BoltzmannEstimator(mine, TEMPERATURE, 2, processes)
        found = estimator.energies(positions[part])
        changed = reweighting(found, found + then[part], TEMPERATURE, processes)
        torch.testing.assert_close(changed, weights[part], rtol=1e-12, atol=0)
        equal = uniform_weights(len(found), found, processes)
        assert equal.tolist() == [1 / N_FRAMES] * len(found)
        given = [value[part] for value in tensors(values)]
        return [
            estimator.estimate(positions[part], given, tensors(targets), weights=some) for some in (changed, None)
        ] + [ess_fraction(changed, processes)]

    expected = [
        by_hand(positions, values, targets, some, FRAMES) for some in (weights.numpy(), np.full(N_FRAMES, 1 / N_FRAMES))
    ]
    for reweighted, equal, share in Threads(len(parts)).run(work):
        agree(reweighted, expected[0])
        agree(equal, expected[1])
        assert reweighted.ess_fraction == share == pytest.approx(ess_fraction(weights), rel=1e-12)
        assert equal.ess_fraction == pytest.approx(1.0, rel=1e-12)


def test_surrogate_weights_are_about_the_mean_of_all_processes():
    values = torch.tensor(np.random.default_rng(6).normal(size=(6, 2)))
    upstream, weights = torch.tensor([0.5, -2.0]).double(), torch.tensor(unequal(6))
    whole = surrogate_weights(values, upstream, weights, TEMPERATURE)

    def work(rank, processes):
        part = slice(0, 2) if rank == 0 else slice(2, 6)
        return surrogate_weights(values[part], upstream, weights[part], TEMPERATURE, processes)

    torch.testing.assert_close(torch.cat(Threads(2).run(work)), whole, rtol=1e-12, atol=0)
