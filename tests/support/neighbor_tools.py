"""Neighbor graphs by ASE, and random structures to compare them on."""

import numpy as np
import torch
from ase import Atoms
from ase.neighborlist import neighbor_list
from hypothesis import strategies as st

from stable_plugin import System

CUTOFF = 3.0
NUDGE = 1e-6
"""Cutoffs this close to a distance, in Å, are decided by rounding."""


def all_move(positions):
    return torch.ones(len(positions), dtype=torch.bool)


def isolated(positions):
    return System.from_atoms(Atoms(f"C{positions.shape[1]}", positions=positions[0].numpy()), bonds=[])


def isolated_pairs(edges, positions, cutoff=CUTOFF):
    """Return the edges that are not padding as (sender, receiver) over the whole batch."""
    real = (edges.shifts == 0).all(dim=1)
    flat = positions.reshape(-1, 3)
    sender, receiver = edges.index[:, ~real]
    padding = (flat[receiver] - flat[sender] + edges.shifts[~real]).norm(dim=-1)
    assert (padding > cutoff).all()
    pairs = [tuple(pair) for pair in edges.index[:, real].T.tolist()]
    assert len(pairs) == len(set(pairs)), "no edge is listed twice"
    return set(pairs)


def ase_pairs(positions, cutoff):
    """Return the pairs that ASE finds in isolated replicas, as :func:`isolated_pairs`."""
    found = set()
    n_atoms = positions.shape[1]
    for replica, frame in enumerate(positions):
        first, second = neighbor_list("ij", Atoms(f"C{n_atoms}", positions=frame.numpy()), cutoff)
        found |= {(int(i) + replica * n_atoms, int(j) + replica * n_atoms) for i, j in zip(first, second, strict=True)}
    return found


@st.composite
def crystals(draw):
    """Draw a random cell, not too flat, atoms in and out of it, and a cutoff that may span several images."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lengths = random.uniform(2.0, 7.0, size=3)
    cell = np.diag(lengths) + np.tril(random.uniform(-0.6, 0.6, size=(3, 3)), -1) * lengths[:, None]
    cell = cell @ np.linalg.qr(random.normal(size=(3, 3)))[0]
    n_atoms = draw(st.integers(2, 8))
    fractional = random.uniform(-1.5, 2.5, size=(draw(st.integers(1, 3)), n_atoms, 3))
    pbc = draw(st.tuples(st.booleans(), st.booleans(), st.booleans()).filter(any))
    atoms = Atoms(f"C{n_atoms}", positions=fractional[0] @ cell, cell=cell, pbc=pbc)
    return atoms, torch.tensor(fractional @ cell), random.uniform(0.8, 7.0)


def gas(n_atoms=60, side=9.0, seed=0):
    """Return the system and positions of atoms at random places in a periodic box."""
    random = np.random.default_rng(seed)
    atoms = Atoms(f"C{n_atoms}", positions=random.uniform(0, side, size=(n_atoms, 3)), cell=[side] * 3, pbc=True)
    return System.from_atoms(atoms, bonds=[]), torch.tensor(atoms.positions)[None]


def listed(edges, positions, cutoff):
    """Return the edges within the cutoff as (sender, receiver, *vector), without padding."""
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
    """Return the edges that ASE finds in periodic replicas, as :func:`listed`."""
    found = []
    for replica, frame in enumerate(positions.numpy()):
        there = Atoms(atoms.numbers, frame, cell=atoms.cell, pbc=atoms.pbc)
        for i, j, vector in zip(*neighbor_list("ijD", there, cutoff), strict=True):
            offset = replica * len(atoms)
            found.append((int(i) + offset, int(j) + offset, *(np.round(vector, 6) + 0.0).tolist()))
    return sorted(found)


def near_cutoff(atoms, positions, cutoff):
    """Return whether rounding decides if some edge is within the cutoff."""
    distances = [np.linalg.norm(edge[2:]) for edge in ase_edges(atoms, positions, cutoff + NUDGE)]
    return any(abs(distance - cutoff) < NUDGE for distance in distances)


def close(mine, theirs):
    """Return whether two lists of edges are the same up to rounding of their vectors."""
    return len(mine) == len(theirs) and np.allclose(
        sorted(mine, key=_rounded), sorted(theirs, key=_rounded), rtol=0, atol=3e-6
    )


def _rounded(edge):
    return tuple(round(value, 4) for value in edge)
