"""Detectors based on distances: closed answers, and brute force with ASE's minimum image."""

import numpy as np
import pytest
import torch
from ase import Atoms
from detector_tools import at_rest, bound, chain_frames, classified, water_box

from stable_plugin import BondDeviation, ClosestContact, IntermolecularContact, System
from stable_plugin.detectors import geometry


def test_bond_deviation_measures_the_worst_bond():
    # The first bond is 1.4 and 1.5 Å long in the reference: its mean is 1.45 Å.
    reference = chain_frames({}, {(0, 0): -0.1})
    detector = bound(BondDeviation(0.25, 1.0), reference=reference)
    positions = chain_frames({}, {(0, 0): -0.25}, {(3, 0): 3.9}, {(3, 0): 6.0})
    values = detector.measure(positions, at_rest(positions))
    assert values.tolist() == pytest.approx([0.05, 0.2, 0.3, 1.8])
    assert classified(detector, positions) == ([False, False, True, True], [False, False, False, True])


def test_closest_contact_skips_pairs_within_two_bonds():
    detector = bound(ClosestContact(1.2, 0.3))
    # Atom 3 approaches atom 1, with which it shares a neighbor, and then atom 0.
    positions = chain_frames({}, {(3, 0): 1.5}, {(3, 0): 1.1}, {(3, 0): 0.2})
    assert detector.measure(positions, at_rest(positions)).tolist() == pytest.approx([-4.2, -1.5, -1.1, -0.2])
    assert classified(detector, positions) == ([False, False, True, True], [False, False, False, True])
    assert str(detector) == "ClosestContact(distance=1.2)"


def test_closest_contact_agrees_with_the_bond_graph(aspirin_frames, aspirin_positions):
    system = System.from_atoms(aspirin_frames[0])
    adjacency = np.eye(21, dtype=bool)
    for i, j in system.bonds.tolist():
        adjacency[i, j] = adjacency[j, i] = True
    within_two = (adjacency.astype(int) @ adjacency.astype(int)) > 0
    detector = ClosestContact()
    detector.bind(system, aspirin_positions)
    found = detector.measure(aspirin_positions, at_rest(aspirin_positions))
    for value, frame in zip(found.tolist(), aspirin_frames, strict=True):
        assert value == pytest.approx(-frame.get_all_distances()[~within_two].min(), rel=1e-12)


@pytest.mark.parametrize("slant", [0.0, 0.3])
def test_intermolecular_contact_agrees_with_brute_force(slant, monkeypatch):
    monkeypatch.setattr(geometry, "MAX_DISTANCES", 100)  # pairs in many chunks
    atoms = water_box(slant=slant)
    detector = bound(IntermolecularContact(), atoms)
    random = np.random.default_rng(1)
    images = random.integers(-1, 2, size=(5, 24, 3)) @ atoms.cell.array
    frames = torch.tensor(atoms.positions + random.normal(scale=0.3, size=(5, 24, 3)) + images)
    different = np.arange(24)[:, None] // 3 != np.arange(24) // 3
    offending_atoms = detector.offending_atoms(frames, at_rest(frames))
    for frame, value, (i, j) in zip(frames, detector.measure(frames, at_rest(frames)), offending_atoms, strict=True):
        periodic = Atoms(atoms.numbers, frame.numpy(), cell=atoms.cell, pbc=True)
        distances = np.where(different, periodic.get_all_distances(mic=True), np.inf)
        assert -value.item() == pytest.approx(distances.min(), abs=1e-10)
        assert distances[i, j] == distances.min()


def test_intermolecular_contact_skips_pairs_of_one_molecule():
    atoms = water_box()
    squeezed = torch.tensor(atoms.positions)[None].clone()
    squeezed[0, 1] = squeezed[0, 0] + 0.1
    detector = bound(IntermolecularContact(1.2), atoms)
    assert not detector.classify(squeezed, at_rest(squeezed))[0].any()
    squeezed[0, 1] = squeezed[0, 3] + 0.5
    assert detector.classify(squeezed, at_rest(squeezed))[0].all()


def test_failures_are_described_by_their_atoms():
    positions = chain_frames({(3, 0): 3.9})
    bonds, contacts = bound(BondDeviation(0.25)), bound(ClosestContact(1.2))
    described = bonds.describe(positions, at_rest(positions))[0]
    first, second = bonds.offending_atoms(positions, at_rest(positions))[0]
    symbols = bonds._bound_system.symbols
    length = (positions[0, first] - positions[0, second]).norm()
    assert described.startswith(f"bond {symbols[first]}{first}-{symbols[second]}{second} {length:.3g} Å, mean of the ")
    distance = -contacts.measure(positions, at_rest(positions)).item()
    assert contacts.describe(positions, at_rest(positions))[0].endswith(f" {distance:.3g} Å")
