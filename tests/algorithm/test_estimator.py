"""The Boltzmann estimator against closed answers, explicit covariances, enumeration and finite differences."""

from math import sqrt

import pytest
import torch
from ase.build import molecule
from torch import nn
from toys import TRIATOMIC, Oscillators, as_potential, flat, tiny_mace, triatomic

from stable_plugin import BondLengths, DistanceDistribution, System
from stable_plugin.algorithm.estimator import (
    BoltzmannEstimator,
    surrogate_weights,
)
from stable_plugin.algorithm.reweighting import ess_fraction, reweight, uniform_weights
from stable_plugin.config import mean_squared_error
from stable_plugin.models import ModulePotential
from stable_plugin.units import BOLTZMANN

TEMPERATURE = 400.0
BETA = 1.0 / (BOLTZMANN * TEMPERATURE)


def the_mean_itself(mean, target):
    """A loss whose upstream gradient is one: the estimate is then that of the mean."""
    return mean.sum()


@pytest.fixture(scope="module")
def mace_potential(aspirin_frames):
    system = System.from_atoms(aspirin_frames[0])
    return as_potential(tiny_mace(system.numbers, channels=8), system)


@pytest.fixture
def spring_potential():
    return triatomic(3.0)


def rattled(potential, n_frames, amplitude=0.1, seed=0):
    """Frames around the triatomic's rest positions."""
    generator = torch.Generator().manual_seed(seed)
    rest = torch.tensor(TRIATOMIC.positions)
    return rest + amplitude * torch.randn(n_frames, *rest.shape, generator=generator, dtype=torch.float64)


def bound(observable, potential, positions):
    observable.bind(potential.system, positions)
    return observable


def explicit_gradient(potential, positions, values, target, loss=mean_squared_error):
    """∇θ L by the textbook: ∇θU frame by frame, -β Cov(g, ∇θU) with n - 1, then the chain rule."""
    rows = []
    for frame in positions.split(1):
        energy = potential.atomic_energies(frame, potential.edges(frame)).sum()
        gradients = torch.autograd.grad(energy, potential.trainable_parameters(), allow_unused=True)
        rows.append(
            flat(
                torch.zeros_like(parameter) if gradient is None else gradient
                for parameter, gradient in zip(potential.trainable_parameters(), gradients, strict=True)
            )
        )
    energy_gradients = torch.stack(rows)
    mean = values.mean(dim=0).requires_grad_(True)
    (upstream,) = torch.autograd.grad(loss(mean, target), mean)
    deviations = values - values.mean(dim=0)
    covariance = deviations.T @ (energy_gradients - energy_gradients.mean(dim=0)) / (len(positions) - 1)
    return -BETA * upstream @ covariance


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("chunk", [1, 5, 12, 64])
def test_the_gradient_equals_the_explicit_covariance_for_mace(mace_potential, aspirin_positions, chunk):
    positions, reference = aspirin_positions[:12], aspirin_positions[12:]
    observable = bound(BondLengths(), mace_potential, reference)
    values = observable.per_frame(positions)
    expected = explicit_gradient(mace_potential, positions, values, observable.target)
    estimate = BoltzmannEstimator(mace_potential, TEMPERATURE, chunk).estimate(positions, [values], [observable.target])
    assert expected.abs().max() > 0
    assert relative_error(flat(estimate.gradients), expected) < 1e-9
    assert estimate.loss == pytest.approx((values.mean(0) - observable.target).square().mean().item(), rel=1e-12)
    assert torch.allclose(estimate.mean, values.mean(0), rtol=1e-13)
    assert estimate.ess_fraction == pytest.approx(1.0)


def test_the_gradient_equals_the_explicit_covariance_for_springs(spring_potential):
    positions = rattled(spring_potential, 40)
    observable = bound(BondLengths(target=[1.1, 0.9]), spring_potential, positions)
    values = observable.per_frame(positions)
    expected = explicit_gradient(spring_potential, positions, values, observable.target)
    for chunk in (1, 7, 40):
        estimator = BoltzmannEstimator(spring_potential, TEMPERATURE, chunk)
        found = flat(estimator.estimate(positions, [values], [observable.target]).gradients)
        assert relative_error(found, expected) < 1e-9


