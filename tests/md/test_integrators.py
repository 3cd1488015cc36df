"""BAOAB and the Nosé-Hoover chain against closed answers and an independent implementation."""

from math import sqrt

import numpy as np
import pytest
import torch
from ase import Atoms, units
from toys import TRIATOMIC, Oscillators, Springs, triatomic

from stable_plugin import Langevin, NonFinite, NoseHooverChain, System
from stable_plugin.md import Simulator
from stable_plugin.md.state import kinetic_energy, kinetic_temperature, maxwell_boltzmann
from stable_plugin.models import ModulePotential
from stable_plugin.units import BOLTZMANN, FS, PS


def simulator(potential, integrator, every=1):
    return Simulator(potential, integrator, NonFinite(), check_every_fs=every * integrator.timestep_fs, block_steps=100)


def triatomic_start(n_replicas):
    return torch.tensor(TRIATOMIC.positions).repeat(n_replicas, 1, 1)


def aspirin_springs(atoms):
    """Aspirin with all its bonds as equal springs, softer than real ones."""
    system = System.from_atoms(atoms)
    positions = torch.tensor(atoms.positions)
    lengths = (positions[system.bonds[:, 0]] - positions[system.bonds[:, 1]]).norm(dim=-1)
    return ModulePotential(Springs(system.bonds, 5.0, lengths), system)


def test_baoab_samples_the_positions_of_oscillators_exactly_even_at_a_long_timestep(generator):
    """Other splittings of the same step are off by (dt ω)² / 4, that is 6 %, here."""
    timestep_fs, temperature = 1.0, 300.0
    omega = 0.5 / (timestep_fs * FS)
    atoms = Atoms("HCNOF" * 8, positions=np.arange(120.0).reshape(40, 3))
    system = System.from_atoms(atoms)
    potential = ModulePotential(Oscillators(omega**2, system.masses), system)
    integrator = Langevin(temperature, timestep_fs, friction_per_ps=500.0)
    simulation = simulator(potential, integrator, every=8)
    start = simulation.prepare(torch.zeros(64, 40, 3, dtype=torch.float64), generator)
    start = simulation.run(start, 200, 8, generator).end
    window = simulation.run(start, 2400, 8, generator)

    squares = window.positions.square() * (system.masses[:, None] * omega**2) / (BOLTZMANN * temperature)
    per_oscillator = squares.mean(dim=0).flatten()
    error = (per_oscillator.std() / sqrt(len(per_oscillator))).item()
    assert error < 0.003
    assert abs(per_oscillator.mean().item() - 1.0) < 0.01
    # Light and heavy atoms alike.
    by_atom = squares.mean(dim=(0, 1, 3)).reshape(8, 5).mean(dim=0)
    assert (by_atom - 1.0).abs().max() < 0.02
    # The velocities do carry an error of (dt ω)² / 4, which tells the scheme from its relatives.
    kinetic = (window.velocities.square() * system.masses[:, None]).mean() / (BOLTZMANN * temperature)
    assert kinetic.item() == pytest.approx(1.0 - 0.25 * 0.5**2, abs=0.01)


def test_langevin_keeps_a_molecule_at_its_temperature(aspirin_frames, generator):
    potential = aspirin_springs(aspirin_frames[0])
    simulation = simulator(potential, Langevin(450.0, 0.5, friction_per_ps=50.0), every=10)
    positions = torch.tensor(aspirin_frames[0].positions).repeat(60, 1, 1)
    # From a cold start: the thermostat has to do it.
    start = simulation.prepare(positions, generator, torch.zeros_like(positions))
    start = simulation.run(start, 400, 10, generator).end
    window = simulation.run(start, 1200, 10, generator)
    temperatures = kinetic_temperature(window.velocities, potential.system.masses)
    per_replica = temperatures.mean(dim=0)
    assert (per_replica.std() / sqrt(60)).item() < 0.006 * 450
    assert temperatures.mean().item() == pytest.approx(450.0, rel=0.02)
    # The canonical spread of the kinetic energy of 63 degrees of freedom.
    assert temperatures.std().item() == pytest.approx(450.0 * sqrt(2 / 63), rel=0.1)


def test_free_particles_forget_their_velocities_at_the_rate_of_the_friction(generator):
    system = System.from_atoms(TRIATOMIC)
    potential = ModulePotential(Oscillators(0.0), system)
    simulation = simulator(potential, Langevin(300.0, 1.0, friction_per_ps=20.0))
    start = simulation.prepare(torch.zeros(4000, 3, 3, dtype=torch.float64), generator)
    window = simulation.run(start, 50, 50, generator)
    scaled = [v * system.masses.sqrt()[:, None] for v in (start.velocities, window.velocities[0])]
    correlation = (scaled[0] * scaled[1]).mean() / scaled[0].square().mean()
    assert correlation.item() == pytest.approx(np.exp(-20.0 * 0.05), abs=0.02)


