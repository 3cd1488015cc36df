"""Neighbour graphs of periodic replicas against ASE's, pair for pair, image for image."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.neighborlist import neighbor_list
from hypothesis import given, settings
from hypothesis import strategies as st

from stable_plugin import System
from stable_plugin.md.neighbors import FARTHEST_A, NeighborList, edges_within

CUTOFF = 3.0
NUDGE = 1e-6
"""Cutoffs this close to a distance are decided by rounding."""


@st.composite
def crystals(draw):
    """A random cell, not too flat, atoms in and out of it, and a cutoff that may reach over several images."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lengths = random.uniform(2.0, 7.0, size=3)
    cell = np.diag(lengths) + np.tril(random.uniform(-0.6, 0.6, size=(3, 3)), -1) * lengths[:, None]
    cell = cell @ np.linalg.qr(random.normal(size=(3, 3)))[0]
    n_atoms = draw(st.integers(2, 8))
    fractional = random.uniform(-1.5, 2.5, size=(draw(st.integers(1, 3)), n_atoms, 3))
    pbc = draw(st.tuples(st.booleans(), st.booleans(), st.booleans()).filter(any))
    atoms = Atoms(f"C{n_atoms}", positions=fractional[0] @ cell, cell=cell, pbc=pbc)
    return atoms, torch.tensor(fractional @ cell), random.uniform(0.8, 7.0)


def listed(edges, positions, cutoff):
    """Edges within the cutoff as (sender, receiver, vector), each direction; padding left out."""
    flat = positions.reshape(-1, 3)
    vectors = flat[edges.index[1]] - flat[edges.index[0]] + edges.shifts
    within = vectors.norm(dim=-1) < cutoff
    return sorted(
        (*ends, *vector)
        for ends, vector in zip(
            edges.index[:, within].T.tolist(), vectors[within].round(decimals=6).add(0.0).tolist(), strict=True
        )
    )


def ase_edges(atoms, positions, cutoff):
    found = []
    for replica, frame in enumerate(positions.numpy()):
        there = Atoms(atoms.numbers, frame, cell=atoms.cell, pbc=atoms.pbc)
        for i, j, vector in zip(*neighbor_list("ijD", there, cutoff), strict=True):
            offset = replica * len(atoms)
            found.append((int(i) + offset, int(j) + offset, *(np.round(vector, 6) + 0.0).tolist()))
    return sorted(found)


def close(mine, theirs):
    return len(mine) == len(theirs) and np.allclose(
        sorted(mine, key=rounded), sorted(theirs, key=rounded), rtol=0, atol=3e-6
    )


def rounded(edge):
    return tuple(round(value, 4) for value in edge)


@settings(max_examples=150, deadline=None)
@given(crystals())
def test_edges_equal_those_of_ase_image_for_image(crystal):
    atoms, positions, cutoff = crystal
    expected = ase_edges(atoms, positions, cutoff)
    system = System.from_atoms(atoms, bonds=[])
    distances = [np.linalg.norm(edge[2:]) for edge in ase_edges(atoms, positions, cutoff + NUDGE)]
    if any(abs(distance - cutoff) < NUDGE for distance in distances):
        return
    assert close(listed(edges_within(positions, cutoff, system), positions, cutoff), expected)


@settings(max_examples=60, deadline=None)
@given(crystals(), st.integers(0, 1000), st.floats(0.01, 0.6), st.booleans())
def test_the_edges_of_a_simulation_are_exact_or_said_not_to_be(crystal, seed, stride, fixed):
    """Whatever way the atoms go, and however long the pairs have been in use."""
    atoms, positions, cutoff = crystal
    random = np.random.default_rng(seed)
    neighbors = NeighborList(cutoff, 0.8, System.from_atoms(atoms, bonds=[]), fixed=fixed)
    everyone = torch.ones(len(positions), dtype=torch.bool)
    for _ in range(4):
        neighbors.reallocate()
        neighbors.update(positions, everyone)
        for _ in range(3):
            positions = positions + torch.tensor(random.uniform(-stride, stride, size=positions.shape))
            edges, missed = neighbors.edges(positions, everyone), neighbors.did_overflow(positions)
            found, expected = (
                [edge for edge in all_edges if not missed[edge[0] // len(atoms)]]
                for all_edges in (listed(edges, positions, cutoff), ase_edges(atoms, positions, cutoff))
            )
            assert close(found, expected)


def gas(n_atoms=60, side=9.0, seed=0):
    random = np.random.default_rng(seed)
    atoms = Atoms(f"C{n_atoms}", positions=random.uniform(0, side, size=(n_atoms, 3)), cell=[side] * 3, pbc=True)
    return System.from_atoms(atoms, bonds=[]), torch.tensor(atoms.positions)[None]


@pytest.mark.parametrize("fixed", [False, True])
def test_pairs_are_not_searched_for_again_while_atoms_stay_near(fixed):
    system, positions = gas()
    everyone = torch.ones(1, dtype=torch.bool)
    neighbors = NeighborList(CUTOFF, 1.0, system, fixed=fixed)
    for step in range(20):
        neighbors.update(positions + 0.01 * step, everyone)
    assert neighbors.searches == 1
    neighbors.update(positions + 0.2, everyone, reserve=0.3)
    assert neighbors.searches == 2, "no room left for how far the atoms will go"
    neighbors.update(positions + 5.0, everyone)
    assert neighbors.searches == 3


def test_an_atom_that_leaps_is_missed():
    system, positions = gas()
    neighbors = NeighborList(CUTOFF, 1.0, system)
    neighbors.update(positions, torch.ones(1, dtype=torch.bool))
    positions = positions.clone()
    positions[0, 7] += torch.tensor([0.49, 0, 0])
    assert neighbors.did_overflow(positions).tolist() == [False]
    positions[0, 7] += torch.tensor([0.02, 0, 0])
    assert neighbors.did_overflow(positions).tolist() == [True]


def test_a_replica_torn_apart_gets_no_edges_and_disturbs_no_other():
    system, positions = gas()
    healthy = edges_within(positions, CUTOFF, system)
    for broken in (torch.nan, torch.inf, 10.0 * FARTHEST_A):
        batch = positions.repeat(2, 1, 1)
        batch[0, 3, 1] = broken
        edges = edges_within(batch, CUTOFF, system)
        in_second = edges.index[0] >= 60
        n_edges = int(((healthy.index[0] != healthy.index[1]) | (healthy.shifts.norm(dim=1) < CUTOFF)).sum())
        assert int(in_second.sum()) == n_edges
