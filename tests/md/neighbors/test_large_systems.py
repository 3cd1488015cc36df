"""Systems of thousands of atoms: memory and pairs grow linearly, and the numbers are those of all pairs."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule

from stable_plugin import ClosestContact, IntermolecularContact, LocalContacts, System
from stable_plugin.detectors import geometry
from stable_plugin.md.neighbors import NeighborList, edges_within, pairs
from stable_plugin.observables import contacts


def waters(n_side, spacing=3.1, periodic=False, seed=0):
    """Return water molecules on a grid, rotated at random."""
    random = np.random.default_rng(seed)
    frames = []
    for corner in np.ndindex(n_side, n_side, n_side):
        one = molecule("H2O")
        one.rotate(random.uniform(0, 360), random.normal(size=3))
        one.translate(spacing * np.array(corner) - one.positions[0])
        frames.append(one)
    numbers, positions = (np.concatenate([getattr(each, name) for each in frames]) for name in ("numbers", "positions"))
    return Atoms(numbers, positions, cell=[n_side * spacing] * 3 if periodic else None, pbc=periodic)


def positions_of(atoms, n_replicas=2):
    """Return slightly different replicas."""
    noise = torch.randn(n_replicas, len(atoms), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.tensor(atoms.positions) + 0.03 * noise


@pytest.fixture
def search(monkeypatch):
    """Make every system a large one."""

    def switch():
        monkeypatch.setattr(geometry, "MAX_LISTED_ATOMS", 0)
        monkeypatch.setattr(contacts, "MAX_LISTED_ATOMS", 0)
        monkeypatch.setattr(pairs, "ALL_PAIRS_ATOMS", 0)

    return switch


@pytest.mark.parametrize("periodic", [False, True])
@pytest.mark.parametrize("kind", [IntermolecularContact, ClosestContact])
def test_searched_contacts_equal_listed_ones(search, kind, periodic):
    atoms = waters(3, periodic=periodic)
    system, positions = System.from_atoms(atoms), positions_of(atoms)
    positions[1, 4] = positions[1, 0] + torch.tensor([0.5, 0.0, 0.0])
    listed = kind()
    listed.bind(system, positions)
    assert listed.capturable
    expected = listed.classify(positions, positions), listed.measure(positions, positions)
    culprits = listed.offending_atoms(positions, positions)
    search()
    searched = kind()
    searched.bind(system, positions)
    assert not searched.capturable
    assert torch.allclose(searched.measure(positions, positions), expected[1], atol=1e-12)
    for found, wanted in zip(searched.classify(positions, positions), expected[0], strict=True):
        assert found.tolist() == wanted.tolist()
    assert [sorted(each) for each in searched.offending_atoms(positions, positions)] == [
        sorted(each) for each in culprits
    ]


def test_searched_contacts_flag_positions_that_are_not_finite(search):
    search()
    atoms = waters(2)
    positions = positions_of(atoms)
    positions[0, 3, 1] = torch.nan
    detector = IntermolecularContact()
    detector.bind(System.from_atoms(atoms), positions[1:])
    assert detector.classify(positions, positions)[1].tolist() == [True, False]


@pytest.mark.parametrize("periodic", [False, True])
def test_searched_local_contacts_equal_listed_ones(search, periodic):
    atoms = waters(3, periodic=periodic)
    if not periodic:
        atoms += Atoms("Na", [[-3.0, -3.0, -3.0]])
    system, positions = System.from_atoms(atoms), positions_of(atoms)
    listed = LocalContacts()
    listed.bind(system, positions)
    expected = listed.per_site(positions, system.molecules)
    search()
    searched = LocalContacts()
    searched.bind(system, positions)
    found = searched.per_site(positions, system.molecules)
    assert searched.kinds == listed.kinds
    assert torch.allclose(found, expected.clamp_max(contacts.MAX_SEARCH_A), atol=1e-12, equal_nan=True)


def test_searched_neighbors_equal_all_pairs(search):
    atoms = waters(3)
    system, positions = System.from_atoms(atoms), positions_of(atoms)

    def edges():
        return {tuple(edge) for edge in edges_within(positions, 4.0, system).index.T.tolist()}

    expected = edges()
    search()
    assert edges() == expected
    neighbors, active = NeighborList(4.0, 0.5, system), torch.ones(2, dtype=torch.bool)
    neighbors.update(positions, active)
    assert {tuple(edge) for edge in neighbors.edges(positions, active).index.T.tolist()} == expected
    assert neighbors.searches == 1
    # An atom that moves further than half the skin needs another search.
    positions = positions.clone()
    positions[0, 0] += 0.5
    assert neighbors.did_overflow(positions).tolist() == [True, False]
    neighbors.update(positions, active)
    assert {tuple(edge) for edge in neighbors.edges(positions, active).index.T.tolist()} == edges()


def test_pairs_of_isolated_systems_grow_linearly():
    counts = []
    for n_side in (6, 12):
        atoms = waters(n_side)
        neighbors = NeighborList(4.0, 1.0, System.from_atoms(atoms))
        positions = positions_of(atoms, 1)
        neighbors.update(positions, torch.ones(1, dtype=torch.bool))
        counts.append(len(neighbors._pairs.first) / len(atoms))
    # Atoms at the surface have fewer neighbors; all pairs would be eight times as many per atom.
    assert counts[1] < 1.4 * counts[0]


def test_contacts_of_a_large_system_need_little_memory():
    atoms = waters(10)
    system, positions = System.from_atoms(atoms), positions_of(atoms)
    detector, observable = IntermolecularContact(), LocalContacts()
    detector.bind(system, positions)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        detector.measure(positions, positions)
        observable.bind(system, positions)
    # One tensor of the distances of all pairs of 3,000 atoms would be 72 MB.
    assert max(event.cpu_memory_usage for event in profile.events()) < 40e6
