"""The number of threads of training steps on a CPU, chosen by measurement while training runs."""

from __future__ import annotations

import time
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from stable_plugin.runtime.threads import ThreadGovernor


class TrainingThreads(Callback):
    """Runs training steps on the number of threads that is fastest beside the other processes of the machine.

    The choice is made at the first batch of an epoch, and saved in checkpoints: results on different numbers of threads
    agree to rounding only. A module of this package adds the callback itself. Set the environment variable
    ``OMP_NUM_THREADS=1`` to keep all steps on one thread.

    Attributes:
        governor: Decides from the durations of forward and backward passes.
    """

    def __init__(self) -> None:
        self.governor = ThreadGovernor()
        self._own_threads: int | None = None
        self._began = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember torch's own number of threads."""
        if pl_module.device.type == "cpu":
            self._own_threads = torch.get_num_threads()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Choose the number of threads at the first batch of an epoch."""
        if self._own_threads is None:
            return
        if batch_idx == 0:
            module: Any = pl_module

            def forward_and_backward() -> None:
                module.training_loss(batch).backward()
                # Lightning clears gradients before its own backward pass, so none are lost.
                module.zero_grad(set_to_none=True)

            kind = ("training step", type(pl_module).__name__)
            torch.set_num_threads(self.governor.review(kind, forward_and_backward))
        self._began = time.perf_counter()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the duration of forward and backward pass, without simulations that other callbacks run later."""
        self.governor.record(time.perf_counter() - self._began)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore torch's own number of threads."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore torch's own number of threads."""
        self._restore()

    def state_dict(self) -> dict[str, Any]:
        """Return the number of threads in use."""
        return self.governor.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.governor.load_state_dict(state_dict)

    def _restore(self) -> None:
        if self._own_threads is not None:
            torch.set_num_threads(self._own_threads)
            self._own_threads = None
