"""The neighbor list of a simulation against ASE's, step by step."""

from math import inf

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from neighbor_tools import (
    CUTOFF,
    all_move,
    ase_edges,
    ase_pairs,
    close,
    crystals,
    gas,
    isolated,
    isolated_pairs,
    listed,
)

from stable_plugin import System
from stable_plugin.md.neighbors import NeighborList, edges_within
from stable_plugin.md.neighbors.neighbor_list import CAPACITY_QUANTUM

with_or_without_padding = pytest.mark.parametrize("fixed", [False, True])


@with_or_without_padding
@pytest.mark.parametrize("seed", range(10))
def test_edges_match_ase_at_every_step(fixed, seed):
    random = np.random.default_rng(seed)
    positions = torch.tensor(random.normal(scale=2.0, size=(random.integers(1, 5), random.integers(2, 20), 3)))
    neighbors = NeighborList(CUTOFF, 0.0, isolated(positions), fixed=fixed)
    neighbors.update(positions, all_move(positions))
    for _ in range(5):
        edges = neighbors.edges(positions, all_move(positions))
        assert not neighbors.did_overflow(positions).any()
        assert isolated_pairs(edges, positions) == ase_pairs(positions, CUTOFF)
        positions = positions + torch.tensor(random.normal(scale=0.1, size=positions.shape))


@settings(max_examples=60, deadline=None)
@given(crystals(), st.integers(0, 1000), st.floats(0.01, 0.6), st.booleans())
def test_periodic_edges_are_exact_or_did_overflow(crystal, seed, stride, fixed):
    """For any motion of the atoms, and any age of the pairs."""
    atoms, positions, cutoff = crystal
    random = np.random.default_rng(seed)
    neighbors = NeighborList(cutoff, 0.8, System.from_atoms(atoms, bonds=[]), fixed=fixed)
    everyone = all_move(positions)
    for _ in range(4):
        neighbors.reallocate()
        neighbors.update(positions, everyone)
        for _ in range(3):
            positions = positions + torch.tensor(random.uniform(-stride, stride, size=positions.shape))
            edges, overflow = neighbors.edges(positions, everyone), neighbors.did_overflow(positions)
            found, expected = (
                [edge for edge in all_edges if not overflow[edge[0] // len(atoms)]]
                for all_edges in (listed(edges, positions, cutoff), ase_edges(atoms, positions, cutoff))
            )
            assert close(found, expected)


def test_infinite_cutoff_has_no_edges():
    positions = torch.rand(2, 5, 3)
    neighbors = NeighborList(inf, 0.5, isolated(positions))
    neighbors.update(positions, all_move(positions))
    assert neighbors.edges(positions, all_move(positions)).index.shape == (2, 0)
    assert not neighbors.did_overflow(positions).any()


def test_edges_before_update_is_an_error():
    positions = torch.rand(2, 5, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"has no pairs: call update\(\) before edges\(\)"):
        NeighborList(CUTOFF, 0.5, isolated(positions)).edges(positions, all_move(positions))


@with_or_without_padding
def test_inactive_replicas_have_no_edges(fixed):
    positions = torch.rand(3, 4, 3, dtype=torch.float64)
    active = torch.tensor([True, False, True])
    neighbors = NeighborList(CUTOFF, 0.5, isolated(positions), fixed=fixed)
    neighbors.update(positions, active)
    edges = neighbors.edges(positions, active)
    assert {sender // 4 for sender, _ in isolated_pairs(edges, positions)} == {0, 2}
    assert not neighbors.did_overflow(positions).any()


@with_or_without_padding
def test_nonfinite_replica_affects_no_other(fixed):
    positions = torch.rand(3, 4, 3, dtype=torch.float64)
    healthy = isolated_pairs(edges_within(positions, CUTOFF, isolated(positions)), positions)
    broken = positions.clone()
    broken[1, 2] = torch.nan
    active = torch.tensor([True, False, True])
    neighbors = NeighborList(CUTOFF, 0.5, isolated(positions), fixed=fixed)
    neighbors.update(broken, active)
    found = isolated_pairs(neighbors.edges(broken, active), positions)
    assert found == {pair for pair in healthy if pair[0] // 4 != 1}
    assert not neighbors.did_overflow(broken).any()


def test_fixed_capacity_overflows_and_reallocates():
    grid = torch.stack(torch.meshgrid(*[torch.arange(8.0)] * 3, indexing="ij"), dim=-1).reshape(1, -1, 3).double()
    everyone = all_move(grid)
    neighbors = NeighborList(CUTOFF, 0.0, isolated(grid), fixed=True)
    loose, tight = 2.9 * grid, 1.4 * grid
    neighbors.update(loose, everyone)
    capacity, generation = neighbors.edges(loose, everyone).index.shape[1], neighbors.generation
    assert capacity % CAPACITY_QUANTUM == 0
    assert len(ase_pairs(loose, CUTOFF)) < capacity
    assert neighbors.edges(tight, everyone).index.shape[1] == capacity
    assert neighbors.did_overflow(tight).all()
    assert neighbors.reallocate()
    neighbors.update(loose, everyone)
    assert neighbors.generation > generation
    edges = neighbors.edges(tight, everyone)
    assert not neighbors.did_overflow(tight).any()
    assert isolated_pairs(edges, tight) == ase_pairs(tight, CUTOFF)
    assert not neighbors.reallocate()


@with_or_without_padding
def test_update_searches_only_when_needed(fixed):
    system, positions = gas()
    everyone = all_move(positions)
    neighbors = NeighborList(CUTOFF, 1.0, system, fixed=fixed)
    for step in range(20):
        neighbors.update(positions + 0.01 * step, everyone)
    assert neighbors.searches == 1
    neighbors.update(positions + 0.2, everyone, margin=0.3)
    assert neighbors.searches == 2, "the margin is more than what is left of the skin"
    neighbors.update(positions + 5.0, everyone)
    assert neighbors.searches == 3


def test_did_overflow_beyond_half_skin():
    system, positions = gas()
    neighbors = NeighborList(CUTOFF, 1.0, system)
    neighbors.update(positions, all_move(positions))
    positions = positions.clone()
    positions[0, 7] += torch.tensor([0.49, 0, 0])
    assert neighbors.did_overflow(positions).tolist() == [False]
    positions[0, 7] += torch.tensor([0.02, 0, 0])
    assert neighbors.did_overflow(positions).tolist() == [True]


def test_neighbor_list_repr_shows_arguments():
    system, _ = gas()
    expected = f"NeighborList(cutoff=3.0, skin=1.0, system={system!r}, fixed=True)"
    assert repr(NeighborList(CUTOFF, 1.0, system, fixed=True)) == expected
