"""Steps of the integrators, one by one, against the same written out in plain numpy, atom by atom."""

from math import exp, pi, sqrt

import numpy as np
import pytest
import torch
from ase import Atoms, units
from toys import TRIATOMIC

from stable_plugin import Langevin, NoseHooverChain
from stable_plugin.md.integrators import Integrator, drift, friction, kick
from stable_plugin.md.state import State

MASSES = TRIATOMIC.get_masses()
STIFFNESS = 7.0
KB = units.kB


def pull(positions):
    """Energies and forces of springs to the origin, and an energy that tells replicas apart."""
    return 0.5 * STIFFNESS * positions.square().sum(dim=(1, 2)), -STIFFNESS * positions


def state_at(chain_length=0, n_replicas=2):
    """Some state that is nowhere zero, and the forces that belong to it."""
    random = np.random.default_rng(1)
    positions, velocities = torch.tensor(random.normal(scale=0.2, size=(2, n_replicas, 3, 3)))
    chain = torch.tensor(random.normal(scale=0.05, size=(n_replicas, 2, chain_length)))
    energies, forces = pull(positions)
    return State(positions, velocities, forces, energies, chain)


def after(integrator, state, n_steps, seed=3):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n_steps):
        state = integrator.step(state, torch.tensor(MASSES), pull, generator)
    return state


