"""Both thermostats under the statistical tests of the physical_validation package.

Kinetic energies are compared with their exact distribution, and potential energies at two temperatures with each other:
their distributions differ by the factor exp(-(β₁ - β₂) U) (Shirts, J. Chem. Theory Comput. 9, 909, 2013; Merz and
Shirts, PLoS ONE 13, e0202764, 2018). Every test is also applied to wrong data, which it has to reject.

BAOAB samples positions to higher order, but the velocities at the end of its steps are too cold by (dt ω)²/4, and those
of velocity Verlet inside the chain have an error of the same size. Timesteps are chosen such that dt ω < 0.07 almost
always, an error of 0.1 %, which is less than these numbers of samples can resolve.
"""

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import physical_validation as pv
import pytest
import torch
from ase import Atoms
from ase.constraints import FixAtoms
from torch import nn
from toys import as_potential, tiny_mace
from validation_units import QUIET, UNITS

from stable_plugin import Langevin, NonFinite, NoseHooverChain, System
from stable_plugin.md import Simulator
from stable_plugin.md.state import kinetic_energy
from stable_plugin.models import ModulePotential

TEMPERATURE, WARMER = 300.0, 330.0


@dataclass
class Sampled:
    """Energies in eV of uncorrelated frames, (n_samples,)."""

    kinetic: torch.Tensor
    potential: torch.Tensor
    n_atoms: int
    n_frozen: int

    def as_claimed_at(self, temperature_K, kinetic_factor=1.0):
        """Return the input of the package, for a temperature that need not be the true one."""
        return pv.data.SimulationData(
            units=UNITS,
            dt=1.0,
            system=pv.data.SystemData(
                natoms=self.n_atoms, nconstraints=0, ndof_reduction_tra=self.n_frozen, ndof_reduction_rot=0
            ),
            ensemble=pv.data.EnsembleData("NVT", natoms=self.n_atoms, volume=1.0, temperature=temperature_K),
            observables=pv.data.ObservableData(
                kinetic_energy=kinetic_factor * self.kinetic.numpy(),
                potential_energy=self.potential.numpy(),
                total_energy=(self.kinetic + self.potential).numpy(),
            ),
        )


class Tied(nn.Module):
    """Springs between all pairs of atoms, with d the deviation of a distance vector: U = ½ k d² + q (d_x⁴ + d_y⁴ + d_z⁴).

    Only the momentum is conserved, and the quartic part couples all modes, so that the chain samples canonically.
    """

    def __init__(self, rest, stiffness=1.0, quartic=20.0):
        super().__init__()
        self.first, self.second = torch.tensor(list(combinations(range(len(rest)), 2))).unbind(1)
        self.vectors = rest[self.first] - rest[self.second]
        self.k, self.q = (nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in (stiffness, quartic))

    def forward(self, positions):
        squares = (positions[:, self.first] - positions[:, self.second] - self.vectors).square()
        return (0.5 * self.k * squares + self.q * squares.square()).sum(dim=(1, 2))


def tied(fixed=()):
    atoms = Atoms("Ar4", positions=[[0, 0, 0], [3, 0, 0], [0, 3, 0], [0, 0, 3]])
    atoms.set_constraint(FixAtoms(fixed))
    system = System.from_atoms(atoms, bonds=[]).with_fixed([atoms], [atoms])
    return ModulePotential(Tied(torch.tensor(atoms.positions)), system), atoms


def untrained_mace():
    """Return a real model with random weights, and atoms in a box."""
    grid = np.array(list(np.ndindex(2, 2, 2)))
    atoms = Atoms("Ar8", positions=2.2 * grid, cell=[4.4, 4.4, 4.4], pbc=True)
    model = tiny_mace(atoms.numbers, num_interactions=1, r_max=3.0, atomic_inter_scale=5.0)
    return as_potential(model, System.from_atoms(atoms, bonds=[])), atoms


def langevin(temperature_K, timestep_fs):
    return Langevin(temperature_K, timestep_fs, friction_per_ps=20.0)


def nose_hoover(temperature_K, timestep_fs):
    return NoseHooverChain(temperature_K, timestep_fs, relaxation_fs=100.0)


