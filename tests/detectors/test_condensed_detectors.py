"""Detectors for solids and liquids, against brute force with ASE's minimum image."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

from stable_plugin import (
    AnyOf,
    BondDeviation,
    BondLengths,
    CoordinationNumber,
    IntermolecularContact,
    Langevin,
    LindemannCriterion,
    NonFinite,
    ObservableDeviation,
    RadialDistribution,
    RunawayTemperature,
    System,
)
from stable_plugin.detectors import geometry
from stable_plugin.md import Simulator
from stable_plugin.md.window import NEVER
from stable_plugin.models import ModulePotential


def waters(n_side=2, side=6.4, slant=0.0, seed=0):
    """Water molecules on a grid, turned at random."""
    random = np.random.default_rng(seed)
    cell = side * np.array([[1.0, 0.0, 0.0], [slant, 1.0, 0.0], [0.0, -slant, 1.0]])
    box = Atoms(cell=cell, pbc=True)
    for corner in np.ndindex(n_side, n_side, n_side):
        one = molecule("H2O")
        one.rotate(random.uniform(0, 360), random.normal(size=3))
        one.translate((np.array(corner) + 0.3) / n_side @ cell - one.positions[0])
        box += one
    return box


def shaken(atoms, n_frames, scale, seed=1):
    """Frames with noise, each atom in some image of its own."""
    random = np.random.default_rng(seed)
    images = random.integers(-1, 2, size=(n_frames, len(atoms), 3))
    noise = random.normal(scale=scale, size=(n_frames, len(atoms), 3))
    return torch.tensor(atoms.positions + noise + images @ atoms.cell.array)


def bound(detector, atoms, reference=None):
    detector.bind(System.from_atoms(atoms), torch.tensor(atoms.positions)[None] if reference is None else reference)
    return detector


def at_rest(positions):
    return torch.zeros_like(positions)


def all_distances(atoms, frame):
    return Atoms(atoms.numbers, frame.numpy(), cell=atoms.cell, pbc=True).get_all_distances(mic=True)


@pytest.mark.parametrize("slant", [0.0, 0.3])
def test_the_closest_contact_between_molecules_is_that_of_brute_force(slant, monkeypatch):
    monkeypatch.setattr(geometry, "DISTANCES_AT_ONCE", 100)  # pairs in many parts
    atoms = waters(slant=slant)
    detector = bound(IntermolecularContact(), atoms)
    frames = shaken(atoms, 5, 0.3)
    apart = np.arange(24)[:, None] // 3 != np.arange(24) // 3
    offending_atoms = detector.offending_atoms(frames, at_rest(frames))
    for frame, value, (i, j) in zip(frames, detector.measure(frames, at_rest(frames)), offending_atoms, strict=True):
        distances = np.where(apart, all_distances(atoms, frame), np.inf)
        assert -value.item() == pytest.approx(distances.min(), abs=1e-10)
        assert distances[i, j] == distances.min()


def test_atoms_of_one_molecule_are_no_contact():
    atoms = waters()
    squeezed = torch.tensor(atoms.positions)[None].clone()
    squeezed[0, 1] = squeezed[0, 0] + 0.1
    detector = bound(IntermolecularContact(1.2), atoms)
    assert not detector.classify(squeezed, at_rest(squeezed))[0].any()
    squeezed[0, 1] = squeezed[0, 3] + 0.5
    assert detector.classify(squeezed, at_rest(squeezed))[0].all()


@pytest.mark.parametrize("slant", [0.0, 0.3])
def test_neighbours_are_those_of_brute_force(slant):
    atoms = waters(slant=slant)
    frames = shaken(atoms, 6, 0.3)
    detector = bound(CoordinationNumber(distance=2.5, threshold=0.5), atoms, reference=frames[:3])
    apart = np.arange(24)[:, None] // 3 != np.arange(24) // 3
    counts = [((all_distances(atoms, frame) < 2.5) & apart).sum() / 24 for frame in frames]
    expected = np.abs(np.array(counts) - np.mean(counts[:3]))
    assert detector.measure(frames, at_rest(frames)).numpy() == pytest.approx(expected, abs=1e-12)
    broken = frames.clone()
    broken[0, 0, 0] = torch.nan
    assert detector.classify(broken, at_rest(broken))[1].tolist() == [True] + [False] * 5


def test_every_atom_counts_where_there_are_no_molecules():
    atoms = bulk("Cu", cubic=True) * 3
    detector = bound(CoordinationNumber(distance=3.0), atoms)
    assert detector._expected.item() == pytest.approx(12.0)
    vacancy = torch.tensor(atoms.positions)[None].clone()
    vacancy[0, 0] += 0.5 * torch.tensor(atoms.cell.array[0]) / 3  # into an octahedral hole
    assert detector.measure(vacancy, at_rest(vacancy)).item() > 0.05


def test_displacements_are_from_the_mean_sites_without_the_drift_of_all():
    atoms = bulk("NaCl", "rocksalt", a=5.64, cubic=True) * 2
    random = np.random.default_rng(0)
    images = random.integers(-1, 2, size=(1, len(atoms), 3)) @ atoms.cell.array
    reference = torch.tensor(atoms.positions + random.normal(scale=0.1, size=(40, len(atoms), 3)) + images)
    detector = bound(LindemannCriterion(0.3), atoms, reference)
    sites = reference.mean(dim=0)
    moved = sites.repeat(2, 1, 1)
    moved[1] += torch.tensor([3.0, -1.0, 0.5])  # everything together: no displacement
    moved[:, 5, 2] += 2.0
    masses = torch.tensor(atoms.get_masses())
    off = torch.zeros(len(atoms), 3, dtype=torch.float64)
    off[5, 2] = 2.0
    off -= (masses[:, None] * off).sum(0) / masses.sum()
    expected = off.square().sum(1).mean().item()
    assert detector.measure(moved, at_rest(moved)).tolist() == pytest.approx([expected, expected], rel=1e-9)
    assert detector.offending_atoms(moved, at_rest(moved)) == [(5,), (5,)]


def test_sites_do_not_depend_on_the_image_that_a_reference_frame_lies_in():
    atoms = bulk("Cu", cubic=True) * 2
    reference = torch.tensor(np.stack([atoms.positions, atoms.positions + atoms.cell.array[1]]))
    detector = bound(LindemannCriterion(0.3), atoms, reference)
    assert detector.measure(reference, at_rest(reference)).abs().max() < 1e-12


class Still(torch.nn.Module):
    """No forces."""

    def __init__(self):
        super().__init__()
        self.zero = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, positions):
        return self.zero * positions.sum(dim=-1)


class Drifting(BondLengths):
    """One number per frame that is easy to foresee: how far the first atom has gone along x."""

    def per_frame(self, positions):
        return positions[:, 0, :1]


def test_an_observable_is_judged_by_its_mean_over_the_last_looks():
    atoms = molecule("N2")
    detector = bound(ObservableDeviation(Drifting(target=[0.0]), threshold=1.0, looks=4, least=2), atoms)
    seen = [8.0, 2.0, 0.0, 0.0, 0.0, 6.0]
    found = []
    for x in seen:
        positions = torch.tensor([[[x, 0.0, 0.0], [0.0, 0.0, 0.0]]], dtype=torch.float64)
        found.append(detector.measure(positions, at_rest(positions)).item())
    assert found == pytest.approx([0.0, 5.0, 10 / 3, 2.5, 0.5, 1.5])
    detector.begin(1)
    assert detector.measure(positions, at_rest(positions)).item() == 0.0, "the memory is empty, one look is too few"


def flying(detector):
    """A molecule that flies along x at constant speed: 0.1 Å per femtosecond."""
    atoms = molecule("N2")
    potential = ModulePotential(Still(), System.from_atoms(atoms))
    detector.bind(potential.system, torch.tensor(atoms.positions)[None])
    simulator = Simulator(potential, Langevin(300.0, 1.0, 0.0), detector, check_every_fs=1.0, block_steps=4)
    generator = torch.Generator().manual_seed(0)
    velocities = torch.zeros(1, 2, 3, dtype=torch.float64)
    velocities[..., 0] = 0.1 / simulator.integrator.timestep
    return simulator, generator, simulator.prepare(torch.tensor(atoms.positions)[None], generator, velocities)


def test_a_block_that_is_repeated_is_not_looked_at_twice():
    detector = ObservableDeviation(Drifting(target=[0.0]), threshold=0.55, looks=20, least=1)
    simulator, generator, start = flying(detector)
    expected = simulator.run(start, 20, 20, generator).unstable_step
    # The mean over the first n steps of 0.1 Å each is 0.05 (n + 1).
    assert expected.item() == 11
    missed, repeats = simulator.neighbors.missed, []

    def once(positions):
        if len(repeats) < 3 and len(repeats) % 2 == 0:
            repeats.append(1)
            return torch.ones(1, dtype=torch.bool)
        repeats.append(0)
        return missed(positions)

    simulator.neighbors.missed = once
    assert simulator.run(start, 20, 20, generator).unstable_step.item() == 11
    assert simulator.repeated_blocks >= 1


def test_segments_of_one_simulation_are_judged_as_one():
    detector = ObservableDeviation(Drifting(target=[0.0]), threshold=0.55, looks=20, least=8)
    simulator, generator, start = flying(detector)
    first = simulator.run(start, 10, 10, generator)
    second = simulator.run(first.end, 10, 10, generator, continues=True)
    assert first.unstable_step.item() == NEVER
    assert second.unstable_step.item() == 1
    anew = simulator.run(first.end, 10, 10, generator)
    assert anew.unstable_step.item() == 8, "a new simulation begins without memory: at the first look that is judged"


def test_a_radial_distribution_that_falls_apart_is_seen():
    atoms = waters(3, 9.3)
    system = System.from_atoms(atoms)
    good = shaken(atoms, 10, 0.05)
    gas = torch.rand(10, len(atoms), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 9.3
    detector = ObservableDeviation(RadialDistribution(("O", "H")), threshold=0.3, looks=10)
    detector.bind(system, good)
    for frames, broken in ((good, False), (gas, True)):
        detector.begin(1)
        verdicts = [detector.classify(frame[None], at_rest(frame[None]))[0].item() for frame in frames]
        assert verdicts[-1] == broken


def test_the_atoms_that_broke_are_named():
    atoms = waters()
    frames = torch.tensor(atoms.positions).repeat(3, 1, 1)
    frames[1, 4, 0] += 1.0
    frames[2, 7, 1] = torch.nan
    bonds = bound(BondDeviation(0.25), atoms)
    assert bonds.offending_atoms(frames, at_rest(frames))[1:] == [(3, 4), (6, 7)]
    velocities = at_rest(frames)
    velocities[0, 11] = 3.0
    hot = bound(RunawayTemperature(1000.0), atoms)
    assert hot.offending_atoms(frames, velocities)[0] == (11,)
    either = AnyOf([hot, bonds])
    assert either.offending_atoms(frames, velocities) == [(11,), (3, 4), (6, 7)]
    assert NonFinite().offending_atoms(frames, velocities) == [(), (), ()]


@pytest.mark.parametrize(
    ("detector", "atoms", "message"),
    [
        (IntermolecularContact(), molecule("CH4"), r"finds no two molecules.*ClosestContact"),
        (IntermolecularContact(), bulk("Cu", cubic=True) * 2, r"finds no two molecules.*LindemannCriterion"),
        (CoordinationNumber(4.0), waters(), r"distance=4 is more than the cell allows, 3\.20 Å"),
    ],
)
def test_a_system_that_does_not_fit_is_refused(detector, atoms, message):
    with pytest.raises(ValueError, match=message):
        bound(detector, atoms)
