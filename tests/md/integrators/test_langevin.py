"""Langevin dynamics against the same steps in plain numpy, atom by atom."""

from math import exp, sqrt

import numpy as np
import pytest
import torch
from ase import units
from harmonic import MASSES, STIFFNESS, after, assert_forces_match, random_state
from toys import TRIATOMIC, triatomic

from stable_plugin import Langevin, NonFinite
from stable_plugin.md import Integrator, Simulator
from stable_plugin.md.integrators import drift, kick, ornstein_uhlenbeck

KB = units.kB


def baoab(state, n_steps, temperature_K, timestep_fs, friction_per_ps, seed=3):
    """Leimkuhler and Matthews, B A O A B, for one coordinate after the other."""
    generator = torch.Generator().manual_seed(seed)
    x, v = state.positions.numpy().copy(), state.velocities.numpy().copy()
    dt, c = timestep_fs * units.fs, exp(-friction_per_ps * timestep_fs / 1000.0)
    for _ in range(n_steps):
        xi = torch.randn(x.shape, generator=generator, dtype=torch.float64).numpy()
        for index in np.ndindex(*x.shape):
            m = MASSES[index[1]]
            v[index] += 0.5 * dt * -STIFFNESS * x[index] / m
            x[index] += 0.5 * dt * v[index]
            v[index] = c * v[index] + sqrt((1.0 - c**2) * KB * temperature_K / m) * xi[index]
            x[index] += 0.5 * dt * v[index]
            v[index] += 0.5 * dt * -STIFFNESS * x[index] / m
    return x, v


@pytest.mark.parametrize("settings", [(450.0, 0.7, 30.0), (300.0, 0.5, 0.0), (20.0, 2.0, 400.0)])
def test_langevin_step_matches_baoab(settings):
    start = random_state()
    end = after(Langevin(*settings), start, 5)
    x, v = baoab(start, 5, *settings)
    np.testing.assert_allclose(end.positions.numpy(), x, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(end.velocities.numpy(), v, rtol=1e-11, atol=1e-13)
    assert_forces_match(end, x, rtol=1e-11, atol=1e-13)
    assert end.chain is start.chain
    assert end.cell is start.cell


def test_langevin_defaults():
    integrator = Langevin()
    assert (integrator.temperature_K, integrator.timestep_fs, integrator.friction_per_ps) == (300.0, 0.5, 1.0)
    assert integrator.timestep == pytest.approx(0.5 * units.fs, rel=1e-12)
    assert integrator.kT == pytest.approx(300.0 * KB, rel=1e-12)
    assert integrator.decay == pytest.approx(exp(-0.0005), rel=1e-12)
    assert integrator.degrees_of_freedom(5) == 15
    assert integrator.initial_chain(torch.zeros(4, 3, 3)).shape == (4, 2, 0)


def test_langevin_repr_shows_arguments():
    expected = "Langevin(temperature_K=450.0, timestep_fs=0.7, friction_per_ps=30.0)"
    assert repr(Langevin(450.0, 0.7, 30.0)) == expected


def test_langevin_initial_velocities_are_thermal():
    masses = torch.tensor(MASSES)
    drawn = Langevin(400.0).initial_velocities((20_000, 3, 3), masses, torch.Generator().manual_seed(0))
    assert torch.allclose(drawn.var(dim=(0, 2)), KB * 400.0 / masses, rtol=0.03)


def test_parts_of_the_splitting():
    masses = torch.tensor([2.0, 8.0], dtype=torch.float64)
    v = torch.tensor([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]], dtype=torch.float64)
    f = torch.tensor([[[2.0, 4.0, 6.0], [8.0, 16.0, 24.0]]], dtype=torch.float64)
    half = torch.tensor([[[1.5, 3.0, 4.5], [4.5, 6.0, 7.5]]], dtype=torch.float64)
    assert torch.allclose(kick(v, f, masses, 0.5), half, rtol=1e-15)
    assert torch.equal(drift(f, v, 2.0), f + 2.0 * v)
    # c = 0.6: noise has the weight 0.8 sqrt(kT / m), with kT = 2 that is 0.8 and 0.4.
    noisy = torch.tensor([[[2.2, 4.4, 6.6], [5.6, 9.4, 13.2]]], dtype=torch.float64)
    assert torch.allclose(ornstein_uhlenbeck(v, f, masses, 0.6, 2.0), noisy, rtol=1e-14)