def expected_baoab(state, n_steps, temperature_K, timestep_fs, friction_per_ps, seed=3):
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
def test_langevin_steps_are_baoab(settings):
    begin = state_at()
    end = after(Langevin(*settings), begin, 5)
    x, v = expected_baoab(begin, 5, *settings)
    np.testing.assert_allclose(end.positions.numpy(), x, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(end.velocities.numpy(), v, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(end.forces.numpy(), -STIFFNESS * x, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(end.energies.numpy(), 0.5 * STIFFNESS * (x**2).sum(axis=(1, 2)), rtol=1e-11)
    assert end.chain is begin.chain


def test_langevin_settings_that_are_usual_are_the_defaults():
    integrator = Langevin()
    assert (integrator.temperature_K, integrator.timestep_fs, integrator.friction_per_ps) == (300.0, 0.5, 1.0)
    assert integrator.timestep == pytest.approx(0.5 * units.fs, rel=1e-12)
    assert integrator.kT == pytest.approx(300.0 * KB, rel=1e-12)
    assert integrator.decay == pytest.approx(exp(-0.0005), rel=1e-12)
    assert integrator.degrees_of_freedom(5) == 15
    assert integrator.initial_chain(torch.zeros(4, 3, 3)).shape == (4, 2, 0)


def half_chain(place, speed, v, timestep, inertia, kT, n_free):
    """Martyna et al., eq. 29 to 35, with three Suzuki-Yoshida weights, for one replica; changes its arguments."""
    w = 1.0 / (2.0 - 2.0 ** (1.0 / 3.0))
    last = len(place) - 1

    def push(k):
        if k == 0:
            return ((MASSES[:, None] * v**2).sum() - n_free * kT) / inertia[0]
        return (inertia[k - 1] * speed[k - 1] ** 2 - kT) / inertia[k]

    for weight in (w, 1.0 - 2.0 * w, w):
        dt = weight * timestep
        speed[last] += dt / 4 * push(last)
        for k in range(last - 1, -1, -1):
            speed[k] *= exp(-dt / 8 * speed[k + 1])
            speed[k] += dt / 4 * push(k)
            speed[k] *= exp(-dt / 8 * speed[k + 1])
        v *= exp(-dt / 2 * speed[0])
        place += dt / 2 * speed
        for k in range(last):
            speed[k] *= exp(-dt / 8 * speed[k + 1])
            speed[k] += dt / 4 * push(k)
            speed[k] *= exp(-dt / 8 * speed[k + 1])
        speed[last] += dt / 4 * push(last)


def chain_masses(temperature_K, relaxation_fs, chain_length, n_free):
    inertia = np.full(chain_length, KB * temperature_K * (relaxation_fs * units.fs / (2 * pi)) ** 2)
    inertia[0] *= n_free
    return inertia


def expected_chain(state, n_steps, temperature_K, timestep_fs, relaxation_fs, chain_length):
    n_free = 3 * len(MASSES) - 3
    kT, dt = KB * temperature_K, timestep_fs * units.fs
    inertia = chain_masses(temperature_K, relaxation_fs, chain_length, n_free)
    x, v = state.positions.numpy().copy(), state.velocities.numpy().copy()
    chain = state.chain.numpy().copy()
    for replica in range(len(x)):
        place, speed = chain[replica]
        for _ in range(n_steps):
            half_chain(place, speed, v[replica], dt, inertia, kT, n_free)
            v[replica] += 0.5 * dt * -STIFFNESS * x[replica] / MASSES[:, None]
            x[replica] += dt * v[replica]
            v[replica] += 0.5 * dt * -STIFFNESS * x[replica] / MASSES[:, None]
            half_chain(place, speed, v[replica], dt, inertia, kT, n_free)
    return x, v, chain


@pytest.mark.parametrize("settings", [(350.0, 0.5, 20.0, 3), (300.0, 1.0, 12.0, 1), (500.0, 0.7, 9.0, 4)])
def test_nose_hoover_steps_are_those_of_martyna_and_coworkers(settings):
    begin = state_at(chain_length=settings[-1])
    end = after(NoseHooverChain(*settings), begin, 5)
    x, v, chain = expected_chain(begin, 5, *settings)
    assert np.abs(chain - begin.chain.numpy()).max() > 1e-3
    np.testing.assert_allclose(end.positions.numpy(), x, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(end.velocities.numpy(), v, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(end.chain.numpy(), chain, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(end.forces.numpy(), -STIFFNESS * x, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(end.energies.numpy(), 0.5 * STIFFNESS * (x**2).sum(axis=(1, 2)), rtol=1e-10)


def test_the_extended_energy_counts_atoms_and_thermostats():
    temperature_K, relaxation_fs, chain_length, n_free = 350.0, 20.0, 3, 6
    state = state_at(chain_length)
    inertia = chain_masses(temperature_K, relaxation_fs, chain_length, n_free)
    found = NoseHooverChain(temperature_K, 0.5, relaxation_fs, chain_length).conserved_energy(
        state, torch.tensor(MASSES)
    )
    for replica in range(2):
        atoms = Atoms("OHH", state.positions[replica].numpy(), velocities=state.velocities[replica].numpy())
        place, speed = state.chain[replica].numpy()
        expected = state.energies[replica].item() + atoms.get_kinetic_energy()
        expected += sum(0.5 * q * s**2 for q, s in zip(inertia, speed, strict=True))
        expected += KB * temperature_K * (n_free * place[0] + place[1] + place[2])
        assert found[replica].item() == pytest.approx(expected, rel=1e-12)


def test_the_chain_begins_at_rest_and_is_as_long_as_asked_for():
    integrator = NoseHooverChain()
    assert (integrator.temperature_K, integrator.timestep_fs, integrator.relaxation_fs) == (300.0, 0.5, 20.0)
    assert torch.equal(integrator.initial_chain(torch.ones(4, 3, 3)), torch.zeros(4, 2, 3))
    assert NoseHooverChain(chain_length=5).initial_chain(torch.ones(2, 3, 3)).shape == (2, 2, 5)
    assert NoseHooverChain(relaxation_fs=2.5).relaxation_fs == 2.5, "five timesteps are enough"


def test_velocities_to_start_from_are_thermal_and_those_of_a_chain_have_no_momentum():
    masses, shape = torch.tensor(MASSES), (20_000, 3, 3)
    drawn, chained = (
        integrator.initial_velocities(shape, masses, torch.Generator().manual_seed(0))
        for integrator in (Langevin(400.0), NoseHooverChain(400.0))
    )
    assert torch.allclose(drawn.var(dim=(0, 2)), KB * 400.0 / masses, rtol=0.03)
    centre = (masses[:, None] * drawn).sum(dim=1, keepdim=True) / masses.sum()
    assert torch.allclose(chained, drawn - centre, rtol=1e-12)


def test_the_parts_of_a_step_are_what_their_formulas_say():
    masses = torch.tensor([2.0, 8.0], dtype=torch.float64)
    v = torch.tensor([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]], dtype=torch.float64)
    f = torch.tensor([[[2.0, 4.0, 6.0], [8.0, 16.0, 24.0]]], dtype=torch.float64)
    half = torch.tensor([[[1.5, 3.0, 4.5], [4.5, 6.0, 7.5]]], dtype=torch.float64)
    assert torch.allclose(kick(v, f, masses, 0.5), half, rtol=1e-15)
    assert torch.equal(drift(f, v, 2.0), f + 2.0 * v)
    # c = 0.6: noise has the weight 0.8 sqrt(kT / m), with kT = 2 that is 0.8 and 0.4.
    noisy = torch.tensor([[[2.2, 4.4, 6.6], [5.6, 9.4, 13.2]]], dtype=torch.float64)
    assert torch.allclose(friction(v, f, masses, 0.6, 2.0), noisy, rtol=1e-14)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Langevin(temperature_K=20001.0), r"^temperature_K=20001\.0 .* > 0 and <= 20000\."),
        (lambda: Langevin(temperature_K=0.0), r"^temperature_K=0\.0 "),
        (lambda: Langevin(timestep_fs=0.0), r"^timestep_fs=0\.0 .* 0\.5 fs is usual with hydrogen, 1 fs at 300 K\.$"),
        (lambda: Langevin(timestep_fs=11.0), r"^timestep_fs=11\.0 "),
        (lambda: Langevin(friction_per_ps=-0.5), r"^friction_per_ps=-0\.5 .*>= 0\."),
        (
            lambda: NoseHooverChain(relaxation_fs=2.4),
            r"^relaxation_fs=2\.4 .*>= 2\.5\. A thermostat faster than a few timesteps is not integrated\.$",
        ),
        (lambda: NoseHooverChain(chain_length=0), r"^chain_length=0 "),
        (lambda: NoseHooverChain(timestep_fs=11.0), r"^timestep_fs=11\.0 "),
    ],
)
def test_limits_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_largest_settings_are_allowed():
    assert Langevin(temperature_K=20000.0, timestep_fs=10.0, friction_per_ps=0.0).temperature_K == 20000.0
    assert Langevin(temperature_K=0.5).temperature_K == 0.5
    assert Langevin(timestep_fs=0.25).timestep_fs == 0.25
    assert NoseHooverChain(chain_length=1).chain_length == 1
    assert issubclass(NoseHooverChain, Integrator)
