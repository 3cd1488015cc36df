"""Edges of a frame against ASE's, and what padding contributes."""

from contextlib import contextmanager
from dataclasses import replace
from math import inf

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from neighbor_tools import (
    CUTOFF,
    ase_edges,
    ase_pairs,
    close,
    crystals,
    gas,
    isolated,
    isolated_pairs,
    listed,
    near_cutoff,
)
from toys import PairRepulsion, as_potential, tiny_mace, triatomic

from stable_plugin import System
from stable_plugin.md.neighbors import Edges, edges_within, pairs
from stable_plugin.md.neighbors import search as search_module
from stable_plugin.md.neighbors.pairs import MAX_COORDINATE_A, Pairs
from stable_plugin.md.neighbors.search import search_on_cpu, search_on_device

SEARCHES = [search_on_cpu, search_on_device]


@pytest.mark.parametrize("seed", range(25))
def test_edges_within_matches_ase_isolated(seed):
    random = np.random.default_rng(seed)
    n_replicas, n_atoms = random.integers(1, 6), random.integers(2, 26)
    positions = torch.tensor(random.normal(scale=random.uniform(0.5, 4.0), size=(n_replicas, n_atoms, 3)))
    cutoff = random.uniform(0.5, 6.0)
    edges = edges_within(positions, cutoff, isolated(positions))
    assert isolated_pairs(edges, positions, cutoff) == ase_pairs(positions, cutoff)


def test_edges_within_matches_ase_aspirin(aspirin_positions):
    positions = aspirin_positions[:6]
    expected = ase_pairs(positions, 4.5)
    assert len(expected) > 6 * 200
    assert isolated_pairs(edges_within(positions, 4.5, isolated(positions)), positions, 4.5) == expected