def velocity_verlet(positions, velocities, masses, stiffness, timestep, n_steps):
    """Two springs from atom 0, rest length 1 Å, in plain numpy, one molecule."""

    def forces(x):
        total = np.zeros_like(x)
        for other in (1, 2):
            arm = x[other] - x[0]
            length = np.sqrt((arm**2).sum())
            force = stiffness * (length - 1.0) * arm / length
            total[0] += force
            total[other] -= force
        return total

    x, v = positions.copy(), velocities.copy()
    f = forces(x)
    for _ in range(n_steps):
        v = v + 0.5 * timestep * f / masses[:, None]
        x = x + timestep * v
        f = forces(x)
        v = v + 0.5 * timestep * f / masses[:, None]
    return x, v


def triatomic_simulator(potential, integrator, every=1):
    return Simulator(potential, integrator, NonFinite(), check_every_fs=every * integrator.timestep_fs, block_steps=100)


def triatomic_start(n_replicas):
    return torch.tensor(TRIATOMIC.positions).repeat(n_replicas, 1, 1)


def test_langevin_frictionless_is_velocity_verlet(generator):
    potential = triatomic(20.0)
    simulator = triatomic_simulator(potential, Langevin(600.0, 0.4, friction_per_ps=0.0), every=5)
    start = simulator.prepare(triatomic_start(3), generator)
    end = simulator.run(start, 200, 5, generator).end
    for replica in range(3):
        positions, velocities = velocity_verlet(
            start.positions[replica].numpy(),
            start.velocities[replica].numpy(),
            TRIATOMIC.get_masses(),
            potential.module.stiffness,
            0.4 * units.fs,
            200,
        )
        assert np.abs(positions - TRIATOMIC.positions).max() > 0.1
        np.testing.assert_allclose(end.positions[replica].numpy(), positions, atol=1e-10)
        np.testing.assert_allclose(end.velocities[replica].numpy(), velocities, atol=1e-10)


def langevin_end(seed, run_seed=5):
    simulator = triatomic_simulator(triatomic(10.0), Langevin(300.0, 0.5, friction_per_ps=5.0))
    start = simulator.prepare(triatomic_start(4), torch.Generator().manual_seed(seed))
    return simulator.run(start, 60, 20, torch.Generator().manual_seed(run_seed)).end


def test_langevin_same_seed_gives_same_bits():
    first, second = langevin_end(seed=1), langevin_end(seed=1)
    assert all(torch.equal(mine, other) for mine, other in zip(first.tensors(), second.tensors(), strict=True))


def test_langevin_seed_changes_trajectory():
    first = langevin_end(seed=1)
    assert not torch.equal(first.positions, langevin_end(seed=2).positions)
    assert not torch.equal(first.positions, langevin_end(seed=1, run_seed=6).positions)


def test_langevin_noise_differs_between_replicas():
    end = langevin_end(seed=1)
    assert len({tuple(replica.flatten().tolist()) for replica in end.velocities}) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature_K": 20001.0}, r"^temperature_K=20001\.0 .* > 0 and <= 20000\."),
        ({"temperature_K": 0.0}, r"^temperature_K=0\.0 is out of range"),
        ({"temperature_K": float("nan")}, r"^temperature_K=nan is out of range"),
        ({"timestep_fs": 0.0}, r"^timestep_fs=0\.0 .* 0\.5 fs is usual with hydrogen, 1 fs at 300 K\.$"),
        ({"timestep_fs": -1.0}, r"^timestep_fs=-1\.0 .*0\.5 fs is usual"),
        ({"timestep_fs": 11.0}, r"^timestep_fs=11\.0 "),
        ({"timestep_fs": 100.0}, r"^timestep_fs=100\.0 .*<= 10"),
        ({"friction_per_ps": -0.5}, r"^friction_per_ps=-0\.5 .*>= 0\."),
        ({"friction_per_ps": -1.0}, r"^friction_per_ps=-1\.0 .*>= 0\."),
    ],
)
def test_langevin_rejects_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        Langevin(**arguments)


def test_langevin_accepts_limits():
    assert Langevin(temperature_K=20000.0, timestep_fs=10.0, friction_per_ps=0.0).temperature_K == 20000.0
    assert Langevin(temperature_K=0.5).temperature_K == 0.5
    assert Langevin(timestep_fs=0.25).timestep_fs == 0.25
    assert issubclass(Langevin, Integrator)