def velocity_verlet(positions, velocities, masses, stiffness, timestep, n_steps):
    """Two springs from atom 0, rest length 1 Å, in plain numpy, one molecule."""

    def forces(x):
        total = np.zeros_like(x)
        for other in (1, 2):
            arm = x[other] - x[0]
            length = np.sqrt((arm**2).sum())
            pull = stiffness * (length - 1.0) * arm / length
            total[0] += pull
            total[other] -= pull
        return total

    x, v = positions.copy(), velocities.copy()
    f = forces(x)
    for _ in range(n_steps):
        v = v + 0.5 * timestep * f / masses[:, None]
        x = x + timestep * v
        f = forces(x)
        v = v + 0.5 * timestep * f / masses[:, None]
    return x, v


def test_langevin_without_friction_is_velocity_verlet(generator):
    potential = triatomic(20.0)
    integrator = Langevin(600.0, 0.4, friction_per_ps=0.0)
    simulation = simulator(potential, integrator, every=5)
    start = simulation.prepare(triatomic_start(3), generator)
    end = simulation.run(start, 200, 5, generator).end
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
    potential = triatomic(10.0)
    simulation = simulator(potential, Langevin(300.0, 0.5, friction_per_ps=5.0))
    start = simulation.prepare(triatomic_start(4), torch.Generator().manual_seed(seed))
    return simulation.run(start, 60, 20, torch.Generator().manual_seed(run_seed)).end


def test_the_same_seed_gives_the_same_trajectory_to_the_last_bit():
    first, second = langevin_end(seed=1), langevin_end(seed=1)
    assert all(torch.equal(mine, other) for mine, other in zip(first.tensors(), second.tensors(), strict=True))


def test_another_seed_gives_other_velocities_and_other_noise():
    first = langevin_end(seed=1)
    assert not torch.equal(first.positions, langevin_end(seed=2).positions)
    assert not torch.equal(first.positions, langevin_end(seed=1, run_seed=6).positions)


def test_replicas_have_noise_of_their_own():
    end = langevin_end(seed=1)
    assert len({tuple(replica.flatten().tolist()) for replica in end.velocities}) == 4


def conserved_energies(timestep_fs, duration_fs, n_replicas=8, potential=None):
    """The extended energy after every step, (n_steps + 1, n_replicas)."""
    potential = potential or triatomic(20.0)
    masses = potential.system.masses
    integrator = NoseHooverChain(300.0, timestep_fs, relaxation_fs=20.0)
    generator = torch.Generator().manual_seed(4)
    state = simulator(potential, integrator).prepare(triatomic_start(n_replicas), generator)
    edges = potential.edges(state.positions)
    energies = [integrator.conserved_energy(state, masses)]
    for _ in range(round(duration_fs / timestep_fs)):
        state = integrator.step(state, masses, lambda x: potential.energies_and_forces(x, edges), generator)
        energies.append(integrator.conserved_energy(state, masses))
    return torch.stack(energies)


def test_the_nose_hoover_chain_conserves_its_extended_energy():
    kT = BOLTZMANN * 300.0
    energies = conserved_energies(0.25, 750.0)
    third = len(energies) // 3
    drift = energies[-third:].mean(dim=0) - energies[:third].mean(dim=0)
    assert (energies.std(dim=0) < 0.05 * kT).all()
    assert (drift.abs() < 0.02 * kT).all()


def test_the_error_of_the_extended_energy_shrinks_with_the_square_of_the_timestep():
    coarse, fine = (conserved_energies(timestep, 150.0).std(dim=0).mean().item() for timestep in (0.2, 0.1))
    assert coarse / fine == pytest.approx(4.0, rel=0.1)


def test_the_nose_hoover_chain_keeps_the_centre_of_mass_at_rest(generator):
    potential = triatomic(20.0)
    masses = potential.system.masses
    simulation = simulator(potential, NoseHooverChain(300.0, 0.5), every=10)
    start = simulation.prepare(triatomic_start(16), generator)
    window = simulation.run(start, 1000, 10, generator)
    thermal = sqrt(masses.sum().item() * BOLTZMANN * 300.0)
    for velocities in (start.velocities, window.velocities):
        momentum = (masses[:, None] * velocities).sum(dim=-2)
        assert momentum.abs().max() < 1e-10 * thermal
    assert start.velocities.abs().max() > 0


