"""Checks of the geometry of a structure."""

from __future__ import annotations

import numpy as np
from ase import Atoms
from scipy.spatial import cKDTree

MIN_DISTANCE_A = 0.01
"""Atoms closer than this in Å are one atom listed twice: nuclei repel each other."""

WRAP_OFFSET = (0.1270, 0.2910, 0.4130)
"""Where positions are wrapped, in fractional coordinates: off the symmetric places, where atoms lie on the boundary."""

MIN_VOLUME_FRACTION = 1e-6
"""Smallest volume of a cell relative to a box with the same edges."""


def check_geometry(atoms: Atoms, name: str) -> None:
    """Raise an error if a structure is invalid. Left-handed cells are valid.

    Args:
        atoms: An ASE structure.
        name: Name of the structure in errors.

    Raises:
        ValueError: If positions or cell are not finite, the cell does not span the periodic directions, an atom has no
            element, or two atoms are at the same place.
    """
    if not np.isfinite(atoms.positions).all():
        raise ValueError(f"{name} has non-finite positions: remove that frame.")
    if not np.isfinite(atoms.cell.array).all():
        raise ValueError(f"{name} has the cell {atoms.cell.tolist()}, which is not finite: set atoms.cell.")
    if atoms.pbc.any():
        complete = atoms.cell.complete().array
        lengths = np.linalg.norm(complete, axis=1)
        flat = abs(np.linalg.det(complete)) <= MIN_VOLUME_FRACTION * np.prod(lengths)
        if (np.linalg.norm(atoms.cell.array[atoms.pbc], axis=1) == 0).any() or flat:
            raise ValueError(
                f"{name} is periodic (pbc={atoms.pbc.tolist()}) but its cell {atoms.cell.tolist()} does not span "
                "the periodic directions: set atoms.cell, or atoms.pbc = False for a molecule."
            )
    if (atoms.numbers < 1).any():
        raise ValueError(
            f"{name} has an atom of atomic number {atoms.numbers.min()}, which is not an element: set atoms.numbers."
        )
    pairs = _coincident(atoms)
    if len(pairs):
        i, j = min(pairs)
        raise ValueError(
            f"{name} has two atoms at the same place, {atoms.symbols[i]}{i} and {atoms.symbols[j]}{j} "
            f"(counted from zero, {len(pairs)} such pair(s)): remove one of them, or that frame."
        )


def _coincident(atoms: Atoms) -> set[tuple[int, int]]:
    """Return pairs of atoms closer than ``MIN_DISTANCE_A``, images included."""
    positions = atoms.positions
    if atoms.pbc.any():
        cell = atoms.cell.complete().array
        fractional = np.linalg.solve(cell.T, positions.T).T
        # Two images of one place must not be wrapped to opposite sides of the cell.
        images = np.where(atoms.pbc, np.floor(fractional + WRAP_OFFSET), 0.0)
        positions = positions - images @ cell
    pairs: set[tuple[int, int]] = cKDTree(positions).query_pairs(MIN_DISTANCE_A)
    return pairs