def test_gradients_have_the_order_and_shapes_of_the_trainable_parameters(mace_potential, aspirin_positions):
    values = bound(BondLengths(), mace_potential, aspirin_positions).per_frame(aspirin_positions[:3])
    first = mace_potential.trainable_parameters()[0]
    first.requires_grad_(False)
    try:
        estimate = BoltzmannEstimator(mace_potential, TEMPERATURE).estimate(
            aspirin_positions[:3], [values], [values[0]]
        )
        trainable = mace_potential.trainable_parameters()
    finally:
        first.requires_grad_(True)
    assert all(parameter is not first for parameter in trainable)
    assert [gradient.shape for gradient in estimate.gradients] == [parameter.shape for parameter in trainable]


def test_a_parameter_that_the_energy_does_not_use_gets_a_zero_gradient(spring_potential):
    spring_potential.module.idle = nn.Parameter(torch.ones(3, dtype=torch.float64))
    positions = rattled(spring_potential, 5)
    values = bound(BondLengths(), spring_potential, positions).per_frame(positions)
    gradients = BoltzmannEstimator(spring_potential, TEMPERATURE).estimate(positions, [values], [values[0]]).gradients
    assert gradients[0].abs() > 0
    assert torch.equal(gradients[1], torch.zeros(3, dtype=torch.float64))


def test_losses_and_gradients_of_several_observables_are_added(spring_potential):
    positions = rattled(spring_potential, 30)
    estimator = BoltzmannEstimator(spring_potential, TEMPERATURE)
    observables = [
        bound(BondLengths([1.1, 0.9]), spring_potential, positions),
        bound(DistanceDistribution(3.0, 0.1, 0.1), spring_potential, rattled(spring_potential, 30, 0.05)),
    ]
    values = [observable.per_frame(positions) for observable in observables]
    targets = [observable.target for observable in observables]
    together = estimator.estimate(positions, values, targets)
    apart = [estimator.estimate(positions, [v], [t]) for v, t in zip(values, targets, strict=True)]
    assert together.loss == pytest.approx(sum(part.loss for part in apart), rel=1e-12)
    assert relative_error(flat(together.gradients), sum(flat(part.gradients) for part in apart)) < 1e-12
    assert torch.equal(together.mean, torch.cat([part.mean for part in apart]))


def test_a_loss_of_the_users_own_goes_through_the_chain_rule(spring_potential):
    def loss(mean, target):
        return (mean[0] * mean[1] - target.sum()).abs() ** 1.5

    positions = rattled(spring_potential, 25)
    values = bound(BondLengths(), spring_potential, positions).per_frame(positions)
    target = torch.tensor([0.3, 0.4], dtype=torch.float64)
    estimate = BoltzmannEstimator(spring_potential, TEMPERATURE).estimate(positions, [values], [target], loss)
    expected = explicit_gradient(spring_potential, positions, values, target, loss)
    assert relative_error(flat(estimate.gradients), expected) < 1e-9
    assert estimate.loss == pytest.approx(loss(values.mean(0), target).item())


def oscillator_estimates(stiffness, n_batches, n_frames, seed):
    """d<x²>/dk from independent batches of exact samples of six oscillators, (n_batches,)."""
    system = System.from_atoms(molecule("N2"))
    estimator = BoltzmannEstimator(ModulePotential(Oscillators(stiffness), system), TEMPERATURE, chunk=10_000)
    generator = torch.Generator().manual_seed(seed)
    deviation = sqrt(1.0 / (BETA * stiffness))
    found = []
    for _ in range(n_batches):
        positions = deviation * torch.randn(n_frames, 2, 3, generator=generator, dtype=torch.float64)
        values = positions.square().mean(dim=(1, 2))[:, None]
        found.append(estimator.estimate(positions, [values], [values[0]], the_mean_itself).gradients[0])
    return torch.stack(found)


