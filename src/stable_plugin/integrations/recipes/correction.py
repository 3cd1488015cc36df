"""Correction of a potential in a recipe: pair potentials that reproduce observables, and a copy that learns the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from ase import Atoms
from pytorch_lightning import LightningModule, Trainer

from stable_plugin.algorithm.normalized_descent import NormalizedDescent
from stable_plugin.integrations.lightning.callback import StABlECallback
from stable_plugin.integrations.lightning.data import ExtxyzDataModule
from stable_plugin.md.system import System
from stable_plugin.models import NoInteraction
from stable_plugin.models.fine_tuning import FineTuningModule
from stable_plugin.models.pair_correction import PairCorrected

LEARNING_RATE = 1e-3
"""Root mean square of the change of forces in a step in eV/Å, unless the callback has a learning rate."""


@dataclass(frozen=True)
class PairCorrection:
    """How a recipe corrects a potential: pair potentials are trained on the observables, then a copy learns the result.

    The pair potentials are those of :class:`~stable_plugin.models.PairCorrected`, trained beside the user's energies and forces. The
    copy starts from the potential without them and learns energies, forces and stresses of the corrected one; it is what the
    recipe returns, in the format of its family.

    Args:
        pairs: Smallest distance in Å of each pair of elements, such as ``{"O-O": 2.0, "O-H": 1.3}``.
        cutoff: Largest distance in Å, at most the cutoff of the model.
        copy: Returns the module to train as the copy, from ``model=``, the model without pair potentials.
        copy_data: Returns the frames to train it on, from ``model=``, the corrected potential; a partial
            :class:`~stable_plugin.PseudoLabeledDataModule`.
        copy_trainer: Returns the Trainer of the copy, from further keyword arguments.
        repair: Repairs the model before, as frames of replicas that fail do not count for observables, and the copy after, each
            with its own data and Trainer, whose ``max_epochs`` does not apply. None if neither fails.
        spacing: Distance of the splines in Å.

    Raises:
        ValueError: If a pair or a distance is not valid.
    """

    pairs: Mapping[str, float]
    cutoff: float
    copy: Callable[..., LightningModule]
    copy_data: Callable[..., ExtxyzDataModule]
    copy_trainer: Callable[..., Trainer]
    repair: StABlECallback | None = None
    spacing: float = 0.25

    def __post_init__(self) -> None:
        self._corrected(NoInteraction())

    def _corrected(self, model: Any) -> PairCorrected:
        return PairCorrected(model, self.pairs, self.cutoff, self.spacing)

    def module(self, model: Any, frames: Sequence[Atoms]) -> FineTuningModule:
        """Return the module that trains the pair potentials, in the direction that changes forces least.

        Args:
            model: The model to correct, which is copied.
            frames: Structures at which forces should change little.
        """
        corrected = self._corrected(deepcopy(model))
        return FineTuningModule(
            corrected,
            trainable="correction.*",
            E0s="model",
            optimizer=partial(NormalizedDescent, lr=LEARNING_RATE, metric=corrected.force_metric(frames)),
        )

    def validate(self, model: Any, frame: Atoms, device: torch.device) -> None:
        """Raise an error unless the model can be corrected and repaired.

        Args:
            model: The model.
            frame: A structure that it is applied to.
            device: Device that it will be on.

        Raises:
            ValueError: If the model builds its own graph, or has a shorter cutoff, or settings of the repair do not fit.
        """
        if self.repair is not None:
            self.repair.validate(device)
        self._corrected(model).stable_potential(System.from_atoms(frame, bonds=[]))
