"""The Boltzmann estimator against closed answers, explicit covariances, enumeration and finite differences."""

from math import sqrt

import pytest
import torch
from ase.build import molecule
from torch import nn
from toys import TRIATOMIC, Oscillators, as_potential, flat, tiny_mace, triatomic

from stable_plugin import BondLengths, System
from stable_plugin.algorithm.estimator import BoltzmannEstimator
from stable_plugin.algorithm.reweighting import ess_fraction, reweight
from stable_plugin.config import mean_squared_error
from stable_plugin.models import ModulePotential
from stable_plugin.units import BOLTZMANN

TEMPERATURE = 400.0
BETA = 1.0 / (BOLTZMANN * TEMPERATURE)


def mean_itself(mean, target):
    """Return a loss whose upstream gradient is one, so that the estimate is that of the mean."""
    return mean.sum()


@pytest.fixture(scope="module")
def mace_potential(aspirin_frames):
    system = System.from_atoms(aspirin_frames[0])
    return as_potential(tiny_mace(system.numbers, channels=8), system)


@pytest.fixture
def spring_potential():
    return triatomic(3.0)


def rattled(n_frames, amplitude=0.1, seed=0):
    """Frames around the triatomic's rest positions."""
    generator = torch.Generator().manual_seed(seed)
    rest = torch.tensor(TRIATOMIC.positions)
    return rest + amplitude * torch.randn(n_frames, *rest.shape, generator=generator, dtype=torch.float64)


def bound(observable, potential, positions):
    observable.bind(potential.system, positions)
    return observable


def explicit_gradient(potential, positions, values, target, loss=mean_squared_error):
    """∇θ L from its definition: ∇θU frame by frame, -β Cov(g, ∇θU) with n - 1, then the chain rule."""
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
def test_mace_gradient_equals_explicit_covariance(mace_potential, aspirin_positions, chunk):
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
        found.append(estimator.estimate(positions, [values], [values[0]], mean_itself).gradients[0])
    return torch.stack(found)


def test_gradient_of_oscillators_is_exact():
    stiffness = 2.5
    estimates = oscillator_estimates(stiffness, n_batches=60, n_frames=2000, seed=1)
    exact = -1.0 / (BETA * stiffness**2)
    error = (estimates.std() / sqrt(len(estimates))).item()
    assert error < 0.02 * abs(exact)
    assert abs(estimates.mean().item() - exact) < 3 * error


def test_gradient_of_small_samples_is_unbiased():
    stiffness, n_frames = 2.5, 3
    estimates = oscillator_estimates(stiffness, n_batches=3000, n_frames=n_frames, seed=2)
    exact = -1.0 / (BETA * stiffness**2)
    error = (estimates.std() / sqrt(len(estimates))).item()
    assert abs(estimates.mean().item() - exact) < 3 * error
    # The covariance over n would be off by a third, far outside the error.
    assert abs(exact / n_frames) > 6 * error


def test_gradient_of_identical_frames_is_zero(mace_potential, aspirin_positions):
    positions = aspirin_positions[:1].repeat(6, 1, 1)
    observable = bound(BondLengths(), mace_potential, aspirin_positions)
    values = observable.per_frame(positions)
    estimate = BoltzmannEstimator(mace_potential, TEMPERATURE).estimate(positions, [values], [observable.target])
    assert estimate.loss > 0
    assert flat(estimate.gradients).abs().max() < 1e-12


def test_gradient_ignores_an_energy_shift(spring_potential):
    positions = rattled(20)
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
    """Return the slopes of a function, one parameter at a time; the parameters are restored."""
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


def test_gradient_of_enumerated_states_is_exact(generator):
    """Each state once, weighted with its Boltzmann factor: the weighted mean is exact."""
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


def test_reweighted_gradient_is_a_finite_difference(mace_potential, aspirin_positions):
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


def test_mace_energies_are_in_double_precision(mace_potential, aspirin_positions):
    estimator = BoltzmannEstimator(mace_potential, TEMPERATURE, chunk=3)
    positions = aspirin_positions[:7]
    expected, _ = mace_potential.energies_and_forces(positions, mace_potential.edges(positions))
    found = estimator.energies(positions)
    assert found.dtype == torch.float64
    assert not found.requires_grad
    assert torch.allclose(found, expected, rtol=1e-12)


def test_gradients_have_the_dtype_of_the_model(aspirin_positions, aspirin_frames):
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
    """Return the maximum memory of torch's CPU allocator beyond that at the start."""
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


def test_peak_memory_is_independent_of_frames(generator):
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

    peak(16)  # the first backward pass allocates what later ones reuse
    few, many = peak(16), peak(160)
    growth = (many - few) / (160 - 16)
    assert few > 8 * n_parameters, "the measurement sees the gradients themselves"
    assert growth < 8 * n_parameters / 100
    assert (explicit_peak(40) - explicit_peak(16)) / 24 > 8 * n_parameters, "the measurement sees a matrix"