def test_the_harmonic_oscillator_has_its_closed_answer():
    stiffness = 2.5
    estimates = oscillator_estimates(stiffness, n_batches=60, n_frames=2000, seed=1)
    exact = -1.0 / (BETA * stiffness**2)
    error = (estimates.std() / sqrt(len(estimates))).item()
    assert error < 0.02 * abs(exact)
    assert abs(estimates.mean().item() - exact) < 3 * error


def test_small_samples_are_unbiased():
    stiffness, n_frames = 2.5, 3
    estimates = oscillator_estimates(stiffness, n_batches=3000, n_frames=n_frames, seed=2)
    exact = -1.0 / (BETA * stiffness**2)
    error = (estimates.std() / sqrt(len(estimates))).item()
    assert abs(estimates.mean().item() - exact) < 3 * error
    # The covariance over n would be off by a third, far outside the error.
    assert abs(exact / n_frames) > 6 * error


def test_identical_frames_give_no_gradient(mace_potential, aspirin_positions):
    positions = aspirin_positions[:1].repeat(6, 1, 1)
    observable = bound(BondLengths(), mace_potential, aspirin_positions)
    values = observable.per_frame(positions)
    estimate = BoltzmannEstimator(mace_potential, TEMPERATURE).estimate(positions, [values], [observable.target])
    assert estimate.loss > 0
    assert flat(estimate.gradients).abs().max() < 1e-12


def test_a_constant_added_to_the_energy_changes_no_gradient(spring_potential):
    positions = rattled(spring_potential, 20)
    values = bound(BondLengths(), spring_potential, positions).per_frame(positions)
    parameter = spring_potential.module.log_k

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = spring_potential.module

        def forward(self, positions):
            return self.inner(positions) + 1000.0 * parameter

    shifted = ModulePotential(Shifted(), spring_potential.system)
    plain, moved = (
        flat(BoltzmannEstimator(potential, TEMPERATURE).estimate(positions, [values], [values[0]]).gradients)
        for potential in (spring_potential, shifted)
    )
    assert relative_error(moved, plain) < 1e-9


class Polynomial(nn.Module):
    """An energy with several parameters, not linear in them."""

    def __init__(self, parameters):
        super().__init__()
        self.theta = nn.Parameter(torch.as_tensor(parameters, dtype=torch.float64))

    def forward(self, positions):
        x, y = positions[:, 0, 0], positions[:, 1, 1]
        a, b, c = self.theta
        return 0.02 * torch.exp(a) * x.square() + 0.03 * b * torch.sin(x * y + c) + 0.01 * a * c * y


def central_differences(function, parameters, step=1e-5):
    """The slopes of a function, one parameter at a time; the parameters are put back."""
    slopes = torch.zeros_like(parameters)
    for index in range(len(parameters)):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameters[index] += sign * step
                values.append(function())
                parameters[index] -= sign * step
        slopes[index] = (values[0] - values[1]) / (2 * step)
    return slopes


def test_enumerated_states_have_the_derivatives_of_the_exact_mean(generator):
    """Every state once, weighted with its Boltzmann factor: the weighted mean is the exact one."""
    states = torch.randn(9, 2, 3, generator=generator, dtype=torch.float64)
    values = torch.stack([states[:, 0, 0], states[:, 1, 1].square(), states[:, 1, 0]], dim=1)
    target = torch.tensor([0.2, -0.1, 0.4], dtype=torch.float64)
    potential = ModulePotential(Polynomial([0.3, 0.8, -0.5]), System.from_atoms(molecule("N2")))
    estimator = BoltzmannEstimator(potential, TEMPERATURE, chunk=4)

    def boltzmann():
        factors = torch.exp(-BETA * potential.module(states))
        return factors / factors.sum()

    def exact_loss():
        return ((boltzmann() @ values) - target).square().mean().item()

    weights = reweight(estimator.energies(states), torch.zeros(9), TEMPERATURE)
    assert torch.allclose(weights, boltzmann(), rtol=1e-12)
    estimate = estimator.estimate(states, [values], [target], weights=weights)
    assert torch.allclose(estimate.mean, boltzmann().detach() @ values, rtol=1e-12)
    assert estimate.loss == pytest.approx(exact_loss(), rel=1e-12)
    # The estimator divides by 1 - Σω², which makes it unbiased for samples; an enumeration is not a sample.
    found = flat(estimate.gradients) * (1.0 - weights.square().sum())
    assert relative_error(found, central_differences(exact_loss, potential.module.theta)) < 1e-7


