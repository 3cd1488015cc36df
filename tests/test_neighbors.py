"""Neighbour graphs against ASE's, pair for pair."""

from math import inf

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.neighborlist import neighbor_list
from toys import as_potential, tiny_mace

from stable_plugin import System
from stable_plugin.neighbors import CAPACITY_QUANTUM, Edges, SkinList, edges_within

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
    assert edges.index.shape == (2, CAPACITY_QUANTUM)


def test_a_model_without_a_cutoff_gets_no_edges():
    positions = torch.rand(2, 5, 3)
    edges = edges_within(positions, inf, isolated(positions))
    assert edges.index.shape == (2, 0)
    assert edges.shifts.shape == (0, 3)
    skin_list = SkinList(inf, 0.5, isolated(positions))
    skin_list.build(positions, all_move(positions))
    assert not skin_list.missed(positions).any()


def test_edge_counts_come_in_few_sizes_and_hold_every_edge():
    random = np.random.default_rng(0)
    for n_replicas in (1, 3, 9, 12):
        positions = torch.tensor(random.normal(size=(n_replicas, 8, 3)))
        edges = edges_within(positions, 20.0, isolated(positions))
        n_edges = n_replicas * 8 * 7
        assert edges.index.shape[1] % CAPACITY_QUANTUM == 0
        assert n_edges <= edges.index.shape[1] < n_edges + CAPACITY_QUANTUM
        assert len(listed(edges, positions, 20.0)) == n_edges


def test_a_skin_lists_pairs_beyond_the_cutoff():
    positions = torch.tensor([[[0.0, 0, 0], [0, 0, 3.2], [0, 0, -3.8]]], dtype=torch.float64)
    edges = SkinList(CUTOFF, 0.5, isolated(positions)).build(positions, all_move(positions))
    assert listed(edges, positions) == {(0, 1), (1, 0)}


def test_a_wild_replica_gets_every_pair_whatever_its_distance():
    positions = torch.tensor([[[0.0, 0, 0], [0, 0, 3.2], [0, 0, -380.0]]], dtype=torch.float64)
    skin_list = SkinList(CUTOFF, 0.0, isolated(positions))
    edges = skin_list.build(positions, all_move(positions), wild=all_move(positions))
    assert listed(edges, positions) == {(i, j) for i in range(3) for j in range(3) if i != j}
    assert not skin_list.missed(torch.zeros_like(positions)).any()


def test_only_the_wild_replica_gets_every_pair():
    positions = torch.tensor([[0.0, 0, 0], [0, 0, 3.2], [0, 0, 9.0]], dtype=torch.float64).repeat(3, 1, 1)
    skin_list = SkinList(CUTOFF, 0.5, isolated(positions))
    wild = torch.tensor([False, True, True])
    edges = skin_list.build(positions, torch.tensor([True, True, False]), wild)
    everything = {(3 + i, 3 + j) for i in range(3) for j in range(3) if i != j}
    assert listed(edges, positions) == {(0, 1), (1, 0)} | everything
    assert skin_list.missed(torch.zeros_like(positions)).tolist() == [True, False, False]


def test_replicas_that_rest_get_no_edges_and_are_never_missed():
    positions = torch.rand(3, 4, 3, dtype=torch.float64)
    active = torch.tensor([True, False, True])
    skin_list = SkinList(CUTOFF, 0.5, isolated(positions))
    edges = skin_list.build(positions, active)
    replicas = {sender // 4 for sender, _ in listed(edges, positions)}
    assert replicas == {0, 2}
    assert not skin_list.missed(positions).any()


def test_a_replica_that_is_not_finite_and_rests_disturbs_no_other():
    positions = torch.rand(3, 4, 3, dtype=torch.float64)
    healthy = listed(edges_within(positions, CUTOFF, isolated(positions)), positions)
    broken = positions.clone()
    broken[1, 2] = torch.nan
    skin_list = SkinList(CUTOFF, 0.5, isolated(positions))
    edges = skin_list.build(broken, torch.tensor([True, False, True]))
    assert listed(edges, positions) == {pair for pair in healthy if pair[0] // 4 != 1}
    assert not skin_list.missed(broken).any()


def test_a_pair_that_comes_in_from_outside_the_skin_is_missed():
    positions = torch.tensor([[[0.0, 0, 0], [0, 0, 4.0]]], dtype=torch.float64)
    skin_list = SkinList(CUTOFF, 0.5, isolated(positions))
    assert listed(skin_list.build(positions, all_move(positions)), positions) == set()
    assert skin_list.missed(positions).tolist() == [False]
    positions[0, 1, 2] = CUTOFF + 0.01
    assert not skin_list.missed(positions).any()
    positions[0, 1, 2] = CUTOFF - 0.01
    assert skin_list.missed(positions).tolist() == [True]


def test_a_pair_that_was_listed_is_not_missed_wherever_it_goes():
    positions = torch.tensor([[[0.0, 0, 0], [0, 0, 3.4]]], dtype=torch.float64)
    skin_list = SkinList(CUTOFF, 0.5, isolated(positions))
    skin_list.build(positions, all_move(positions))
    positions[0, 1, 2] = 1.0
    assert not skin_list.missed(positions).any()


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


def without_padding(edges):
    real = (edges.shifts == 0).all(dim=1)
    return Edges(edges.index[:, real], edges.shifts[real])


def test_padding_edges_contribute_exactly_nothing(mace_potential, aspirin_positions):
    positions = aspirin_positions[:3]
    edges = mace_potential.edges(positions)
    bare = without_padding(edges)
    assert bare.index.shape[1] < edges.index.shape[1]
    atomic = mace_potential.atomic_energies(positions, bare)
    energies, forces = mace_potential.energies_and_forces(positions, bare)
    for padded in (edges, with_padding(edges, 3000, mace_potential.cutoff)):
        padded_energies, padded_forces = mace_potential.energies_and_forces(positions, padded)
        assert (mace_potential.atomic_energies(positions, padded) - atomic).abs().max() < 1e-14
        assert (padded_energies - energies).abs().max() < 1e-13
        assert (padded_forces - forces).abs().max() < 1e-14


def test_padding_edges_contribute_nothing_to_a_parameter_gradient(mace_potential, aspirin_positions):
    positions = aspirin_positions[:2]
    parameters = mace_potential.trainable_parameters()
    bare = without_padding(mace_potential.edges(positions))
    gradients = [
        torch.autograd.grad(mace_potential.atomic_energies(positions, edges).sum(), parameters)
        for edges in (bare, with_padding(bare, 500, mace_potential.cutoff))
    ]
    for plain, padded in zip(*gradients, strict=True):
        assert torch.allclose(plain, padded, rtol=1e-12, atol=1e-13)
