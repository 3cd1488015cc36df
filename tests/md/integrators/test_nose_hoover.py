"""The Nosé-Hoover chain against the same steps in plain numpy, atom by atom."""

from math import exp, pi, sqrt

import numpy as np
import pytest
import torch
from ase import Atoms, units
from harmonic import MASSES, STIFFNESS, after, assert_forces_match, random_state
from toys import TRIATOMIC, triatomic

from stable_plugin import Langevin, NonFinite, NoseHooverChain
from stable_plugin.md import Integrator, Simulator
from stable_plugin.units import BOLTZMANN, FS

KB = units.kB


def half_chain(xi, v_xi, v, timestep, inertia, kT, n_free):
    """Martyna et al., eq. 29 to 35, with three Suzuki-Yoshida weights, for one replica; changes its arguments."""
    w = 1.0 / (2.0 - 2.0 ** (1.0 / 3.0))
    last = len(xi) - 1

    def acceleration(k):
        if k == 0:
            return ((MASSES[:, None] * v**2).sum() - n_free * kT) / inertia[0]
        return (inertia[k - 1] * v_xi[k - 1] ** 2 - kT) / inertia[k]

    for weight in (w, 1.0 - 2.0 * w, w):
        dt = weight * timestep
        v_xi[last] += dt / 4 * acceleration(last)
        for k in range(last - 1, -1, -1):
            v_xi[k] *= exp(-dt / 8 * v_xi[k + 1])
            v_xi[k] += dt / 4 * acceleration(k)
            v_xi[k] *= exp(-dt / 8 * v_xi[k + 1])
        v *= exp(-dt / 2 * v_xi[0])
        xi += dt / 2 * v_xi
        for k in range(last):
            v_xi[k] *= exp(-dt / 8 * v_xi[k + 1])
            v_xi[k] += dt / 4 * acceleration(k)
            v_xi[k] *= exp(-dt / 8 * v_xi[k + 1])
        v_xi[last] += dt / 4 * acceleration(last)


def chain_masses(temperature_K, relaxation_fs, chain_length, n_free):
    inertia = np.full(chain_length, KB * temperature_K * (relaxation_fs * units.fs / (2 * pi)) ** 2)
    inertia[0] *= n_free
    return inertia


def expected_steps(state, n_steps, temperature_K, timestep_fs, relaxation_fs, chain_length):
    n_free = 3 * len(MASSES) - 3
    kT, dt = KB * temperature_K, timestep_fs * units.fs
    inertia = chain_masses(temperature_K, relaxation_fs, chain_length, n_free)
    x, v = state.positions.numpy().copy(), state.velocities.numpy().copy()
    chain = state.chain.numpy().copy()
    for replica in range(len(x)):
        xi, v_xi = chain[replica]
        for _ in range(n_steps):
            half_chain(xi, v_xi, v[replica], dt, inertia, kT, n_free)
            v[replica] += 0.5 * dt * -STIFFNESS * x[replica] / MASSES[:, None]
            x[replica] += dt * v[replica]
            v[replica] += 0.5 * dt * -STIFFNESS * x[replica] / MASSES[:, None]
            half_chain(xi, v_xi, v[replica], dt, inertia, kT, n_free)
    return x, v, chain


