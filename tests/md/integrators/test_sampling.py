"""Integrators against statistical mechanics: distributions that they sample, and quantities that they conserve."""

from dataclasses import replace
from math import sqrt

import numpy as np
import pytest
import torch
from ase import Atoms
from toys import TRIATOMIC, Oscillators, Springs, triatomic

from stable_plugin import AnyOf, Langevin, NonFinite, NoseHooverChain, RunawayTemperature, System
from stable_plugin.md import Simulator
from stable_plugin.md.state import kinetic_energy, kinetic_temperature
from stable_plugin.models import ModulePotential
from stable_plugin.units import BOLTZMANN, FS


def simulator_of(potential, integrator, every=1):
    return Simulator(potential, integrator, NonFinite(), check_every_fs=every * integrator.timestep_fs, block_steps=100)


def triatomic_start(n_replicas):
    return torch.tensor(TRIATOMIC.positions).repeat(n_replicas, 1, 1)


def aspirin_springs(atoms):
    """Aspirin with all its bonds as equal springs, softer than real ones."""
    system = System.from_atoms(atoms)
    positions = torch.tensor(atoms.positions)
    lengths = (positions[system.bonds[:, 0]] - positions[system.bonds[:, 1]]).norm(dim=-1)
    return ModulePotential(Springs(system.bonds, 5.0, lengths), system)


def test_baoab_position_variance_is_exact(generator):
    """Other splittings of the same long timestep have an error of (dt ω)² / 4, which is 6 % here."""
    timestep_fs, temperature = 1.0, 300.0
    omega = 0.5 / (timestep_fs * FS)
    atoms = Atoms("HCNOF" * 8, positions=np.arange(120.0).reshape(40, 3))
    system = System.from_atoms(atoms)
    potential = ModulePotential(Oscillators(omega**2, system.masses), system)
    simulator = simulator_of(potential, Langevin(temperature, timestep_fs, friction_per_ps=500.0), every=8)
    start = simulator.prepare(torch.zeros(64, 40, 3, dtype=torch.float64), generator)
    start = simulator.run(start, 200, 8, generator).end
    window = simulator.run(start, 2400, 8, generator)

    squares = window.positions.square() * (system.masses[:, None] * omega**2) / (BOLTZMANN * temperature)
    per_oscillator = squares.mean(dim=0).flatten()
    error = (per_oscillator.std() / sqrt(len(per_oscillator))).item()
    assert error < 0.003
    assert abs(per_oscillator.mean().item() - 1.0) < 0.01
    # Light and heavy atoms alike.
    by_atom = squares.mean(dim=(0, 1, 3)).reshape(8, 5).mean(dim=0)
    assert (by_atom - 1.0).abs().max() < 0.02
    # The velocities do have an error of (dt ω)² / 4, which distinguishes the scheme from its relatives.
    kinetic = (window.velocities.square() * system.masses[:, None]).mean() / (BOLTZMANN * temperature)
    assert kinetic.item() == pytest.approx(1.0 - 0.25 * 0.5**2, abs=0.01)


def test_langevin_temperature_and_fluctuation(aspirin_frames, generator):
    potential = aspirin_springs(aspirin_frames[0])
    simulator = simulator_of(potential, Langevin(450.0, 0.5, friction_per_ps=50.0), every=10)
    positions = torch.tensor(aspirin_frames[0].positions).repeat(60, 1, 1)
    start = simulator.prepare(positions, generator, torch.zeros_like(positions))
    start = simulator.run(start, 400, 10, generator).end
    window = simulator.run(start, 1200, 10, generator)
    temperatures = kinetic_temperature(window.velocities, potential.system.masses)
    per_replica = temperatures.mean(dim=0)
    assert (per_replica.std() / sqrt(60)).item() < 0.006 * 450
    assert temperatures.mean().item() == pytest.approx(450.0, rel=0.02)
    # The canonical standard deviation of the kinetic energy of 63 degrees of freedom.
    assert temperatures.std().item() == pytest.approx(450.0 * sqrt(2 / 63), rel=0.1)


