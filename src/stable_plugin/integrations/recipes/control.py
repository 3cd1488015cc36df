"""The control of a StABlE run: as many optimizer steps at the same learning rates, without observables."""

from __future__ import annotations

from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from stable_plugin.algorithm.gradients import TemporaryLearningRate


class ReplayLearningRates(Callback):
    """Take one optimizer step at each of the given learning rates, then end training.

    Args:
        rates: Learning rates, one per step.
    """

    def __init__(self, rates: list[float]) -> None:
        self.rates = rates
        self.n_steps = 0
        self._rate = TemporaryLearningRate()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._rate.set(optimizer, self.rates[self.n_steps], 1.0)
        self.n_steps += 1
        trainer.should_stop = self.n_steps == len(self.rates)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        for optimizer in trainer.optimizers:
            self._rate.restore(optimizer)

    def state_dict(self) -> dict[str, Any]:
        return {"n_steps": self.n_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.n_steps = state_dict["n_steps"]
