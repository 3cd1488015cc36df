"""Cells of frames, where they differ from that of the system."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from stable_plugin.md.system import System

CELL_TOLERANCE = 1e-4
"""Difference in Å between cells that are the same but for the rounding of a file."""


def stack_cells(frames: Sequence[Atoms], system: System) -> Tensor | None:
    """Return the cells of frames, (n_frames, 3, 3) in Å, float64, or None if all are that of the system.

    Args:
        frames: ASE structures.
        system: System that the frames are of.
    """
    if not system.periodic:
        return None
    cells = np.stack([frame.cell.complete().array for frame in frames])
    if np.allclose(cells, system.cell.cpu().numpy(), atol=CELL_TOLERANCE):
        return None
    return torch.tensor(cells, dtype=torch.float64)


def optional(cell: Tensor | None) -> tuple[Tensor, ...]:
    """Return a cell as a further positional argument, or no argument for None.

    Detectors and observables that measure positions alone then serve systems with one cell.

    Args:
        cell: Cells of frames, (..., 3, 3) in Å, or None.
    """
    return () if cell is None else (cell,)


def each_cell(cell: Tensor | None, n_frames: int) -> Sequence[Tensor | None]:
    """Return the cell of every frame, (3, 3) in Å each, or None for each where all are that of the system.

    Args:
        cell: Cells of the frames, (n_frames, 3, 3) in Å, or None.
        n_frames: Number of frames.
    """
    return [None] * n_frames if cell is None else list(cell)