def test_the_nose_hoover_chain_has_the_mean_temperature_of_its_degrees_of_freedom(generator):
    potential = triatomic(20.0)
    masses = potential.system.masses
    integrator = NoseHooverChain(300.0, 0.5)
    assert integrator.degrees_of_freedom(3) == 6
    simulation = simulator(potential, integrator, every=10)
    start = simulation.prepare(triatomic_start(200), generator)
    window = simulation.run(start, 3000, 10, generator)
    temperatures = 2.0 * kinetic_energy(window.velocities[50:], masses) / (6 * BOLTZMANN)
    error = (temperatures.mean(dim=0).std() / sqrt(200)).item()
    assert error < 0.007 * 300.0
    assert temperatures.mean().item() == pytest.approx(300.0, rel=0.02)
    # A thermostat that only rescaled would freeze the fluctuation: six degrees of freedom have sqrt(2/6).
    assert temperatures.std().item() == pytest.approx(300.0 * sqrt(2 / 6), rel=0.15)


def test_the_nose_hoover_chain_is_deterministic_and_reversible():
    potential = triatomic(20.0)
    simulation = simulator(potential, NoseHooverChain(300.0, 0.25, relaxation_fs=20.0))
    start = simulation.prepare(triatomic_start(4), torch.Generator().manual_seed(0))
    one, other = (simulation.run(start, 400, 100, torch.Generator().manual_seed(seed)).end for seed in (1, 2))
    assert torch.equal(one.positions, other.positions)
    speed = torch.tensor([1.0, -1.0], dtype=torch.float64)[None, :, None]
    back = simulation.run(
        one.with_(velocities=-one.velocities, chain=one.chain * speed), 400, 100, torch.Generator()
    ).end
    assert (one.positions - start.positions).abs().max() > 0.01
    assert torch.allclose(back.positions, start.positions, atol=1e-8)
    assert torch.allclose(back.velocities, -start.velocities, atol=1e-8)


def test_thermal_velocities_have_the_variance_of_each_mass(generator):
    masses = torch.tensor([1.0, 16.0], dtype=torch.float64)
    velocities = maxwell_boltzmann((40_000, 2, 3), masses, 350.0, generator)
    variances = velocities.var(dim=(0, 2))
    assert torch.allclose(variances, BOLTZMANN * 350.0 / masses, rtol=0.02)


def test_kinetic_temperature_agrees_with_ase(aspirin_frames, generator):
    system = System.from_atoms(aspirin_frames[0])
    velocities = maxwell_boltzmann((2, 21, 3), system.masses, 350.0, generator)
    frame = system.atoms(torch.tensor(aspirin_frames[0].positions), velocities[1])
    assert kinetic_energy(velocities, system.masses)[1].item() == pytest.approx(frame.get_kinetic_energy(), rel=1e-10)
    assert kinetic_temperature(velocities, system.masses)[1].item() == pytest.approx(frame.get_temperature(), rel=1e-10)


def test_units_are_those_of_ase():
    assert units.fs == FS
    assert 1000.0 * units.fs == PS
    assert units.kB == BOLTZMANN


def test_the_thermostat_itself_is_integrated_to_fourth_order():
    """Free particles feel nothing but the thermostat, whose Suzuki-Yoshida steps are of fourth order."""
    potential = ModulePotential(Oscillators(0.0), System.from_atoms(TRIATOMIC))
    coarse, fine = (
        conserved_energies(timestep, 200.0, potential=potential).std(dim=0).mean().item() for timestep in (1.0, 0.5)
    )
    assert fine > 1e-12, "there is an error to measure"
    assert coarse / fine == pytest.approx(16.0, rel=0.15)


def test_thermostat_masses_follow_the_period():
    masses = NoseHooverChain(300.0, 0.5, relaxation_fs=25.0, chain_length=3).thermostat_masses(5)
    inertia = BOLTZMANN * 300.0 * (25.0 * FS / (2 * np.pi)) ** 2
    assert masses == pytest.approx([12 * inertia, inertia, inertia], rel=1e-12)


def test_the_relaxation_time_is_forty_timesteps_unless_given():
    assert NoseHooverChain(300.0, 0.5).relaxation_fs == 20.0
    assert NoseHooverChain(300.0, 0.5, relaxation_fs=30.0).relaxation_fs == 30.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Langevin(temperature_K=0.0), r"temperature_K=0\.0 is out of range"),
        (lambda: Langevin(temperature_K=float("nan")), r"temperature_K=nan is out of range"),
        (lambda: Langevin(timestep_fs=-1.0), r"timestep_fs=-1\.0 .*0\.5 fs is usual"),
        (lambda: Langevin(timestep_fs=100.0), r"timestep_fs=100\.0 .*<= 10"),
        (lambda: Langevin(friction_per_ps=-1.0), r"friction_per_ps=-1\.0"),
        (lambda: NoseHooverChain(relaxation_fs=1.0), r"relaxation_fs=1\.0 .*>= 2\.5"),
        (lambda: NoseHooverChain(chain_length=0), r"chain_length=0 is out of range: pass an integer >= 1"),
    ],
)
def test_settings_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
