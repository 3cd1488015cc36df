"""Training data without labels of its own: energies and forces of the potential as it was."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ase import Atoms
from torch import nn

from stable_plugin.evaluation.label_errors import predictions
from stable_plugin.integrations.lightning.data import ExtxyzDataModule
from stable_plugin.md.frames import Frames, read_frames
from stable_plugin.md.labels import ENERGY_KEY, FORCES_KEY, read_labeled
from stable_plugin.models import load_potential

log = logging.getLogger(__name__)


class PseudoLabeledDataModule(ExtxyzDataModule):
    """Structures labeled with the energies and forces that a potential has on them, so that a repair changes little else.

    The structures need no labels: frames of the simulated system, other temperatures, other compositions. Labeled frames can be
    added. Mixing labels of the potential itself into fine-tuning is known as pseudolabel replay.

    Args:
        train: Training frames: files or structures, as :func:`~stable_plugin.md.frames.read_frames` takes them.
        model: The potential before training: a module, a file, or the name of a pretrained model.
        valid: Validation frames, labeled in the same way.
        labeled: Further training frames, with energies and forces of their own.
        batch_size: Frames per optimizer step.
        **arguments: Further arguments of the loader of ``model``, such as ``task_name`` for fairchem.

    Raises:
        ValueError: If there are fewer than two frames.
    """

    def __init__(
        self,
        train: Frames,
        model: str | Path | nn.Module,
        valid: Frames | None = None,
        labeled: Frames | None = None,
        batch_size: int = 10,
        **arguments: Any,
    ) -> None:
        module = model if isinstance(model, nn.Module) else load_potential(model, **arguments)
        frames = pseudo_labeled(read_frames(train, "train"), module)
        more = [] if labeled is None else read_labeled(labeled, "labeled")
        held_out = None if valid is None else pseudo_labeled(read_frames(valid, "valid"), module)
        super().__init__([*frames, *more], held_out, batch_size)


def pseudo_labeled(frames: Sequence[Atoms], module: nn.Module) -> list[Atoms]:
    """Return copies of frames with the energies and forces that a potential has on them.

    Args:
        frames: Frames of any compositions; labels that they have are not used.
        module: Module that holds the potential.
    """
    labeled = []
    for own, energies, forces in predictions(module, frames):
        for frame, energy, force in zip(own, energies.tolist(), forces.numpy(), strict=True):
            copy = frame.copy()  # without the calculator
            copy.info[ENERGY_KEY], copy.arrays[FORCES_KEY] = energy, force
            labeled.append(copy)
    log.info("%d frames are labeled by %s itself", len(labeled), type(module).__name__)
    return labeled
