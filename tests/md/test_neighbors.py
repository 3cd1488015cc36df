"""Neighbour graphs against ASE's, pair for pair."""

from math import inf

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.neighborlist import neighbor_list
from toys import as_potential, tiny_mace

from stable_plugin import System
from stable_plugin.md.neighbors import CAPACITY_QUANTUM, Edges, NeighborList, edges_within

CUTOFF = 3.0


def all_move(positions):
    return torch.ones(len(positions), dtype=torch.bool)


def isolated(positions):
    return System.from_atoms(Atoms(f"C{positions.shape[1]}", positions=positions[0].numpy()), bonds=[])


def listed(edges, positions, cutoff=CUTOFF):
    """The edges that are no padding, as (sender, receiver) over the whole batch."""
    real = (edges.shifts == 0).all(dim=1)
    flat = positions.reshape(-1, 3)
    sender, receiver = edges.index[:, ~real]
    padding = (flat[receiver] - flat[sender] + edges.shifts[~real]).norm(dim=-1)
    assert (padding > cutoff).all()
    pairs = [tuple(pair) for pair in edges.index[:, real].T.tolist()]
    assert len(pairs) == len(set(pairs)), "no edge is listed twice"
    return set(pairs)


def ase_pairs(positions, cutoff):
    """What ASE finds, replica by replica."""
    found = set()
    n_atoms = positions.shape[1]
    for replica, frame in enumerate(positions):
        first, second = neighbor_list("ij", Atoms(f"C{n_atoms}", positions=frame.numpy()), cutoff)
        found |= {(int(i) + replica * n_atoms, int(j) + replica * n_atoms) for i, j in zip(first, second, strict=True)}
    return found


@pytest.mark.parametrize("seed", range(25))
def test_edges_equal_those_of_ase_pair_for_pair(seed):
    random = np.random.default_rng(seed)
    n_replicas, n_atoms = random.integers(1, 6), random.integers(2, 26)
    positions = torch.tensor(random.normal(scale=random.uniform(0.5, 4.0), size=(n_replicas, n_atoms, 3)))
    cutoff = random.uniform(0.5, 6.0)
    assert listed(edges_within(positions, cutoff, isolated(positions)), positions, cutoff) == ase_pairs(
        positions, cutoff
    )


def test_edges_of_aspirin_equal_those_of_ase(aspirin_positions):
    expected = ase_pairs(aspirin_positions[:6], 4.5)
    assert len(expected) > 6 * 200
    assert (
        listed(edges_within(aspirin_positions[:6], 4.5, isolated(aspirin_positions[:6])), aspirin_positions[:6], 4.5)
        == expected
    )


def test_atoms_far_apart_have_no_edge():
    positions = torch.tensor([[[0.0, 0, 0], [0, 0, 9.0]]])
    edges = edges_within(positions, CUTOFF, isolated(positions))
    assert listed(edges, positions) == set()
    assert edges.index.shape == (2, 2), "models expect an edge: padding"


def test_a_model_without_a_cutoff_gets_no_edges():
    positions = torch.rand(2, 5, 3)
    edges = edges_within(positions, inf, isolated(positions))
    assert edges.index.shape == (2, 0)
    assert edges.shifts.shape == (0, 3)
    neighbors = NeighborList(inf, 0.5, isolated(positions))
    neighbors.update(positions, all_move(positions))
    assert neighbors.edges(positions, all_move(positions)).index.shape == (2, 0)
    assert not neighbors.did_overflow(positions).any()


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_the_edges_of_a_simulation_are_those_of_ase_at_every_step(fixed, seed):
    random = np.random.default_rng(seed)
    positions = torch.tensor(random.normal(scale=2.0, size=(random.integers(1, 5), random.integers(2, 20), 3)))
    neighbors = NeighborList(CUTOFF, 0.0, isolated(positions), fixed=fixed)
    neighbors.update(positions, all_move(positions))
    for _ in range(5):
        edges = neighbors.edges(positions, all_move(positions))
        assert not neighbors.did_overflow(positions).any()
        assert listed(edges, positions) == ase_pairs(positions, CUTOFF)
        positions = positions + torch.tensor(random.normal(scale=0.1, size=positions.shape))


