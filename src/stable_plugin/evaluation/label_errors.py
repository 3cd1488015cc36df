"""Errors of predicted energies and forces on labeled frames, of any compositions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from stable_plugin.evaluation.batches import energies_and_forces
from stable_plugin.md.cells import stack_cells
from stable_plugin.md.compositions import group_by_system
from stable_plugin.md.labels import ENERGY_KEY, FORCES_KEY
from stable_plugin.md.system import System, stack_positions
from stable_plugin.models import Potential, find_potential
from stable_plugin.models.isolated_atoms import EnergyOffset, fit_offset

FRAMES_PER_CALL = 64
"""Frames in one call of the model."""

FORCES = "force_mae_mev_per_A"
ENERGIES = "energy_mae_mev_per_atom"
FITTED_ENERGIES = "energy_mae_fitted_zero_mev_per_atom"
FORCES_BY_HEAD = "force_mae_by_head_mev_per_A"
ENERGIES_BY_HEAD = "energy_mae_by_head_mev_per_atom"
FORCES_BY_ELEMENT = "force_mae_by_element_mev_per_A"


def predict(potential: Potential, frames: Sequence[Atoms]) -> tuple[Tensor, Tensor]:
    """Return total energies, (n_frames,) in eV, and forces, (n_frames, n_atoms, 3) in eV/Å, float64.

    Args:
        potential: Potential of the system that the frames are of.
        frames: Frames of one composition.
    """
    positions = stack_positions(frames, potential.system, "labeled")
    cell = stack_cells(frames, potential.system)
    energies, forces = energies_and_forces(potential, positions, cell, FRAMES_PER_CALL)
    return energies + potential.constant_energy, forces


def predict_stresses(potential: Potential, frames: Sequence[Atoms]) -> Tensor:
    """Return stresses as ASE defines them, positive under tension, (n_frames, 3, 3) in eV/Å³, float64.

    Args:
        potential: Potential of the system that the frames are of.
        frames: Frames of one composition, periodic in all directions.
    """
    positions = stack_positions(frames, potential.system, "labeled").to(potential.device, potential.dtype)
    cell = stack_cells(frames, potential.system)
    cell = None if cell is None else cell.to(positions)
    stresses = []
    with potential.frozen():
        for start in range(0, len(frames), FRAMES_PER_CALL):
            part = slice(start, start + FRAMES_PER_CALL)
            own = None if cell is None else cell[part]
            derivative = potential.strain_derivative(positions[part], own).double()
            stresses.append((derivative / potential.system.volume(own).to(derivative).reshape(-1, 1, 1)).cpu())
    return torch.cat(stresses)


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
    predicted_energies, predicted_forces = predict(potential, labeled)
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


def mean_absolute_errors(module: Any, labeled: Sequence[Atoms] | None) -> dict[str, Any]:
    """Return the mean absolute errors as a report names them.

    Forces count by component. The zero of energy is fitted for each element where the model's is evidently not that of the
    labels, as those of two codes: the errors of the energies as they are then tell nothing but that.

    Args:
        module: Module that holds the potential.
        labeled: Frames from :func:`stable_plugin.md.labels.read_labeled`, of any compositions, or None.

    Returns:
        ``force_mae_mev_per_A`` in meV/Å and ``energy_mae_mev_per_atom`` in meV per atom; None without labeled frames.
        ``energy_mae_fitted_zero_mev_per_atom`` where the zero has been fitted; ``force_mae_by_head_mev_per_A`` and
        ``energy_mae_by_head_mev_per_atom`` where the frames name several heads of a model; and
        ``force_mae_by_element_mev_per_A`` where they have several elements.
    """
    if labeled is None:
        return {FORCES: None, ENERGIES: None}
    frames, energies, force_errors = _predict_all(module, labeled)
    labels = [frame.info[ENERGY_KEY] for frame in frames]
    sizes = np.array([len(frame) for frame in frames], dtype=float)
    per_atom = (np.array(energies) - np.array(labels)) / sizes
    errors: dict[str, Any] = {
        FORCES: 1000.0 * _mean(force_errors),
        ENERGIES: 1000.0 * float(np.abs(per_atom).mean()),
    }
    offset = fit_offset(frames, energies, labels)
    if offset.is_of_another_code:
        errors[FITTED_ENERGIES] = 1000.0 * float(np.abs(per_atom + _shift_per_atom(frames, offset)).mean())
    heads = sorted({str(frame.info["head"]) for frame in frames if "head" in frame.info})
    if len(heads) > 1:
        own = {
            head: [number for number, frame in enumerate(frames) if str(frame.info.get("head")) == head]
            for head in heads
        }
        errors[FORCES_BY_HEAD] = {
            head: 1000.0 * _mean([force_errors[number] for number in each]) for head, each in own.items()
        }
        errors[ENERGIES_BY_HEAD] = {head: 1000.0 * float(np.abs(per_atom[each]).mean()) for head, each in own.items()}
    elements = sorted({symbol for frame in frames for symbol in frame.get_chemical_symbols()})
    if len(elements) > 1:
        errors[FORCES_BY_ELEMENT] = {
            element: 1000.0
            * _mean([e[frame.symbols == element] for e, frame in zip(force_errors, frames, strict=True)])
            for element in elements
        }
    return errors


def potentials(module: Any, frames: Sequence[Atoms]) -> Iterator[tuple[list[Atoms], Potential]]:
    """Yield the frames of each system, with the potential of that system.

    Args:
        module: Module that holds the potential.
        frames: Frames of any compositions.
    """
    for own in group_by_system(frames):
        yield own, find_potential(module, System.from_atoms(own[0], bonds=[]))


def predictions(module: Any, frames: Sequence[Atoms]) -> Iterator[tuple[list[Atoms], Tensor, Tensor]]:
    """Yield the frames of each system, with their energies and forces as :func:`predict` returns them.

    Args:
        module: Module that holds the potential.
        frames: Frames of any compositions.
    """
    for own, potential in potentials(module, frames):
        yield own, *predict(potential, own)


def _predict_all(module: Any, labeled: Sequence[Atoms]) -> tuple[list[Atoms], list[float], list[Tensor]]:
    """Return the frames by system, with their predicted energies and the errors of their forces."""
    frames: list[Atoms] = []
    energies: list[float] = []
    force_errors: list[Tensor] = []
    for own, predicted, forces in predictions(module, labeled):
        frames += own
        energies += predicted.tolist()
        force_errors += list(forces - torch.tensor(np.stack([frame.arrays[FORCES_KEY] for frame in own])))
    return frames, energies, force_errors


def _mean(errors: Sequence[Tensor]) -> float:
    return float(torch.cat([each.abs().reshape(-1) for each in errors]).mean())


def _shift_per_atom(frames: Sequence[Atoms], offset: EnergyOffset) -> np.ndarray:
    return np.array([np.mean([offset.shifts[int(number)] for number in frame.numbers]) for frame in frames])
