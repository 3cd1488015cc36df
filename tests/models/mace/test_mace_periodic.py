"""MACE models of periodic systems, simulated against ASE."""

import numpy as np
import torch
from ase import Atoms, units
from ase.build import molecule
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet
from mace.calculators import MACECalculator
from toys import tiny_mace

from stable_plugin import BondDeviation, Langevin, System
from stable_plugin.detectors import NonFinite
from stable_plugin.md import Simulator
from stable_plugin.models.base import default_dtype
from stable_plugin.models.mace import MACEPotential, save_mace


def waters(n_side=2, side=6.2, pbc=True, seed=0):
    """Return water molecules on a grid in a triclinic cell, rotated at random."""
    random = np.random.default_rng(seed)
    cell = side * np.array([[1.0, 0.0, 0.0], [0.2, 1.0, 0.0], [-0.1, 0.3, 1.0]])
    box = Atoms(cell=cell, pbc=pbc)
    for corner in np.ndindex(n_side, n_side, n_side):
        one = molecule("H2O")
        one.rotate(random.uniform(0, 360), random.normal(size=3))
        one.translate((np.array(corner) + 0.3) / n_side @ cell - one.positions[0])
        box += one
    return box


def calculator_of(module, folder):
    path = folder / "saved.model"
    save_mace(module, path)
    with default_dtype(torch.get_default_dtype()):
        return MACECalculator(model_paths=str(path), device="cpu", default_dtype="float64")


def test_periodic_trajectory_equals_ase(tmp_path):
    """Without friction BAOAB is velocity Verlet; the run is hot enough for the neighbors to change."""
    atoms = waters()
    potential = MACEPotential(tiny_mace(atoms.numbers), System.from_atoms(atoms))
    atoms.calc = calculator_of(potential.module, tmp_path)
    MaxwellBoltzmannDistribution(atoms, temperature_K=1500, rng=np.random.default_rng(0))
    start, velocities = (torch.tensor(array)[None] for array in (atoms.positions.copy(), atoms.get_velocities()))
    simulator = Simulator(potential, Langevin(300.0, 0.5, 0.0), NonFinite(), check_every_fs=0.5)
    generator = torch.Generator().manual_seed(0)
    window = simulator.run(simulator.prepare(start, generator, velocities), 120, 40, generator)
    verlet = VelocityVerlet(atoms, timestep=0.5 * units.fs)
    for frame in window.positions[:, 0]:
        verlet.run(40)
        np.testing.assert_allclose(frame.numpy(), atoms.positions, rtol=0, atol=1e-8)
    assert 2 <= simulator.neighbors.searches < 24, "neighbors are searched again, but not in every block"


def test_bursting_replica_is_exact(tmp_path):
    """Its atoms leave every neighbor list behind, so neighbors are searched at every step from then on."""
    atoms = waters()
    potential = MACEPotential(tiny_mace(atoms.numbers), System.from_atoms(atoms))
    atoms.calc = calculator_of(potential.module, tmp_path)
    velocities = np.zeros((len(atoms), 3))
    velocities[4] = [0.0, 0.0, 1.5 / units.fs]
    atoms.set_velocities(velocities)
    start = torch.tensor(atoms.positions.copy())[None].repeat(2, 1, 1)
    both = torch.tensor(np.stack([velocities, 0 * velocities]))
    simulator = Simulator(potential, Langevin(300.0, 0.5, 0.0), NonFinite(), check_every_fs=0.5)
    generator = torch.Generator().manual_seed(0)
    window = simulator.run(simulator.prepare(start, generator, both), 20, 10, generator)
    assert simulator.repeated_blocks > 0
    verlet = VelocityVerlet(atoms, timestep=0.5 * units.fs)
    for frame in window.positions[:, 0]:
        verlet.run(10)
        np.testing.assert_allclose(frame.numpy(), atoms.positions, rtol=0, atol=1e-8)
    assert window.valid.all()


def test_bond_deviation_ignores_the_boundary():
    atoms = waters()
    carried = atoms.copy()
    carried.positions[1] += atoms.cell[0] - atoms.cell[2]
    detector = BondDeviation(0.25)
    system = System.from_atoms(atoms)
    reference = torch.tensor(atoms.positions)[None]
    detector.bind(system, reference)
    assert detector.measure(torch.tensor(carried.positions)[None], torch.zeros_like(reference)) < 1e-9
    assert System.from_atoms(carried).bonds.tolist() == system.bonds.tolist()
