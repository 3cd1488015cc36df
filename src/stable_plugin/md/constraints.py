"""Constraints of structures: atoms that are held in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.constraints import FixAtoms, FixCartesian
from numpy.typing import NDArray
from torch import Tensor


def fixed_atoms(atoms: Atoms, name: str) -> NDArray[np.bool_]:
    """Return which atoms are held in place, (n_atoms,).

    Args:
        atoms: An ASE structure.
        name: Name of the structure in errors.

    Raises:
        ValueError: If it has a constraint that does not hold whole atoms in place.
    """
    for constraint in atoms.constraints:
        if not _holds_atoms(constraint):
            raise ValueError(
                f"{name} has the constraint {type(constraint).__name__}, which the simulation does not support: use FixAtoms, or "
                "remove it with atoms.set_constraint()."
            )
    fixed = np.zeros(len(atoms), dtype=bool)
    fixed[list(resting_atoms(atoms))] = True
    return fixed


def resting_atoms(atoms: Atoms) -> tuple[int, ...]:
    """Return the indices of the atoms that are held in place, whatever other constraints there are.

    Args:
        atoms: An ASE structure.
    """
    held = [np.arange(len(atoms))[constraint.index] for constraint in atoms.constraints if _holds_atoms(constraint)]
    return tuple(np.unique(np.concatenate(held)).tolist()) if held else ()


def _holds_atoms(constraint: Any) -> bool:
    """Return whether a constraint holds whole atoms in place."""
    return isinstance(constraint, FixAtoms) or (isinstance(constraint, FixCartesian) and bool(np.all(constraint.mask)))


def common_fixed_atoms(frames: Sequence[Atoms], name: str) -> Tensor | None:
    """Return which atoms are held in place in all frames, (n_atoms,), or None if none are.

    Args:
        frames: ASE structures of one system.
        name: Name of the frames in errors.

    Raises:
        ValueError: If the frames hold different atoms, all atoms, or have another constraint.
    """
    fixed = np.stack([fixed_atoms(frame, f"{name}[{index}]") for index, frame in enumerate(frames)])
    different = np.flatnonzero((fixed != fixed[0]).any(axis=1))
    if len(different) > 0:
        index = int(different[0])
        raise ValueError(
            f"{name}[{index}] holds {int(fixed[index].sum())} atoms in place (FixAtoms) and {name}[0] {int(fixed[0].sum())}, or "
            "others: set the same constraint in all frames."
        )
    if fixed[0].all():
        raise ValueError(
            f"{name} hold all atoms in place (FixAtoms): nothing is left to simulate. Remove the constraint."
        )
    return torch.tensor(fixed[0]) if fixed[0].any() else None
