"""Detectors for solids and liquids: closed answers, and brute force with ASE's minimum image."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from detector_tools import at_rest, bound, water_box

from stable_plugin import (
    BondLengths,
    CoordinationNumber,
    Langevin,
    LindemannCriterion,
    ObservableDeviation,
    RadialDistribution,
    System,
)
from stable_plugin.md import Simulator
from stable_plugin.md.window import NEVER
from stable_plugin.models import ModulePotential


def perturbed(atoms, n_frames, scale, seed=1):
    """Return frames with Gaussian noise, each atom in a random periodic image."""
    random = np.random.default_rng(seed)
    images = random.integers(-1, 2, size=(n_frames, len(atoms), 3))
    noise = random.normal(scale=scale, size=(n_frames, len(atoms), 3))
    return torch.tensor(atoms.positions + noise + images @ atoms.cell.array)


def all_distances(atoms, frame):
    return Atoms(atoms.numbers, frame.numpy(), cell=atoms.cell, pbc=True).get_all_distances(mic=True)


@pytest.mark.parametrize("slant", [0.0, 0.3])
def test_coordination_number_agrees_with_brute_force(slant):
    atoms = water_box(slant=slant)
    frames = perturbed(atoms, 6, 0.3)
    detector = bound(CoordinationNumber(distance=2.5, threshold=0.5), atoms, reference=frames[:3])
    different = np.arange(24)[:, None] // 3 != np.arange(24) // 3
    counts = [((all_distances(atoms, frame) < 2.5) & different).sum() / 24 for frame in frames]
    expected = np.abs(np.array(counts) - np.mean(counts[:3]))
    assert detector.measure(frames, at_rest(frames)).numpy() == pytest.approx(expected, abs=1e-12)
    invalid = frames.clone()
    invalid[0, 0, 0] = torch.nan
    assert detector.classify(invalid, at_rest(invalid))[1].tolist() == [True] + [False] * 5


def test_coordination_number_counts_all_pairs_in_a_metal():
    atoms = bulk("Cu", cubic=True) * 3
    detector = bound(CoordinationNumber(distance=3.0), atoms)
    assert detector._expected.item() == pytest.approx(12.0)
    vacancy = torch.tensor(atoms.positions)[None].clone()
    vacancy[0, 0] += 0.5 * torch.tensor(atoms.cell.array[0]) / 3  # into an octahedral hole
    assert detector.measure(vacancy, at_rest(vacancy)).item() > 0.05


def test_lindemann_criterion_subtracts_the_drift():
    atoms = bulk("NaCl", "rocksalt", a=5.64, cubic=True) * 2
    random = np.random.default_rng(0)
    images = random.integers(-1, 2, size=(1, len(atoms), 3)) @ atoms.cell.array
    reference = torch.tensor(atoms.positions + random.normal(scale=0.1, size=(40, len(atoms), 3)) + images)
    detector = bound(LindemannCriterion(0.3), atoms, reference)
    sites = reference.mean(dim=0)
    moved = sites.repeat(2, 1, 1)
    moved[1] += torch.tensor([3.0, -1.0, 0.5])  # a common shift is no displacement
    moved[:, 5, 2] += 2.0
    masses = torch.tensor(atoms.get_masses())
    off = torch.zeros(len(atoms), 3, dtype=torch.float64)
    off[5, 2] = 2.0
    off -= (masses[:, None] * off).sum(0) / masses.sum()
    expected = off.square().sum(1).mean().item()
    assert detector.measure(moved, at_rest(moved)).tolist() == pytest.approx([expected, expected], rel=1e-9)
    assert detector.offending_atoms(moved, at_rest(moved)) == [(5,), (5,)]


def test_lindemann_criterion_ignores_reference_images():
    atoms = bulk("Cu", cubic=True) * 2
    reference = torch.tensor(np.stack([atoms.positions, atoms.positions + atoms.cell.array[1]]))
    detector = bound(LindemannCriterion(0.3), atoms, reference)
    assert detector.measure(reference, at_rest(reference)).abs().max() < 1e-12


class FreeParticles(torch.nn.Module):
    """Potential without forces."""

    def __init__(self):
        super().__init__()
        self.zero = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, positions):
        return self.zero * positions.sum(dim=-1)


class FirstX(BondLengths):
    """x coordinate of the first atom, a value that is easy to predict."""

    def per_frame(self, positions):
        return positions[:, 0, :1]


def test_observable_deviation_averages_the_last_samples():
    atoms = molecule("N2")
    detector = bound(ObservableDeviation(FirstX(target=[0.0]), threshold=1.0, n_samples=4, min_samples=2), atoms)
    seen = [8.0, 2.0, 0.0, 0.0, 0.0, 6.0]
    found = []
    for x in seen:
        positions = torch.tensor([[[x, 0.0, 0.0], [0.0, 0.0, 0.0]]], dtype=torch.float64)
        found.append(detector.measure(positions, at_rest(positions)).item())
    assert found == pytest.approx([0.0, 5.0, 10 / 3, 2.5, 0.5, 1.5])
    detector.reset(1)
    assert detector.measure(positions, at_rest(positions)).item() == 0.0, "the samples are cleared, and one is too few"


def drifting_molecule(detector):
    """Return a simulator of a molecule that moves along x at 0.1 Å/fs, its generator and its start."""
    atoms = molecule("N2")
    potential = ModulePotential(FreeParticles(), System.from_atoms(atoms))
    detector.bind(potential.system, torch.tensor(atoms.positions)[None])
    simulator = Simulator(potential, Langevin(300.0, 1.0, 0.0), detector, check_every_fs=1.0, block_steps=4)
    generator = torch.Generator().manual_seed(0)
    velocities = torch.zeros(1, 2, 3, dtype=torch.float64)
    velocities[..., 0] = 0.1 / simulator.integrator.timestep
    return simulator, generator, simulator.prepare(torch.tensor(atoms.positions)[None], generator, velocities)


def test_observable_deviation_samples_repeated_blocks_once():
    detector = ObservableDeviation(FirstX(target=[0.0]), threshold=0.55, n_samples=20, min_samples=1)
    simulator, generator, start = drifting_molecule(detector)
    expected = simulator.run(start, 20, 20, generator).unstable_step
    # The mean over the first n steps of 0.1 Å each is 0.05 (n + 1).
    assert expected.item() == 11
    did_overflow, repeats = simulator.neighbors.did_overflow, []

    def overflow_twice(positions):
        if len(repeats) < 3 and len(repeats) % 2 == 0:
            repeats.append(1)
            return torch.ones(1, dtype=torch.bool)
        repeats.append(0)
        return did_overflow(positions)

    simulator.neighbors.did_overflow = overflow_twice
    assert simulator.run(start, 20, 20, generator).unstable_step.item() == 11
    assert simulator.repeated_blocks >= 1


def test_observable_deviation_spans_segments():
    detector = ObservableDeviation(FirstX(target=[0.0]), threshold=0.55, n_samples=20, min_samples=8)
    simulator, generator, start = drifting_molecule(detector)
    first = simulator.run(start, 10, 10, generator)
    second = simulator.run(first.end, 10, 10, generator, continues=True)
    assert first.unstable_step.item() == NEVER
    assert second.unstable_step.item() == 1
    restarted = simulator.run(first.end, 10, 10, generator)
    assert restarted.unstable_step.item() == 8, "a new simulation starts without samples, and needs min_samples"


def test_observable_deviation_detects_a_gas():
    atoms = water_box(3, 9.3)
    system = System.from_atoms(atoms)
    good = perturbed(atoms, 10, 0.05)
    gas = torch.rand(10, len(atoms), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 9.3
    detector = ObservableDeviation(RadialDistribution(("O", "H")), threshold=0.3, n_samples=10)
    detector.bind(system, good)
    for frames, unstable in ((good, False), (gas, True)):
        detector.reset(1)
        flags = [detector.classify(frame[None], at_rest(frame[None]))[0].item() for frame in frames]
        assert flags[-1] == unstable