@pytest.mark.parametrize("settings", [(350.0, 0.5, 20.0, 3), (300.0, 1.0, 12.0, 1), (500.0, 0.7, 9.0, 4)])
def test_nose_hoover_step_matches_martyna(settings):
    start = random_state(chain_length=settings[-1])
    end = after(NoseHooverChain(*settings), start, 5)
    x, v, chain = expected_steps(start, 5, *settings)
    assert np.abs(chain - start.chain.numpy()).max() > 1e-3
    np.testing.assert_allclose(end.positions.numpy(), x, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(end.velocities.numpy(), v, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(end.chain.numpy(), chain, rtol=1e-10, atol=1e-12)
    assert_forces_match(end, x, rtol=1e-10, atol=1e-12)
    assert end.cell is start.cell


def test_conserved_energy_sums_atoms_and_chain():
    temperature_K, relaxation_fs, chain_length, n_free = 350.0, 20.0, 3, 6
    state = random_state(chain_length)
    inertia = chain_masses(temperature_K, relaxation_fs, chain_length, n_free)
    integrator = NoseHooverChain(temperature_K, 0.5, relaxation_fs, chain_length)
    found = integrator.conserved_energy(state, torch.tensor(MASSES))
    for replica in range(2):
        atoms = Atoms("OHH", state.positions[replica].numpy(), velocities=state.velocities[replica].numpy())
        xi, v_xi = state.chain[replica].numpy()
        expected = state.energies[replica].item() + atoms.get_kinetic_energy()
        expected += sum(0.5 * q * s**2 for q, s in zip(inertia, v_xi, strict=True))
        expected += KB * temperature_K * (n_free * xi[0] + xi[1] + xi[2])
        assert found[replica].item() == pytest.approx(expected, rel=1e-12)


def test_nose_hoover_defaults_and_initial_chain():
    integrator = NoseHooverChain()
    assert (integrator.temperature_K, integrator.timestep_fs, integrator.relaxation_fs) == (300.0, 0.5, 20.0)
    assert NoseHooverChain(300.0, 0.5).relaxation_fs == 20.0
    assert NoseHooverChain(300.0, 0.5, relaxation_fs=30.0).relaxation_fs == 30.0
    assert torch.equal(integrator.initial_chain(torch.ones(4, 3, 3)), torch.zeros(4, 2, 3))
    assert NoseHooverChain(chain_length=5).initial_chain(torch.ones(2, 3, 3)).shape == (2, 2, 5)
    assert NoseHooverChain(relaxation_fs=2.5).relaxation_fs == 2.5, "five timesteps are enough"


def test_nose_hoover_repr_shows_arguments():
    expected = "NoseHooverChain(temperature_K=450.0, timestep_fs=0.5, chain_length=4)"
    assert repr(NoseHooverChain(450.0, chain_length=4)) == expected


def test_thermostat_masses_follow_the_period():
    masses = NoseHooverChain(300.0, 0.5, relaxation_fs=25.0, chain_length=3).thermostat_masses(5)
    inertia = BOLTZMANN * 300.0 * (25.0 * FS / (2 * np.pi)) ** 2
    assert masses == pytest.approx([12 * inertia, inertia, inertia], rel=1e-12)


def test_initial_velocities_have_no_momentum():
    masses, shape = torch.tensor(MASSES), (20_000, 3, 3)
    drawn, chained = (
        integrator.initial_velocities(shape, masses, torch.Generator().manual_seed(0))
        for integrator in (Langevin(400.0), NoseHooverChain(400.0))
    )
    center = (masses[:, None] * drawn).sum(dim=1, keepdim=True) / masses.sum()
    assert torch.allclose(chained, drawn - center, rtol=1e-12)


def triatomic_simulator(integrator, every=1):
    detector, check_every_fs = NonFinite(), every * integrator.timestep_fs
    return Simulator(triatomic(20.0), integrator, detector, check_every_fs=check_every_fs, block_steps=100)


def triatomic_start(n_replicas):
    return torch.tensor(TRIATOMIC.positions).repeat(n_replicas, 1, 1)


def test_nose_hoover_keeps_center_of_mass_at_rest(generator):
    simulator = triatomic_simulator(NoseHooverChain(300.0, 0.5), every=10)
    masses = simulator.potential.system.masses
    start = simulator.prepare(triatomic_start(16), generator)
    window = simulator.run(start, 1000, 10, generator)
    thermal = sqrt(masses.sum().item() * BOLTZMANN * 300.0)
    for velocities in (start.velocities, window.velocities):
        momentum = (masses[:, None] * velocities).sum(dim=-2)
        assert momentum.abs().max() < 1e-10 * thermal
    assert start.velocities.abs().max() > 0


def test_nose_hoover_is_reversible():
    simulator = triatomic_simulator(NoseHooverChain(300.0, 0.25, relaxation_fs=20.0))
    start = simulator.prepare(triatomic_start(4), torch.Generator().manual_seed(0))
    one, other = (simulator.run(start, 400, 100, torch.Generator().manual_seed(seed)).end for seed in (1, 2))
    assert torch.equal(one.positions, other.positions)
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64)[None, :, None]
    reverse = one.replace(velocities=-one.velocities, chain=one.chain * sign)
    back = simulator.run(reverse, 400, 100, torch.Generator()).end
    assert (one.positions - start.positions).abs().max() > 0.01
    assert torch.allclose(back.positions, start.positions, atol=1e-8)
    assert torch.allclose(back.velocities, -start.velocities, atol=1e-8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"relaxation_fs": 1.0}, r"^relaxation_fs=1\.0 .*>= 2\.5"),
        (
            {"relaxation_fs": 2.4},
            r"^relaxation_fs=2\.4 .*>= 2\.5\. A thermostat faster than a few timesteps is not integrated\.$",
        ),
        ({"chain_length": 0}, r"^chain_length=0 is out of range: \w+ an integer >= 1"),
        ({"timestep_fs": 11.0}, r"^timestep_fs=11\.0 "),
    ],
)
def test_nose_hoover_rejects_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        NoseHooverChain(**arguments)


def test_nose_hoover_accepts_chain_of_one():
    assert NoseHooverChain(chain_length=1).chain_length == 1
    assert issubclass(NoseHooverChain, Integrator)
