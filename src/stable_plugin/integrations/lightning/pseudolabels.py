"""Training data without labels of its own: energies and forces of the potential as it was."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import repeat
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from ase import Atoms
from torch import nn

from stable_plugin.evaluation.label_errors import potentials, predict, predict_stresses, predictions
from stable_plugin.integrations.lightning.data import ExtxyzDataModule
from stable_plugin.md.frames import Frames, read_frames
from stable_plugin.md.labels import ENERGY_KEY, FORCES_KEY, STRESS_KEY, read_labeled
from stable_plugin.models import load_potential
from stable_plugin.models.isolated_atoms import evenly_chosen, fit_offset
from stable_plugin.runtime import checks

log = logging.getLogger(__name__)


class PseudoLabeledDataModule(ExtxyzDataModule):
    """Structures labeled with the energies and forces that a potential has on them, so that a repair changes little else.

    The structures need no labels: frames of the simulated system, other temperatures, other compositions. Labeled frames can be
    added. Mixing labels of the potential itself into fine-tuning is known as pseudolabel replay. Where the labels count energies
    from another zero than the potential, as those of another code do, the energies of the potential are moved to it.

    Args:
        train: Training frames: files or structures, as :func:`~stable_plugin.md.frames.read_frames` takes them.
        model: The potential before training: a module, a file, or the name of a pretrained model.
        valid: Validation frames, labeled in the same way.
        labeled: Further training frames, with energies and forces of their own.
        labeled_valid: Further validation frames, with energies and forces of their own.
        share: Fraction of the training frames that the potential itself has labeled, between 0 and 1: frames of the kind that is
            rarer are repeated. Each frame counts once if None.
        batch_size: Frames per optimizer step.
        stresses: Whether to label frames with stresses as well, where they are periodic in all directions. Set a ``stress_weight`` of
            the module, or they are not used.
        **arguments: Further arguments of the loader of ``model``, such as ``task_name`` for fairchem.

    Raises:
        ValueError: If there are fewer than two frames, or ``share`` is out of range or without ``labeled``.

    Example:
        Half of the frames in training are labeled ones of aspirin, half keep the potential as it is on other molecules:
        ``PseudoLabeledDataModule("others.xyz", "mace.model", labeled="aspirin.xyz", share=0.5)``.
    """

    def __init__(
        self,
        train: Frames,
        model: str | Path | nn.Module,
        valid: Frames | None = None,
        labeled: Frames | None = None,
        labeled_valid: Frames | None = None,
        share: float | None = None,
        batch_size: int = 10,
        stresses: bool = False,
        **arguments: Any,
    ) -> None:
        if share is not None and labeled is None:
            raise ValueError(f"share={share} needs labeled frames for the rest: pass labeled=, or leave share= out.")
        if share is not None and checks.number("share", share, above=0) >= 1:
            raise ValueError(f"share={share} is out of range: pass a number between 0 and 1.")
        module = model if isinstance(model, nn.Module) else load_potential(model, **arguments)
        own = [] if labeled is None else read_labeled(labeled, "labeled")
        own_valid = [] if labeled_valid is None else read_labeled(labeled_valid, "labeled_valid")
        shifts = _shifts(own, module) if own else {}
        frames = pseudo_labeled(read_frames(train, "train"), module, shifts, stresses=stresses)
        if share is not None:
            frames, own = in_ratio(frames, own, share)
        held_out = (
            [] if valid is None else pseudo_labeled(read_frames(valid, "valid"), module, shifts, stresses=stresses)
        )
        super().__init__([*frames, *own], [*held_out, *own_valid] or None, batch_size)


def pseudo_labeled(
    frames: Sequence[Atoms],
    module: nn.Module,
    shifts: Mapping[int, float] = MappingProxyType({}),
    *,
    stresses: bool = False,
) -> list[Atoms]:
    """Return copies of frames with the energies and forces that a potential has on them.

    Args:
        frames: Frames of any compositions; labels that they have are not used.
        module: Module that holds the potential.
        shifts: What to add to the energy of each atom, in eV by atomic number.
        stresses: Whether to add stresses, where frames are periodic in all directions.
    """
    labeled = []
    for own, potential in potentials(module, frames):
        energies, forces = predict(potential, own)
        with_stress = stresses and all(own[0].pbc)
        own_stresses = predict_stresses(potential, own).numpy() if with_stress else repeat(None)
        for frame, energy, force, stress in zip(own, energies.tolist(), forces.numpy(), own_stresses, strict=False):
            copy = frame.copy()  # without the calculator
            copy.info = {key: value for key, value in copy.info.items() if "stress" not in key.lower()}
            copy.info[ENERGY_KEY] = energy + sum(shifts.get(int(number), 0.0) for number in frame.numbers)
            copy.arrays[FORCES_KEY] = force
            if stress is not None:
                copy.info[STRESS_KEY] = stress
            labeled.append(copy)
    log.info("%d frames are labeled by %s itself", len(labeled), type(module).__name__)
    return labeled


def in_ratio(first: Sequence[Atoms], second: Sequence[Atoms], share: float) -> tuple[list[Atoms], list[Atoms]]:
    """Return two kinds of frames, of which one is repeated so that the first one has this share.

    Args:
        first: Frames of the first kind.
        second: Frames of the second kind.
        share: Share of the first kind, between 0 and 1.
    """
    total = max(len(first) / share, len(second) / (1.0 - share))
    return _repeated(first, share * total), _repeated(second, (1.0 - share) * total)


def _repeated(frames: Sequence[Atoms], number: float) -> list[Atoms]:
    return [frames[index % len(frames)] for index in range(max(round(number), len(frames)))]


def _shifts(labeled: Sequence[Atoms], module: nn.Module) -> dict[int, float]:
    """Return what moves the energies of a potential to the zero of labels, in eV by atomic number; nothing if it is the same."""
    chosen = evenly_chosen(labeled)
    parts = [(own, energies) for own, energies, _ in predictions(module, chosen)]
    frames = [frame for own, _ in parts for frame in own]
    offset = fit_offset(
        frames, torch.cat([energies for _, energies in parts]).tolist(), [frame.info[ENERGY_KEY] for frame in frames]
    )
    return offset.shifts if offset.is_of_another_code else {}
