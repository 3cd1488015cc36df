"""Trajectories of other programs as tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from ase import Atoms
from torch import Tensor


def trajectory_from_atoms(frames: Sequence[Atoms]) -> tuple[Tensor, Tensor | None]:
    """Positions and velocities of one simulation, as the observables of trajectories take them.

    Args:
        frames: ASE structures, contiguous in time, in the cell or not; no atom goes further than half the cell's
            smallest height between two of them.

    Returns:
        Positions (n_frames, 1, n_atoms, 3) in Å, unwrapped across the boundary; velocities likewise in Å per ASE time,
        None if the frames have no momenta.

    Raises:
        ValueError: If there is no frame, or the frames differ in their atoms.
    """
    if not frames:
        raise ValueError("frames is empty: give at least one structure.")
    first = frames[0]
    for index, frame in enumerate(frames):
        if (frame.numbers.shape != first.numbers.shape) or (frame.numbers != first.numbers).any():
            raise ValueError(f"frames[{index}] is {frame.get_chemical_formula()}, not {first.get_chemical_formula()}.")
    positions = np.stack([frame.positions for frame in frames])
    if first.pbc.any():
        steps = np.diff(positions, axis=0)
        for index, step in enumerate(steps):
            cell = frames[index + 1].cell.complete().array
            steps[index] = step - (np.round(step @ np.linalg.inv(cell)) * first.pbc) @ cell
        positions = np.concatenate([positions[:1], positions[:1] + np.cumsum(steps, axis=0)])
    moving = all(frame.has("momenta") for frame in frames)
    velocities = np.stack([frame.get_velocities() for frame in frames]) if moving else None
    return torch.tensor(positions)[:, None], None if velocities is None else torch.tensor(velocities)[:, None]
