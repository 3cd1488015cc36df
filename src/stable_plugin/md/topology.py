"""Bonds of a structure, and the parts that they connect."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ase import Atoms
from ase.neighborlist import natural_cutoffs, neighbor_list

BOND_TOLERANCE = 1.2
"""Factor on covalent radii, which fit equilibrium bonds: a thermal frame stretches them."""


def covalent_bonds(atoms: Atoms) -> tuple[list[tuple[int, int]], bool]:
    """Return pairs within the sum of their covalent radii, and whether they connect an atom to its own image."""
    cutoffs = natural_cutoffs(atoms, mult=BOND_TOLERANCE)
    first, second, images = neighbor_list("ijS", atoms, cutoffs)
    pairs = sorted({(int(i), int(j)) for i, j in zip(first, second, strict=True) if i < j})
    return pairs, _is_extended(len(atoms), first, second, images)


def _is_extended(n_atoms: int, first: np.ndarray, second: np.ndarray, images: np.ndarray) -> bool:
    """Return whether a walk along bonds leads from an atom to another image of it."""
    links: list[list[tuple[int, np.ndarray]]] = [[] for _ in range(n_atoms)]
    for i, j, image in zip(first, second, images, strict=True):
        links[i].append((j, image))
    reached: dict[int, np.ndarray] = {}
    for start in range(n_atoms):
        if start in reached:
            continue
        reached[start], waiting = np.zeros(3, dtype=int), [start]
        while waiting:
            atom = waiting.pop()
            for other, image in links[atom]:
                cell_index = reached[atom] + image
                if other not in reached:
                    reached[other] = cell_index
                    waiting.append(other)
                elif (reached[other] != cell_index).any():
                    return True
    return False


def checked_bonds(bonds: Sequence[tuple[int, int]], n_atoms: int) -> list[tuple[int, int]]:
    """Return the bonds sorted and unique, if all of them join two different atoms."""
    pairs = sorted({(min(pair), max(pair)) for pair in bonds})
    for i, j in pairs:
        if not 0 <= i < j < n_atoms:
            raise ValueError(f"bonds contains ({i}, {j}): pass pairs of different atoms from 0 to {n_atoms - 1}.")
    return pairs