def test_langevin_velocity_autocorrelation(generator):
    system = System.from_atoms(TRIATOMIC)
    potential = ModulePotential(Oscillators(0.0), system)
    simulator = simulator_of(potential, Langevin(300.0, 1.0, friction_per_ps=20.0))
    start = simulator.prepare(torch.zeros(4000, 3, 3, dtype=torch.float64), generator)
    window = simulator.run(start, 50, 50, generator)
    scaled = [v * system.masses.sqrt()[:, None] for v in (start.velocities, window.velocities[0])]
    correlation = (scaled[0] * scaled[1]).mean() / scaled[0].square().mean()
    assert correlation.item() == pytest.approx(np.exp(-20.0 * 0.05), abs=0.02)


def test_nose_hoover_temperature_and_fluctuation(generator):
    potential = triatomic(20.0)
    integrator = NoseHooverChain(300.0, 0.5)
    assert integrator.degrees_of_freedom(3) == 6
    simulator = simulator_of(potential, integrator, every=10)
    start = simulator.prepare(triatomic_start(200), generator)
    window = simulator.run(start, 3000, 10, generator)
    temperatures = 2.0 * kinetic_energy(window.velocities[50:], potential.system.masses) / (6 * BOLTZMANN)
    # A detector of temperatures counts the same six degrees of freedom in this simulator, and nine elsewhere.
    detector = RunawayTemperature(1e4)
    detector.bind(potential.system, window.positions[0])
    for number in (9, 6):
        measured = detector.measure(window.positions[50], window.velocities[50])
        torch.testing.assert_close(measured, temperatures[0] * 6 / number, rtol=1e-12, atol=0.0)
        Simulator(potential, integrator, AnyOf([detector]), check_every_fs=5.0).run(start, 10, 10, generator)
    error = (temperatures.mean(dim=0).std() / sqrt(200)).item()
    assert error < 0.007 * 300.0
    assert temperatures.mean().item() == pytest.approx(300.0, rel=0.02)
    # Velocity rescaling would suppress the fluctuation: six degrees of freedom have sqrt(2/6).
    assert temperatures.std().item() == pytest.approx(300.0 * sqrt(2 / 6), rel=0.15)


def conserved_energies(timestep_fs, duration_fs, n_replicas=8, potential=None):
    """Return the extended energy after every step, (n_steps + 1, n_replicas)."""
    potential = potential or triatomic(20.0)
    masses = potential.system.inertia
    simulator = simulator_of(potential, NoseHooverChain(300.0, timestep_fs, relaxation_fs=20.0))
    integrator = simulator.integrator
    generator = torch.Generator().manual_seed(4)
    state = simulator.prepare(triatomic_start(n_replicas), generator)
    edges = potential.edges(state.positions)
    energies = [integrator.conserved_energy(state, masses)]
    for _ in range(round(duration_fs / timestep_fs)):
        state = integrator.step(state, masses, lambda x: potential.energies_and_forces(x, edges), generator)
        energies.append(integrator.conserved_energy(state, masses))
    return torch.stack(energies)


def triatomic_with_fixed_atom():
    potential = triatomic(20.0)
    potential.system = replace(potential.system, fixed=torch.tensor([False, True, False]))
    return potential


@pytest.mark.parametrize("make", [lambda: triatomic(20.0), triatomic_with_fixed_atom], ids=["free", "fixed"])
def test_nose_hoover_conserves_extended_energy(make):
    kT = BOLTZMANN * 300.0
    energies = conserved_energies(0.25, 750.0, potential=make())
    third = len(energies) // 3
    drift = energies[-third:].mean(dim=0) - energies[:third].mean(dim=0)
    assert (energies.std(dim=0) < 0.05 * kT).all()
    assert (drift.abs() < 0.02 * kT).all()


def test_extended_energy_error_is_second_order():
    coarse, fine = (conserved_energies(timestep, 150.0).std(dim=0).mean().item() for timestep in (0.2, 0.1))
    assert coarse / fine == pytest.approx(4.0, rel=0.1)


def test_chain_alone_is_fourth_order():
    """Free particles are coupled to the thermostat only, whose Suzuki-Yoshida steps are of fourth order."""
    potential = ModulePotential(Oscillators(0.0), System.from_atoms(TRIATOMIC))
    coarse, fine = (
        conserved_energies(timestep, 200.0, potential=potential).std(dim=0).mean().item() for timestep in (1.0, 0.5)
    )
    assert fine > 1e-12, "there is an error to measure"
    assert coarse / fine == pytest.approx(16.0, rel=0.15)
