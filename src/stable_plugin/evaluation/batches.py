"""Energies and forces of many frames of one system, in few calls of the potential."""

from __future__ import annotations

import torch
from torch import Tensor

from stable_plugin.md.cells import optional
from stable_plugin.models import Potential

MAX_ATOMS = 2000
"""Most atoms in one call of the potential."""


def energies_and_forces(
    potential: Potential, positions: Tensor, cell: Tensor | None = None, n_frames: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return energies and forces of frames in double precision on the CPU.

    Args:
        potential: The potential.
        positions: (n_frames, n_atoms, 3) in Å.
        cell: Cells of the frames, (n_frames, 3, 3) in Å; that of the system if None.
        n_frames: Frames in one call; as many as have :data:`MAX_ATOMS` atoms if None.

    Returns:
        Energies (n_frames,) in eV, and forces (n_frames, n_atoms, 3) in eV/Å.
    """
    n_frames = n_frames or max(1, MAX_ATOMS // positions.shape[1])
    energies = [torch.empty(0, dtype=torch.float64)]
    forces = [torch.empty(0, *positions.shape[1:], dtype=torch.float64)]
    with potential.frozen():
        for start in range(0, len(positions), n_frames):
            part = positions[start : start + n_frames].to(potential.device, potential.dtype)
            own = None if cell is None else cell[start : start + n_frames].to(part)
            energy, force = potential.energies_and_forces(part, potential.edges(part, *optional(own)))
            energies.append(energy.double().cpu())
            forces.append(force.double().cpu())
    return torch.cat(energies), torch.cat(forces)