def test_the_reweighted_gradient_is_that_of_the_self_normalised_mean(mace_potential, aspirin_positions):
    positions, reference = aspirin_positions[:10], aspirin_positions[10:]
    observable = bound(BondLengths(), mace_potential, reference)
    values = observable.per_frame(positions)
    estimator = BoltzmannEstimator(mace_potential, TEMPERATURE, chunk=10)
    sampled = estimator.energies(positions)
    parameters = mace_potential.trainable_parameters()
    before = [parameter.detach().clone() for parameter in parameters]
    direction_generator = torch.Generator().manual_seed(3)
    directions = [torch.randn(p.shape, generator=direction_generator, dtype=p.dtype) for p in parameters]

    def move(amount):
        with torch.no_grad():
            for parameter, start, direction in zip(parameters, before, directions, strict=True):
                parameter.copy_(start + amount * direction)

    def loss_at(amount):
        move(amount)
        weights = reweight(estimator.energies(positions), sampled, TEMPERATURE)
        return (weights @ values - observable.target).square().mean().item()

    here, step = 0.1, 1e-4
    slope = (loss_at(here + step) - loss_at(here - step)) / (2 * step)
    move(here)
    weights = reweight(estimator.energies(positions), sampled, TEMPERATURE)
    estimate = estimator.estimate(positions, [values], [observable.target], weights=weights)
    move(0.0)
    assert 0.1 < ess_fraction(weights) < 0.99
    projected = (flat(estimate.gradients) @ flat(directions)) * (1.0 - weights.square().sum())
    assert projected.item() == pytest.approx(slope, rel=1e-5)


def test_reweighting_follows_the_formula_and_survives_large_energies():
    sampled = torch.tensor([0.10, 0.20, 0.05], dtype=torch.float64)
    present = torch.tensor([0.12, 0.15, 0.09], dtype=torch.float64)
    factors = torch.exp(-BETA * (present - sampled))
    expected = factors / factors.sum()
    assert torch.allclose(reweight(present, sampled, TEMPERATURE), expected, rtol=1e-12)
    assert torch.allclose(reweight(present - 1e5, sampled, TEMPERATURE), expected, rtol=1e-6)
    assert ess_fraction(expected) == pytest.approx((1.0 / (expected**2).sum() / 3).item(), rel=1e-12)


def test_a_potential_that_did_not_change_uses_the_whole_sample(mace_potential, aspirin_positions):
    estimator = BoltzmannEstimator(mace_potential, TEMPERATURE)
    energies = estimator.energies(aspirin_positions[:8])
    weights = reweight(estimator.energies(aspirin_positions[:8]), energies, TEMPERATURE)
    assert torch.allclose(weights, uniform_weights(8, energies), rtol=1e-12)
    assert ess_fraction(weights) == pytest.approx(1.0, rel=1e-12)


def test_the_effective_share_of_unequal_weights():
    assert ess_fraction(torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)) == 0.25
    assert ess_fraction(torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=torch.float64)) == 0.5


def test_one_frame_with_all_the_weight_gives_zero_and_not_a_nan():
    values = torch.tensor([[1.0], [2.0], [4.0]], dtype=torch.float64)
    weights = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    assert torch.equal(
        surrogate_weights(values, torch.ones(1), weights, TEMPERATURE), torch.zeros(3, dtype=torch.float64)
    )


