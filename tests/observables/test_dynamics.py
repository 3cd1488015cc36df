"""Observables of trajectories: closed answers, and brute force."""

from math import pi
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.io import read
from observable_tools import noisy_frames, water_grid

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
    """Return positions of a random walk, and its steps."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(n_frames, n_replicas, n_atoms, 3, generator=generator, dtype=torch.float64)
    return steps.cumsum(dim=0), steps


def gas(n_atoms=3):
    return System.from_atoms(Atoms(f"Ar{n_atoms}", positions=5.0 * np.arange(3 * n_atoms).reshape(-1, 3)))


def bound(observable, system, **reference):
    observable.bind(system, **reference)
    return observable


@pytest.mark.parametrize("remove_drift", [True, False])
def test_msd_agrees_with_brute_force(remove_drift):
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


def test_vacf_agrees_with_brute_force():
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
def test_update_is_independent_of_block_sizes(kind, sizes):
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
def test_compute_of_the_shortest_trajectory(kind):
    positions, velocities = walk(n_frames=11)
    series = bound(kind(1.0, 0.01), gas())
    series.update(positions, velocities)
    assert series.complete
    assert series.compute().isfinite().all()
    assert series.standard_error().isnan().all()


def test_update_keeps_frames_of_the_longest_lag_only():
    positions, _ = walk(n_frames=500)
    msd = bound(MeanSquaredDisplacement(1.0, 0.01), gas())
    for part in positions.split(50):
        msd.update(part)
    assert len(msd._previous) == 10


def test_update_skips_a_replica_once_invalid():
    positions, _ = walk()
    valid = torch.ones(60, 2, dtype=torch.bool)
    valid[25:27, 1] = False  # valid again later, which must not matter
    invalid = positions.clone()
    invalid[25:, 1] = torch.nan
    first, second = (bound(MeanSquaredDisplacement(1.0, 0.01, remove_drift=False), gas()) for _ in range(2))
    for part in ([0, 20], [20, 60]):
        first.update(invalid[slice(*part)], valid=valid[slice(*part)])
    second.update(positions[:, :1])
    second.start_trajectory()
    second.update(positions[:25, 1:])
    assert torch.allclose(first.compute(), second.compute(), rtol=1e-10)


def test_start_trajectory_separates_trajectories():
    positions, _ = walk()
    separate = bound(MeanSquaredDisplacement(1.0, 0.01, remove_drift=False), gas())
    for part in (positions[:30], positions[30:] + 1000.0):
        separate.start_trajectory()
        separate.update(part)
    assert separate.compute().max() < 100.0


def oscillation(period_fs, n_frames=4000, interval_fs=1.0):
    """Return velocities of atoms that oscillate along all axes with one period and random phases."""
    generator = torch.Generator().manual_seed(0)
    phase = 2 * pi * torch.rand(1, 8, 3, 3, generator=generator, dtype=torch.float64)
    time = torch.arange(n_frames, dtype=torch.float64)[:, None, None, None] * interval_fs
    return torch.cos(2 * pi * time / period_fs + phase)


def test_vacf_and_spectrum_of_a_harmonic_oscillator():
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
    """Return every tenth position of argon atoms without forces, from the Langevin integrator."""
    integrator = Langevin(300.0, 5.0, friction_per_ps)
    masses = torch.full((3,), ARGON, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    zeros = torch.zeros(n_replicas, 3, 3, dtype=torch.float64)
    state = State(
        zeros,
        integrator.initial_velocities(zeros.shape, masses, generator),
        zeros,
        zeros[:, 0, 0],
        zeros[:, :2, :0],
        zeros,
    )
    frames = []
    for step in range(n_steps):
        state = integrator.step(state, masses, lambda positions: (zeros[:, 0, 0], zeros), generator)
        if step % 10 == 0:
            frames.append(state.positions)
    return torch.stack(frames)


def test_diffusion_of_free_langevin_particles():
    """D = kT / (m γ), and the standard error agrees with the spread over seeds."""
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


def test_msd_subtracts_the_drift_of_the_system():
    drift = 0.3 * torch.arange(60, dtype=torch.float64)[:, None, None, None].expand(60, 2, 3, 3)
    positions, _ = walk()
    found = []
    for shift in (0.0, drift):
        msd = bound(MeanSquaredDisplacement(1.0, 0.01), gas())
        msd.update(positions + shift)
        found.append(msd.compute())
    assert torch.allclose(*found, rtol=1e-9)


def test_diffusion_and_vacf_of_reference_water():
    """SPC/Fw at 300 K: about 2e-9 m²/s; frames every 20 fs resolve frequencies below 830 /cm."""
    frames = read(Path(__file__).parents[2] / "recipes/data/water_reference.extxyz", ":")
    positions, velocities = trajectory_from_atoms(frames)
    system = System.from_atoms(frames[0])
    diffusion = bound(DiffusionCoefficient(20.0, 1.0, symbols=["O"]), system)
    diffusion.update(positions)
    assert 1.0 < diffusion.compute().item() < 4.0
    vacf = bound(VelocityAutocorrelation(20.0, 0.4, symbols=["O"]), system)
    vacf.update(positions, velocities)
    assert vacf.compute()[1:10].min() < -0.02, "molecules rebound from their cage"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"interval_fs": 0.0}, r"interval_fs=0\.0"),
        ({"interval_fs": 1.0, "max_lag_ps": 0.0001}, r"max_lag_ps=0\.0001"),
        ({"interval_fs": 3.0, "max_lag_ps": 0.01}, r"max_lag_ps=0\.01 ps is not a whole number"),
        ({"interval_fs": 1.0, "max_lag_ps": 0.01, "fit_from_ps": 0.01}, r"fit_from_ps=0\.01"),
    ],
)
def test_init_names_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        DiffusionCoefficient(**arguments)


def test_bind_and_update_reject_bad_input():
    positions, _ = walk(n_frames=6)
    with pytest.raises(
        ValueError, match=r"symbols=\('Xe',\) contains Xe, but the system consists of Ar: pass some of these"
    ):
        bound(MeanSquaredDisplacement(1.0, 0.01, symbols=["Xe"]), gas())
    with pytest.raises(
        ValueError, match=r"max_lag_ps=0\.01 is longer than the trajectory, 0\.005 ps: pass a smaller max_lag_ps"
    ):
        bound(MeanSquaredDisplacement(1.0, 0.01), gas(), positions=positions)
    with pytest.raises(ValueError, match=r"velocities=None, but VelocityAutocorrelation needs velocities: pass them"):
        bound(VelocityAutocorrelation(1.0, 0.01), gas(), positions=positions)
    with pytest.raises(RuntimeError, match=r"has no system yet"):
        MeanSquaredDisplacement(1.0, 0.01).update(positions)


def test_target_before_bind_raises():
    with pytest.raises(RuntimeError, match=r"MeanSquaredDisplacement has no target yet: call bind\(system, positions"):
        _ = MeanSquaredDisplacement(interval_fs=10.0, max_lag_ps=0.04).known_target


@pytest.mark.parametrize(
    "make",
    [VelocityAutocorrelation, PowerSpectrum, MeanSquaredDisplacement, DiffusionCoefficient],
    ids=lambda c: c.__name__,
)
@pytest.mark.parametrize("symbols", [None, ["O"]])
def test_axis_has_one_x_per_value_of_a_correlation(make, symbols):
    water = water_grid()
    observable = make(interval_fs=10.0, max_lag_ps=0.04, symbols=symbols)
    positions = torch.stack([noisy_frames(water, 2, seed) for seed in range(9)])
    observable.bind(System.from_atoms(water), positions, positions)
    observable.update(positions, positions)
    assert len(observable.axis()["x"]) == observable.compute().numel()
    assert observable.mean_absolute_error() == pytest.approx(0.0, abs=1e-12), "the target is this trajectory"
    assert torch.isfinite(observable.standard_error()).all()
    short = make(interval_fs=10.0, max_lag_ps=0.04)
    short.bind(System.from_atoms(water), positions, positions)
    short.update(positions[:6, :1], positions[:6, :1])
    assert torch.isnan(short.standard_error()).all(), "there are no two segments of the longest lag"