@pytest.mark.parametrize("fixed", [False, True])
def test_replicas_that_rest_get_no_edges_and_are_never_missed(fixed):
    positions = torch.rand(3, 4, 3, dtype=torch.float64)
    active = torch.tensor([True, False, True])
    neighbors = NeighborList(CUTOFF, 0.5, isolated(positions), fixed=fixed)
    neighbors.update(positions, active)
    edges = neighbors.edges(positions, active)
    assert {sender // 4 for sender, _ in listed(edges, positions)} == {0, 2}
    assert not neighbors.did_overflow(positions).any()


@pytest.mark.parametrize("fixed", [False, True])
def test_a_replica_that_is_not_finite_and_rests_disturbs_no_other(fixed):
    positions = torch.rand(3, 4, 3, dtype=torch.float64)
    healthy = listed(edges_within(positions, CUTOFF, isolated(positions)), positions)
    broken = positions.clone()
    broken[1, 2] = torch.nan
    active = torch.tensor([True, False, True])
    neighbors = NeighborList(CUTOFF, 0.5, isolated(positions), fixed=fixed)
    neighbors.update(broken, active)
    assert listed(neighbors.edges(broken, active), positions) == {pair for pair in healthy if pair[0] // 4 != 1}
    assert not neighbors.did_overflow(broken).any()


def test_fixed_edges_keep_their_number_and_say_when_it_is_too_small():
    grid = torch.stack(torch.meshgrid(*[torch.arange(8.0)] * 3, indexing="ij"), dim=-1).reshape(1, -1, 3).double()
    everyone = all_move(grid)
    neighbors = NeighborList(CUTOFF, 0.0, isolated(grid), fixed=True)
    loose, tight = 2.9 * grid, 1.4 * grid
    neighbors.update(loose, everyone)
    room, generation = neighbors.edges(loose, everyone).index.shape[1], neighbors.generation
    assert room % CAPACITY_QUANTUM == 0
    assert len(ase_pairs(loose, CUTOFF)) < room
    assert neighbors.edges(tight, everyone).index.shape[1] == room
    assert neighbors.did_overflow(tight).all()
    assert neighbors.reallocate()
    neighbors.update(loose, everyone)
    assert neighbors.generation > generation
    edges = neighbors.edges(tight, everyone)
    assert not neighbors.did_overflow(tight).any()
    assert listed(edges, tight) == ase_pairs(tight, CUTOFF)
    assert not neighbors.reallocate()


@pytest.fixture(scope="module")
def mace_potential(aspirin_frames):
    system = System.from_atoms(aspirin_frames[0])
    return as_potential(tiny_mace(system.numbers, channels=8), system)


def with_padding(edges, n_more, cutoff):
    """The same edges and as many of padding, written as the neighbour list writes it."""
    more = torch.zeros(n_more, 3, dtype=edges.shifts.dtype)
    more[:, 0] = 2.0 * cutoff
    return Edges(
        torch.cat([edges.index, torch.zeros(2, n_more, dtype=torch.long)], dim=1), torch.cat([edges.shifts, more])
    )


def test_padding_edges_contribute_exactly_nothing(mace_potential, aspirin_positions):
    positions = aspirin_positions[:3]
    bare = mace_potential.edges(positions)
    atomic = mace_potential.atomic_energies(positions, bare)
    energies, forces = mace_potential.energies_and_forces(positions, bare)
    for padded in (with_padding(bare, n_more, mace_potential.cutoff) for n_more in (1, 3000)):
        padded_energies, padded_forces = mace_potential.energies_and_forces(positions, padded)
        assert (mace_potential.atomic_energies(positions, padded) - atomic).abs().max() < 1e-14
        assert (padded_energies - energies).abs().max() < 1e-13
        assert (padded_forces - forces).abs().max() < 1e-14


def test_padding_edges_contribute_nothing_to_a_parameter_gradient(mace_potential, aspirin_positions):
    positions = aspirin_positions[:2]
    parameters = mace_potential.trainable_parameters()
    bare = mace_potential.edges(positions)
    gradients = [
        torch.autograd.grad(mace_potential.atomic_energies(positions, edges).sum(), parameters)
        for edges in (bare, with_padding(bare, 500, mace_potential.cutoff))
    ]
    for plain, padded in zip(*gradients, strict=True):
        assert torch.allclose(plain, padded, rtol=1e-12, atol=1e-13)
