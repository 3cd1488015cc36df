"""Observables of single molecules: brute force with ASE's minimum image."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

from stable_plugin import LocalBondAmplitudes, LocalBondLengths, LocalContactAmplitudes, LocalContacts, System


def mixture(seed=0):
    """Return water and ammonia in a slanted cell, with random orientations."""
    random = np.random.default_rng(seed)
    cell = 8.0 * np.array([[1.0, 0.0, 0.0], [0.2, 1.0, 0.0], [0.1, -0.3, 1.0]])
    box = Atoms(cell=cell, pbc=True)
    for index, corner in enumerate(np.ndindex(2, 2, 2)):
        single = molecule("H2O" if index % 3 else "NH3")
        single.rotate(random.uniform(0, 360), random.normal(size=3))
        single.translate((np.array(corner) + 0.2) / 2 @ cell)
        box += single
    return box


def perturbed(atoms, n_frames=4, seed=1):
    """Return frames with Gaussian noise, each atom in a random periodic image."""
    random = np.random.default_rng(seed)
    images = random.integers(-1, 2, size=(n_frames, len(atoms), 3)) @ atoms.cell.array
    return torch.tensor(atoms.positions + random.normal(scale=0.1, size=(n_frames, len(atoms), 3)) + images)


def bound(observable, atoms, frames):
    observable.bind(System.from_atoms(atoms), frames)
    return observable


def brute_force_contacts(atoms, system, frame, kinds):
    """Return the shortest distances, (n_molecules, n_kinds), by loops over the atoms."""
    distances = Atoms(atoms.numbers, frame.numpy(), cell=atoms.cell, pbc=True).get_all_distances(mic=True)
    molecules = system.molecules.numpy()
    found = np.full((molecules.max() + 1, len(kinds)), np.nan)
    for i in range(len(atoms)):
        for j in range(len(atoms)):
            kind = "-".join(sorted([system.symbols[i], system.symbols[j]]))
            if molecules[i] != molecules[j]:
                entry = molecules[i], kinds.index(kind)
                found[entry] = np.fmin(found[entry], distances[i, j])
    return np.minimum(found, system.minimum_image_cutoff)


def test_local_contacts_agree_with_brute_force():
    atoms = mixture()
    system, frames = System.from_atoms(atoms), perturbed(atoms)
    contacts = bound(LocalContacts(), atoms, frames)
    assert contacts.kinds == ["H-H", "H-N", "H-O", "N-N", "N-O", "O-O"]
    found = contacts.per_site(frames, system.molecules)
    expected = np.stack([brute_force_contacts(atoms, system, frame, contacts.kinds) for frame in frames])
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-10)
    assert np.isnan(expected).any(), "water has no N-N contact"
    assert (expected < system.minimum_image_cutoff).mean() > 0.5
    np.testing.assert_allclose(contacts.target.numpy(), np.nanmean(expected, axis=(0, 1)), rtol=1e-12)
    amplitudes = bound(LocalContactAmplitudes(), atoms, frames)
    squares = (expected - np.nanmean(expected, axis=(0, 1))) ** 2
    np.testing.assert_allclose(amplitudes.per_site(frames, system.molecules).numpy(), squares, rtol=0, atol=1e-10)


def test_local_bonds_agree_with_brute_force():
    atoms = mixture()
    system, frames = System.from_atoms(atoms), perturbed(atoms)
    lengths, amplitudes = bound(LocalBondLengths(), atoms, frames), bound(LocalBondAmplitudes(), atoms, frames)
    assert lengths.kinds == ["H-N", "H-O"]
    molecules = system.molecules.numpy()
    expected = np.full((len(frames), molecules.max() + 1, 2), np.nan)
    for index, frame in enumerate(frames):
        periodic = Atoms(atoms.numbers, frame.numpy(), cell=atoms.cell, pbc=True)
        for site in range(molecules.max() + 1):
            own = [pair for pair in system.bonds.tolist() if molecules[pair[0]] == site]
            kind = int("O" in {system.symbols[atom] for pair in own for atom in pair})
            expected[index, site, kind] = np.mean([periodic.get_distance(i, j, mic=True) for i, j in own])
    np.testing.assert_allclose(lengths.per_site(frames, system.molecules).numpy(), expected, rtol=0, atol=1e-10)
    # Each molecule has the same weight, whatever its number of bonds.
    np.testing.assert_allclose(lengths.target.numpy(), np.nanmean(expected, axis=(0, 1)), rtol=1e-12)
    assert (amplitudes.target > 1e-3).all()


def test_per_site_counts_a_shared_bond_for_both():
    water = molecule("H2O")
    frames = torch.tensor(water.positions)[None]
    lengths = bound(LocalBondLengths(), water, frames)
    by_atom = lengths.per_site(frames, torch.arange(3))
    assert by_atom[0, :, 0].tolist() == pytest.approx([0.969, 0.969, 0.969], abs=1e-3)
    frames = frames.clone()
    frames[0, 1] += 0.5 * (frames[0, 1] - frames[0, 0])
    one_long = lengths.per_site(frames, torch.arange(3))[0, :, 0]
    assert one_long.tolist() == pytest.approx([1.211, 1.453, 0.969], abs=1e-3)


@pytest.mark.parametrize("atoms", [molecule("CH4"), bulk("Cu", cubic=True) * 2])
def test_local_contacts_reject_a_single_molecule(atoms):
    with pytest.raises(ValueError, match=r"LocalContacts finds no two molecules in the system: use it for liquids"):
        bound(LocalContacts(), atoms, torch.tensor(atoms.positions)[None])


def test_local_bond_lengths_reject_a_system_without_bonds():
    atoms = mixture()
    message = r"LocalBondLengths finds no bonds in the system: pass them, System\.from_atoms\(\.\.\., bonds="
    with pytest.raises(ValueError, match=message):
        LocalBondLengths().bind(System.from_atoms(atoms, bonds=[]), perturbed(atoms))
