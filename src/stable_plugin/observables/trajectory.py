"""Trajectories of ASE as tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from ase import Atoms
from torch import Tensor


def trajectory_from_atoms(frames: Sequence[Atoms]) -> tuple[Tensor, Tensor | None]:
    """Return the unwrapped positions and the velocities of one simulation, as input of :class:`TimeCorrelation`.

    Args:
        frames: Consecutive ASE structures, wrapped or not. Between two frames, no atom may move further than half the
            smallest height of the cell.

    Returns:
        Positions (n_frames, 1, n_atoms, 3) in Å, unwrapped across periodic boundaries; velocities of the same shape in Å
        per ASE time, None if the frames have no momenta.

    Raises:
        ValueError: If there is no frame, or the frames differ in their atoms.

    Example:
        >>> from ase import Atoms
        >>> from stable_plugin.observables import trajectory_from_atoms
        >>> frames = [Atoms("Ar", positions=[[x, 0.0, 0.0]], cell=[10.0] * 3, pbc=True) for x in (9.0, 0.5, 2.0)]
        >>> positions, velocities = trajectory_from_atoms(frames)
        >>> positions[:, 0, 0, 0].tolist(), velocities
        ([9.0, 10.5, 12.0], None)
    """
    if not frames:
        raise ValueError("frames=[] is empty: pass at least one structure.")
    first = frames[0]
    for index, frame in enumerate(frames):
        if (frame.numbers.shape != first.numbers.shape) or (frame.numbers != first.numbers).any():
            raise ValueError(
                f"frames[{index}] is {frame.get_chemical_formula()}, not {first.get_chemical_formula()}: pass frames of "
                "one simulation, with the same atoms in the same order."
            )
    positions = np.stack([frame.positions for frame in frames])
    if first.pbc.any():
        steps = np.diff(positions, axis=0)
        for index, step in enumerate(steps):
            cell = frames[index + 1].cell.complete().array
            steps[index] = step - (np.round(step @ np.linalg.inv(cell)) * first.pbc) @ cell
        positions = np.concatenate([positions[:1], positions[:1] + np.cumsum(steps, axis=0)])
    has_momenta = all(frame.has("momenta") for frame in frames)
    velocities = np.stack([frame.get_velocities() for frame in frames]) if has_momenta else None
    return torch.tensor(positions)[:, None], None if velocities is None else torch.tensor(velocities)[:, None]
