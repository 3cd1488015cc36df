"""What the modules of all families of models share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from ase import Atoms
from pytorch_lightning import LightningModule


class FamilyModule(LightningModule):
    """A LightningModule around a model that is given, or built from the training frames.

    Attributes:
        model: The model; None until it is built.
        given_by: Name of the argument that gives one.
        scheduler: Takes the optimizer, gives a learning-rate scheduler, stepped once an epoch.
    """

    model: Any
    given_by: str
    scheduler: Callable[[torch.optim.Optimizer], Any] | None

    @property
    def options(self) -> Any:
        """The constructor's arguments."""
        return self.hparams

    @abstractmethod
    def build(self, frames: Sequence[Atoms]) -> None:
        """Build a new model, with scales from labelled frames."""

    @abstractmethod
    def make_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of the model's parameters."""

    def configure_callbacks(self) -> list[Any]:
        """Build the model: Lightning asks this first, and weight averaging copies the module before its ``setup``."""
        self.setup("fit")
        return []

    def setup(self, stage: str) -> None:
        """Build a new model from the training frames, unless there is one."""
        if self.model is not None:
            return
        frames = getattr(getattr(self.trainer, "datamodule", None), "train_frames", None)
        if frames is None:
            raise ValueError(
                f"{type(self).__name__} needs the training frames to build a new model: fit with a data module that has "
                f"train_frames, such as ExtxyzDataModule, or give {self.given_by}=."
            )
        self.build(frames)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer()
        if self.scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.scheduler(optimizer), "monitor": "valid/loss"},
        }
