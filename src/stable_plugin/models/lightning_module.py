"""What the modules of all families of models share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from ase import Atoms
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from stable_plugin.models.base import save_new
from stable_plugin.runtime.serialization import load_tensors


class FamilyModule(LightningModule):
    """A LightningModule around a model that is given, or built from the training frames.

    Attributes:
        model: The model; None until it is built.
        given_by: Name of the argument that gives one.
        optimizer: Takes parameters, gives an optimizer; None for the family's own.
        scheduler: Takes the optimizer, gives a learning-rate scheduler, stepped once an epoch.
    """

    model: Any
    given_by: str
    optimizer: Callable[[Any], torch.optim.Optimizer] | None
    scheduler: Callable[[torch.optim.Optimizer], Any] | None

    @property
    def options(self) -> Any:
        """The constructor's arguments."""
        return self.hparams

    @abstractmethod
    def build(self, frames: Sequence[Atoms]) -> None:
        """Build a new model, with scales from labeled frames."""

    @abstractmethod
    def dataloader(self, frames: Sequence[Atoms], batch_size: int, shuffle: bool) -> Any:
        """Batches of the family's graphs, of labeled structures."""

    @abstractmethod
    def training_loss(self, batch: Any) -> Tensor:
        """What is trained on, for one of these batches."""

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
        self.prepare(frames)

    def prepare(self, frames: Sequence[Atoms]) -> None:
        """Build a new model, unless there is one, and see whether it works.

        Args:
            frames: Labelled structures.

        Raises:
            ValueError: If there is no such model, or it fails on the first frame.
        """
        if self.model is not None:
            return
        try:
            self.build(frames)
            # A loader draws random numbers even where it does not shuffle.
            with torch.enable_grad(), torch.random.fork_rng(devices=[]):
                self.training_loss(next(iter(self.dataloader(frames[:1], 1, shuffle=False)))).backward()
        except Exception as error:  # whatever the arguments of a foreign model lead to, somewhere inside it
            self.model = None
            raise ValueError(
                f"{type(self).__name__} cannot make a model that works on the first training frame "
                f"({type(error).__name__}: {error}). Its arguments: "
                f"{', '.join(f'{name}={value!r}' for name, value in self.options.items())}."
            ) from error
        self.zero_grad()

    def save_weights(self, path: str | Path) -> None:
        """Write what :meth:`load_weights` takes up: tensors and plain values, which can be read without trust.

        Raises:
            FileExistsError: If there is a file already.
        """
        checkpoint: dict[str, Any] = {"state_dict": {name: each.cpu() for name, each in self.state_dict().items()}}
        self.on_save_checkpoint(checkpoint)
        save_new(checkpoint, path)

    def load_weights(self, path: str | Path) -> None:
        """Go back to what :meth:`save_weights` wrote.

        Raises:
            ValueError: If the file is damaged, holds more than tensors and plain values, or those of another model.
        """
        checkpoint = load_tensors(path, "weights")
        try:
            self.on_load_checkpoint(checkpoint)
            self.load_state_dict(checkpoint["state_dict"])
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"weights {str(path)!r} are of another model ({type(error).__name__}: {error})."
            ) from error

    def check_optimizer(self) -> None:
        """Take two steps with the optimizer and scheduler that were given, on a parameter of no importance.

        Raises:
            ValueError: If one of them does not work.
        """
        weight = nn.Parameter(torch.zeros(2))
        name, value = "optimizer", self.optimizer
        try:
            optimizer = torch.optim.SGD([weight], lr=1.0) if self.optimizer is None else self.optimizer([weight])
            name, value = "scheduler", self.scheduler
            scheduler = None if self.scheduler is None else self.scheduler(optimizer)
            for _ in range(2):
                weight.grad = torch.zeros_like(weight)
                optimizer.step(lambda: 0.0)
                if scheduler is not None:
                    plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                    scheduler.step(*[0.0] * plateau)
        except Exception as error:  # of torch or of the user's own class
            raise ValueError(
                f"{name}={value} does not work ({type(error).__name__}: {error}): give one that takes "
                f"{'parameters' if name == 'optimizer' else 'an optimizer'} and can be stepped."
            ) from error

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer()
        if self.scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.scheduler(optimizer), "monitor": "valid/loss"},
        }