def test_equal_surrogate_weights_are_those_of_the_unbiased_covariance():
    values = torch.tensor([[1.0, 0.0], [2.0, 1.0], [6.0, -1.0]], dtype=torch.float64)
    upstream = torch.tensor([0.5, 2.0], dtype=torch.float64)
    found = surrogate_weights(values, upstream, uniform_weights(3, values), TEMPERATURE)
    # v·g is 0.5, 3 and 1, with mean 1.5.
    expected = -BETA * torch.tensor([-1.0, 1.5, -0.5], dtype=torch.float64) / 2
    assert torch.allclose(found, expected, rtol=1e-12)


def test_energies_are_interaction_energies_in_double_precision(mace_potential, aspirin_positions):
    estimator = BoltzmannEstimator(mace_potential, TEMPERATURE, chunk=3)
    positions = aspirin_positions[:7]
    expected, _ = mace_potential.energies_and_forces(positions, mace_potential.edges(positions))
    found = estimator.energies(positions)
    assert found.dtype == torch.float64
    assert not found.requires_grad
    assert torch.allclose(found, expected, rtol=1e-12)


def test_a_single_precision_model_gets_gradients_of_its_own_kind_that_agree(aspirin_positions, aspirin_frames):
    system = System.from_atoms(aspirin_frames[0])
    gradients = []
    for dtype in (torch.float64, torch.float32):
        potential = as_potential(tiny_mace(system.numbers).to(dtype), system)
        positions = aspirin_positions[:10].to(dtype)
        values = bound(BondLengths(), potential, positions).per_frame(positions)
        target = torch.ones(values.shape[1], dtype=torch.float64)
        found = BoltzmannEstimator(potential, TEMPERATURE).estimate(positions, [values], [target]).gradients
        assert {gradient.dtype for gradient in found} == {dtype}
        gradients.append(flat(found).double())
    assert relative_error(gradients[1], gradients[0]) < 1e-3


def test_one_frame_is_refused(spring_potential):
    positions = rattled(spring_potential, 1)
    values = bound(BondLengths(), spring_potential, positions).per_frame(positions)
    with pytest.raises(ValueError, match=r"got 1 frame.*Record more frames or replicas"):
        BoltzmannEstimator(spring_potential, TEMPERATURE).estimate(positions, [values], [values[0]])


class Wide(nn.Module):
    """More parameters than a few frames have coordinates."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 2000), nn.Tanh(), nn.Linear(2000, 16), nn.Tanh(), nn.Linear(16, 1))
        self.double()

    def forward(self, positions):
        return self.layers(positions.flatten(1)).squeeze(1)


def peak_bytes(function):
    """Most memory that torch's CPU allocator held at a time beyond what it held at the start."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    changes = [
        (event.start_ns(), event.nbytes())
        for event in recorded.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    held = peak = 0
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        held += change
        peak = max(peak, held)
    return peak


def test_peak_memory_does_not_grow_with_frames_times_parameters(generator):
    potential = ModulePotential(Wide(), System.from_atoms(molecule("N2")))
    estimator = BoltzmannEstimator(potential, TEMPERATURE, chunk=8)
    n_parameters = sum(parameter.numel() for parameter in potential.trainable_parameters())

    def peak(n_frames):
        positions = torch.randn(n_frames, 2, 3, generator=generator, dtype=torch.float64)
        values = positions[:, 0]
        return peak_bytes(lambda: estimator.estimate(positions, [values], [values[0]]))

    def explicit_peak(n_frames):
        positions = torch.randn(n_frames, 2, 3, generator=generator, dtype=torch.float64)
        return peak_bytes(lambda: explicit_gradient(potential, positions, positions[:, 0], positions[0, 0]))

    peak(16)  # the first backward pass allocates what later ones find
    few, many = peak(16), peak(160)
    growth = (many - few) / (160 - 16)
    assert few > 8 * n_parameters, "the measurement sees the gradients themselves"
    assert growth < 8 * n_parameters / 100
    assert (explicit_peak(40) - explicit_peak(16)) / 24 > 8 * n_parameters, "the measurement sees a matrix"
