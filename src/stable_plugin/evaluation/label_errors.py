"""Errors of predicted energies and forces on labeled frames."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from stable_plugin.md.labels import ENERGY_KEY, FORCES_KEY
from stable_plugin.md.system import optional, stack_cells, stack_positions
from stable_plugin.models import Potential

FRAMES_PER_CALL = 64
"""Frames in one call of the model."""


def label_errors(potential: Potential, labeled: Sequence[Atoms]) -> tuple[Tensor, Tensor]:
    """Return predicted minus labeled energies and forces.

    Args:
        potential: Potential of the system that the frames are of.
        labeled: Frames from :func:`stable_plugin.md.labels.read_labeled`.

    Returns:
        Energy errors per atom, (n_frames,) in eV, and force errors, (n_frames, n_atoms, 3) in eV/Å.
    """
    energies = torch.tensor([frame.info[ENERGY_KEY] for frame in labeled], dtype=torch.float64)
    forces = torch.tensor(np.stack([frame.arrays[FORCES_KEY] for frame in labeled]))
    positions = stack_positions(labeled, potential.system, "labeled").to(potential.device, potential.dtype)
    cell = stack_cells(labeled, potential.system)
    cell = None if cell is None else cell.to(positions)
    with potential.frozen():
        predicted = [
            potential.energies_and_forces(
                positions[part], potential.edges(positions[part], *optional(None if cell is None else cell[part]))
            )
            for part in torch.arange(len(positions)).split(FRAMES_PER_CALL)
        ]
    predicted_energies = torch.cat([pair[0].double().cpu() for pair in predicted]) + potential.constant_energy
    predicted_forces = torch.cat([pair[1].double().cpu() for pair in predicted])
    return (predicted_energies - energies) / potential.system.n_atoms, predicted_forces - forces


def mean_energy_error(potential: Potential, labeled: Sequence[Atoms]) -> float:
    """Return the signed mean of the energy errors.

    Args:
        potential: Potential of the system that the frames are of.
        labeled: Frames from :func:`stable_plugin.md.labels.read_labeled`.

    Returns:
        Mean over the frames of predicted minus labeled energy, in eV per atom.
    """
    return float(label_errors(potential, labeled)[0].mean())


def mean_absolute_errors(potential: Potential, labeled: Sequence[Atoms] | None) -> dict[str, float | None]:
    """Return the mean absolute errors as a report names them.

    Args:
        potential: Potential of the system that the frames are of.
        labeled: Frames from :func:`stable_plugin.md.labels.read_labeled`, or None.

    Returns:
        ``force_mae_mev_per_A`` in meV/Å and ``energy_mae_mev_per_atom`` in meV per atom; None without labeled frames.
    """
    if labeled is None:
        return {"force_mae_mev_per_A": None, "energy_mae_mev_per_atom": None}
    energy_errors, force_errors = label_errors(potential, labeled)
    return {
        "force_mae_mev_per_A": 1000.0 * force_errors.abs().mean().item(),
        "energy_mae_mev_per_atom": 1000.0 * energy_errors.abs().mean().item(),
    }
