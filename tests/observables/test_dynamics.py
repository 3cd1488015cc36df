"""Observables of trajectories: against closed answers and brute force."""

from math import pi

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.io import read

from stable_plugin import (
    DiffusionCoefficient,
    Langevin,
    MeanSquaredDisplacement,
    PowerSpectrum,
    System,
    VelocityAutocorrelation,
)
from stable_plugin.md import State
from stable_plugin.observables import trajectory_from_atoms
from stable_plugin.observables.dynamics import LIGHT_CM_PER_FS
from stable_plugin.units import BOLTZMANN, PS

ARGON = 39.95


def walk(n_frames=60, n_replicas=2, n_atoms=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(n_frames, n_replicas, n_atoms, 3, generator=generator, dtype=torch.float64)
    return steps.cumsum(dim=0), steps


def gas(n_atoms=3):
    return System.from_atoms(Atoms(f"Ar{n_atoms}", positions=5.0 * np.arange(3 * n_atoms).reshape(-1, 3)))


def bound(observable, system, **reference):
    observable.bind(system, **reference)
    return observable


@pytest.mark.parametrize("remove_drift", [True, False])
def test_mean_square_displacements_are_those_of_brute_force(remove_drift):
    water = System.from_atoms(molecule("H2O"))
    positions, _ = walk()
    msd = bound(
        MeanSquaredDisplacement(2.0, 0.02, symbols=["H"], remove_drift=remove_drift), water, positions=positions
    )
    x, masses = positions.numpy(), water.masses.numpy()
    if remove_drift:
        x = x - np.einsum("n,frnx->frx", masses, x)[:, :, None] / masses.sum()
    expected = [((x[lag:, :, 1:] - x[: len(x) - lag, :, 1:]) ** 2).sum(-1).mean() for lag in range(11)]
    np.testing.assert_allclose(msd.target.numpy(), expected, rtol=1e-9)
    assert msd.lags_ps[-1].item() == pytest.approx(0.02)
    assert msd.name == "mean_squared_displacement_H"


def test_velocity_autocorrelations_are_those_of_brute_force():
    water = System.from_atoms(molecule("H2O"))
    _, velocities = walk(seed=3)
    vacf = bound(
        VelocityAutocorrelation(1.0, 0.01, remove_drift=False), water, positions=velocities, velocities=velocities
    )
    v, masses = velocities.numpy(), water.masses.numpy()
    raw = [np.einsum("frnx,frnx,n->", v[lag:], v[: 60 - lag], masses) / (60 - lag) for lag in range(11)]
    np.testing.assert_allclose(vacf.target.numpy(), np.array(raw) / raw[0], rtol=1e-9)


@pytest.mark.parametrize("kind", [MeanSquaredDisplacement, PowerSpectrum, DiffusionCoefficient])
@pytest.mark.parametrize("sizes", [[60], [1] * 60, [7, 30, 3, 20], [10, 50]])
def test_the_result_does_not_depend_on_how_the_trajectory_is_cut(kind, sizes):
    positions, velocities = walk()
    whole, parts = (bound(kind(1.0, 0.01), gas()) for _ in range(2))
    whole.update(positions, velocities)
    for part, speeds in zip(positions.split(sizes), velocities.split(sizes), strict=True):
        parts.update(part, speeds)
    assert torch.allclose(whole.compute(), parts.compute(), rtol=1e-10)
    assert torch.allclose(whole.standard_error(), parts.standard_error(), rtol=1e-9)


@pytest.mark.parametrize(
    "kind", [VelocityAutocorrelation, MeanSquaredDisplacement, PowerSpectrum, DiffusionCoefficient]
)
def test_a_trajectory_as_short_as_the_longest_lag_has_a_value_without_an_error(kind):
    positions, velocities = walk(n_frames=11)
    series = bound(kind(1.0, 0.01), gas())
    series.update(positions, velocities)
    assert series.complete
    assert series.compute().isfinite().all()
    assert series.standard_error().isnan().all()


def test_memory_holds_no_more_frames_than_the_longest_lag():
    positions, _ = walk(n_frames=500)
    msd = bound(MeanSquaredDisplacement(1.0, 0.01), gas())
    for part in positions.split(50):
        msd.update(part)
    assert len(msd._previous) == 10


def test_frames_after_a_replica_became_invalid_count_no_more():
    positions, _ = walk()
    valid = torch.ones(60, 2, dtype=torch.bool)
    valid[25:27, 1] = False  # and it does not come back
    broken = positions.clone()
    broken[25:, 1] = torch.nan
    first, second = (bound(MeanSquaredDisplacement(1.0, 0.01, remove_drift=False), gas()) for _ in range(2))
    for part in ([0, 20], [20, 60]):
        first.update(broken[slice(*part)], valid=valid[slice(*part)])
    second.update(positions[:, :1])
    second.start_trajectory()
    second.update(positions[:25, 1:])
    assert torch.allclose(first.compute(), second.compute(), rtol=1e-10)


def test_trajectories_that_are_not_connected_are_not_compared_with_each_other():
    positions, _ = walk()
    apart = bound(MeanSquaredDisplacement(1.0, 0.01, remove_drift=False), gas())
    for part in (positions[:30], positions[30:] + 1000.0):
        apart.start_trajectory()
        apart.update(part)
    assert apart.compute().max() < 100.0


def oscillation(period_fs, n_frames=4000, interval_fs=1.0):
    """Atoms that oscillate along different axes with one period, at random phases."""
    generator = torch.Generator().manual_seed(0)
    phase = 2 * pi * torch.rand(1, 8, 3, 3, generator=generator, dtype=torch.float64)
    time = torch.arange(n_frames, dtype=torch.float64)[:, None, None, None] * interval_fs
    return torch.cos(2 * pi * time / period_fs + phase)


def test_a_harmonic_oscillator_correlates_as_a_cosine_and_has_one_line():
    velocities = oscillation(period_fs=20.0)
    vacf = bound(VelocityAutocorrelation(1.0, 0.1, remove_drift=False), gas())
    vacf.update(velocities, velocities)
    expected = torch.cos(2 * pi * torch.arange(101, dtype=torch.float64) / 20.0)
    assert torch.allclose(vacf.compute(), expected, atol=2e-3)
    spectrum = bound(PowerSpectrum(1.0, 1.0, remove_drift=False), gas())
    spectrum.update(velocities, velocities)
    found = spectrum.compute()
    peak = spectrum.wavenumbers[found.argmax()].item()
    assert peak == pytest.approx(1 / (20.0 * LIGHT_CM_PER_FS), abs=20)  # 1668 / cm
    step = (spectrum.wavenumbers[1] - spectrum.wavenumbers[0]).item()
    assert found.sum().item() * step == pytest.approx(1.0)
    near = (spectrum.wavenumbers - peak).abs() < 60
    assert found[near].sum() * step > 0.95


def free_particles(seed, n_replicas=40, n_steps=6000, friction_per_ps=20.0):
    """Argon atoms without forces, by the project's own integrator; every tenth position."""
    integrator = Langevin(300.0, 5.0, friction_per_ps)
    masses = torch.full((3,), ARGON, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    zeros = torch.zeros(n_replicas, 3, 3, dtype=torch.float64)
    state = State(
        zeros, integrator.initial_velocities(zeros.shape, masses, generator), zeros, zeros[:, 0, 0], zeros[:, :2, :0]
    )
    frames = []
    for step in range(n_steps):
        state = integrator.step(state, masses, lambda positions: (zeros[:, 0, 0], zeros), generator)
        if step % 10 == 0:
            frames.append(state.positions)
    return torch.stack(frames)


def test_free_particles_diffuse_with_kT_over_m_gamma_and_the_error_is_honest():
    found, errors = [], []
    exact = 10.0 * BOLTZMANN * 300.0 / ARGON * PS**2 / 20.0  # Å²/ps is 10 of 1e-9 m²/s
    system = System.from_atoms(Atoms("Ar3", positions=5.0 * np.eye(3)))
    for seed in range(6):
        diffusion = bound(DiffusionCoefficient(50.0, 1.0, remove_drift=False), system)
        diffusion.update(free_particles(seed))
        found.append(diffusion.compute().item())
        errors.append(diffusion.standard_error().item())
        assert abs(found[-1] - exact) < 3 * errors[-1] + 1e-9
    assert 0.4 < np.std(found, ddof=1) / np.mean(errors) < 2.5
    assert np.mean(errors) < 0.05 * exact


def test_the_drift_of_the_whole_system_is_left_out():
    drift = 0.3 * torch.arange(60, dtype=torch.float64)[:, None, None, None].expand(60, 2, 3, 3)
    positions, _ = walk()
    found = []
    for shift in (0.0, drift):
        msd = bound(MeanSquaredDisplacement(1.0, 0.01), gas())
        msd.update(positions + shift)
        found.append(msd.compute())
    assert torch.allclose(*found, rtol=1e-9)


def test_a_wrapped_ase_trajectory_is_unwrapped():
    random = np.random.default_rng(0)
    cell = 6.0 * np.array([[1.0, 0.0, 0.0], [0.4, 1.0, 0.0], [-0.2, 0.3, 1.0]])
    path = np.cumsum(random.normal(scale=0.4, size=(80, 4, 3)), axis=0)
    frames = []
    for positions in path:
        atoms = Atoms("Ar4", positions=positions, cell=cell, pbc=True)
        atoms.set_velocities(positions)
        atoms.wrap()
        frames.append(atoms)
    positions, velocities = trajectory_from_atoms(frames)
    assert positions.shape == (80, 1, 4, 3)
    moved = (positions[:, 0] - positions[0, 0]).numpy()
    np.testing.assert_allclose(moved, path - path[0], atol=1e-9)
    np.testing.assert_allclose(velocities[:, 0].numpy(), path, atol=1e-9)
    assert trajectory_from_atoms([Atoms("Ar", [[0, 0, 0]])])[1] is None


def test_the_reference_water_diffuses_and_vibrates_as_its_model_does():
    """SPC/Fw at 300 K: about 2e-9 m²/s; frames every 20 fs show what is slower than 830 /cm."""
    from pathlib import Path

    frames = read(Path(__file__).parents[2] / "recipes/data/water_reference.extxyz", ":")
    positions, velocities = trajectory_from_atoms(frames)
    system = System.from_atoms(frames[0])
    diffusion = bound(DiffusionCoefficient(20.0, 1.0, symbols=["O"]), system)
    diffusion.update(positions)
    assert 1.0 < diffusion.compute().item() < 4.0
    vacf = bound(VelocityAutocorrelation(20.0, 0.4, symbols=["O"]), system)
    vacf.update(positions, velocities)
    assert vacf.compute()[1:10].min() < -0.02, "the cage pushes back"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"interval_fs": 0.0}, r"interval_fs=0\.0"),
        ({"interval_fs": 1.0, "max_lag_ps": 0.0001}, r"max_lag_ps=0\.0001"),
        ({"interval_fs": 3.0, "max_lag_ps": 0.01}, r"max_lag_ps=0\.01 ps is not a whole number"),
        ({"interval_fs": 1.0, "max_lag_ps": 0.01, "fit_from_ps": 0.01}, r"fit_from_ps=0\.01"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DiffusionCoefficient(**arguments)


def test_what_does_not_fit_is_refused():
    positions, _ = walk(n_frames=6)
    with pytest.raises(ValueError, match=r"names Xe, but the system consists of Ar"):
        bound(MeanSquaredDisplacement(1.0, 0.01, symbols=["Xe"]), gas())
    with pytest.raises(
        ValueError, match=r"max_lag_ps=0\.01 is longer than the trajectory, which reaches over 0\.005 ps"
    ):
        bound(MeanSquaredDisplacement(1.0, 0.01), gas(), positions=positions)
    with pytest.raises(ValueError, match=r"velocities=None, but VelocityAutocorrelation"):
        bound(VelocityAutocorrelation(1.0, 0.01), gas(), positions=positions)
    with pytest.raises(RuntimeError, match=r"has no system yet"):
        MeanSquaredDisplacement(1.0, 0.01).update(positions)
    with pytest.raises(ValueError, match=r"frames is empty"):
        trajectory_from_atoms([])