def sample(subject, integrator, n_frozen, n_replicas, n_frames, apart_fs, settle_fs):
    """Return energies along a simulation, after Langevin dynamics has equilibrated the positions.

    Of three degrees of freedom of each atom, ``n_frozen`` are not thermalized.
    """
    (potential, atoms), timestep = subject, integrator.timestep_fs
    system, generator = potential.system, torch.Generator().manual_seed(0)

    def run(integrator, positions, duration_fs, every_fs):
        simulator = Simulator(potential, integrator, NonFinite(), check_every_fs=20 * timestep, block_steps=20)
        start = simulator.prepare(positions, generator)
        return simulator.run(start, round(duration_fs / timestep), round(every_fs / timestep), generator)

    rest = torch.tensor(atoms.positions).repeat(n_replicas, 1, 1)
    thermal = run(Langevin(integrator.temperature_K, timestep, 20.0), rest, settle_fs, settle_fs).end
    # Discarded until the thermostat has equilibrated the velocities.
    skipped = round(settle_fs / apart_fs)
    window = run(integrator, thermal.positions, (skipped + n_frames) * apart_fs, apart_fs)
    assert window.valid.all()
    frames, velocities = window.positions[skipped:], window.velocities[skipped:]
    with torch.no_grad():
        energies = [potential.energies(frame, potential.edges(frame)) for frame in frames]
    return Sampled(
        kinetic_energy(velocities, system.masses).flatten(),
        torch.stack(energies).double().flatten(),
        len(atoms),
        n_frozen,
    )


N_FROZEN = {langevin: 0, nose_hoover: 3}


@pytest.fixture(scope="module", params=[langevin, nose_hoover], ids=lambda thermostat: thermostat.__name__)
def samples(request):
    """Return samples at two temperatures."""
    size = {"n_frozen": N_FROZEN[request.param]}
    size |= {"n_replicas": 1500, "n_frames": 4, "apart_fs": 300.0, "settle_fs": 600.0}
    return [sample(tied(), request.param(temperature, 1.0), **size) for temperature in (TEMPERATURE, WARMER)]


def kinetic_p_value(sampled, temperature_K, kinetic_factor=1.0):
    """Return the p-value of the Kolmogorov-Smirnov test against the exact distribution."""
    return pv.kinetic_energy.distribution(sampled.as_claimed_at(temperature_K, kinetic_factor), strict=True, **QUIET)


def test_kinetic_energy_distribution(samples):
    for sampled, temperature in zip(samples, (TEMPERATURE, WARMER), strict=True):
        assert kinetic_p_value(sampled, temperature) > 0.01
        deviations = pv.kinetic_energy.distribution(sampled.as_claimed_at(temperature), bootstrap_seed=0, **QUIET)
        assert max(np.abs(deviations)) < 3.0, "mean and width, in standard errors"
        assert kinetic_p_value(sampled, 1.04 * temperature) < 0.01
        assert kinetic_p_value(sampled, temperature, 0.96) < 0.01


def test_potential_energy_ratio(samples):
    colder, warmer = samples
    right = pv.ensemble.check(colder.as_claimed_at(TEMPERATURE), warmer.as_claimed_at(WARMER), **QUIET)
    assert np.abs(right).max() < 3.0, "in standard errors"
    wrong = pv.ensemble.check(colder.as_claimed_at(TEMPERATURE), warmer.as_claimed_at(WARMER + 20.0), **QUIET)
    assert np.abs(wrong).max() > 3.0


def test_kinetic_energy_distribution_with_a_fixed_atom():
    """The momentum of the others is thermalized too: nine degrees of freedom, and not six."""
    size = {"n_replicas": 1000, "n_frames": 2, "apart_fs": 300.0, "settle_fs": 600.0}
    sampled = sample(tied(fixed=[1]), nose_hoover(TEMPERATURE, 1.0), 3, **size)
    assert kinetic_p_value(sampled, TEMPERATURE) > 0.01
    for n_frozen in (0, 6):
        sampled.n_frozen = n_frozen
        assert kinetic_p_value(sampled, TEMPERATURE) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("thermostat", [langevin, nose_hoover], ids=lambda thermostat: thermostat.__name__)
def test_kinetic_energy_distribution_of_mace(thermostat):
    size = {"n_replicas": 60, "n_frames": 10, "apart_fs": 240.0, "settle_fs": 720.0}
    sampled = sample(untrained_mace(), thermostat(TEMPERATURE, 2.0), N_FROZEN[thermostat], **size)
    assert kinetic_p_value(sampled, TEMPERATURE) > 0.01
    assert kinetic_p_value(sampled, 1.08 * TEMPERATURE) < 0.01
    assert kinetic_p_value(sampled, TEMPERATURE, 0.92) < 0.01