@contextmanager
def searched_by(search):
    """Search as on another device, in as many parts as a large system needs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "search_on_cpu", search)
        patch.setattr(search_module, "MAX_DISTANCES", 1000)
        yield


@pytest.mark.parametrize("search", SEARCHES)
@settings(max_examples=150, deadline=None)
@given(crystal=crystals())
def test_edges_within_matches_ase_periodic(search, crystal):
    atoms, positions, cutoff = crystal
    if near_cutoff(atoms, positions, cutoff):
        return
    with searched_by(search):
        edges = edges_within(positions, cutoff, System.from_atoms(atoms, bonds=[]))
    assert close(listed(edges, positions, cutoff), ase_edges(atoms, positions, cutoff))


def test_both_searches_find_the_same_pairs_of_replicas_with_their_own_cells():
    """Triclinic, a slab, one replica torn apart, and a cutoff longer than the cell."""
    system, positions = gas()
    cells = system.cell * torch.tensor([1.0, 1.1, 0.8])[:, None, None]
    cells[1, 2] += 0.7 * cells[1, 0]
    batch = positions.repeat(3, 1, 1) * 1.5
    batch[2, 3] = torch.nan
    for pbc in ((True, True, True), (True, False, True)):
        found = []
        for search in SEARCHES:
            with searched_by(search):
                each = pairs.pairs_within(batch, CUTOFF, replace(system, pbc=pbc), cells)
            assert each.squared_distances(batch).max() < CUTOFF**2
            assert each.shifts is not None
            forward = torch.where((each.first <= each.second)[:, None], each.shifts, -each.shifts)
            ends = torch.stack([each.first, each.second]).sort(dim=0).values.tolist()
            vectors = torch.where(each.first == each.second, forward.abs().sum(dim=1), forward.sum(dim=1)).tolist()
            found.append(sorted((*end, round(vector, 6)) for *end, vector in zip(*ends, vectors, strict=True)))
        assert found[0] == found[1]
        assert {end[0] // system.n_atoms for end in found[0]} == {0, 1}


def test_edges_within_pads_an_empty_graph():
    positions = torch.tensor([[[0.0, 0, 0], [0, 0, 9.0]]])
    edges = edges_within(positions, CUTOFF, isolated(positions))
    assert isolated_pairs(edges, positions) == set()
    assert edges.index.shape == (2, 2), "models expect at least one edge"


def test_edges_within_infinite_cutoff_is_empty():
    positions = torch.rand(2, 5, 3)
    edges = edges_within(positions, inf, isolated(positions))
    assert edges.index.shape == (2, 0)
    assert edges.shifts.shape == (0, 3)


def test_edges_within_skips_a_torn_replica():
    system, positions = gas()
    healthy = edges_within(positions, CUTOFF, system)
    for broken in (torch.nan, torch.inf, 10.0 * MAX_COORDINATE_A):
        batch = positions.repeat(2, 1, 1)
        batch[0, 3, 1] = broken
        edges = edges_within(batch, CUTOFF, system)
        in_second = edges.index[0] >= 60
        n_edges = int(((healthy.index[0] != healthy.index[1]) | (healthy.shifts.norm(dim=1) < CUTOFF)).sum())
        assert int(in_second.sum()) == n_edges


def test_slice_replicas_pads_parts_without_edges():
    frames = torch.zeros(4, 3, 3, dtype=torch.float64)
    frames[:, 1, 0] = torch.tensor([1.0, 9.0, 9.0, 1.0], dtype=torch.float64)
    frames[:, 2, 1] = 20.0
    potential = PairRepulsion(triatomic(1.0).system)
    edges = potential.edges(frames)
    parts = [edges.slice_replicas(first, first + 1, 3, potential.cutoff) for first in range(4)]
    assert [part.index.shape[1] for part in parts] == [2, 1, 1, 2]
    energies = torch.cat([potential.energies(frames[[i]], part) for i, part in enumerate(parts)])
    assert energies.tolist() == potential.energies(frames, edges).tolist()


@pytest.fixture(scope="module")
def mace_potential(aspirin_frames):
    system = System.from_atoms(aspirin_frames[0])
    return as_potential(tiny_mace(system.numbers, channels=8), system)


def with_padding(edges, n_more, positions, cutoff):
    """Return the same edges and ``n_more`` of padding, as the neighbor list writes it."""
    more = Pairs.padding(n_more, positions, cutoff)
    index = torch.stack([more.first, more.second])
    return Edges(torch.cat([edges.index, index], dim=1), torch.cat([edges.shifts, more.shifts]))


def test_padding_takes_atoms_in_turn():
    """On a GPU the edges of one atom are added up one after the other: 128 aspirins took 2.8 times as long."""
    padding = Pairs.padding(100, torch.zeros(3, 21, 3), 4.0)
    assert torch.equal(padding.first, padding.second)
    assert torch.equal(padding.replica, padding.first // 21)
    assert torch.bincount(padding.first, minlength=63).tolist() == [2] * 37 + [1] * 26


def test_padding_contributes_nothing_to_forces(mace_potential, aspirin_positions):
    positions = aspirin_positions[:3]
    bare = mace_potential.edges(positions)
    atomic = mace_potential.atomic_energies(positions, bare)
    energies, forces = mace_potential.energies_and_forces(positions, bare)
    for padded in (with_padding(bare, n_more, positions, mace_potential.cutoff) for n_more in (1, 3000)):
        padded_energies, padded_forces = mace_potential.energies_and_forces(positions, padded)
        assert (mace_potential.atomic_energies(positions, padded) - atomic).abs().max() < 1e-14
        assert (padded_energies - energies).abs().max() < 1e-13
        assert (padded_forces - forces).abs().max() < 1e-14


def test_padding_contributes_nothing_to_gradients(mace_potential, aspirin_positions):
    positions = aspirin_positions[:2]
    parameters = mace_potential.trainable_parameters()
    bare = mace_potential.edges(positions)
    gradients = [
        torch.autograd.grad(mace_potential.atomic_energies(positions, edges).sum(), parameters)
        for edges in (bare, with_padding(bare, 500, positions, mace_potential.cutoff))
    ]
    for plain, padded in zip(*gradients, strict=True):
        assert torch.allclose(plain, padded, rtol=1e-12, atol=1e-13)
