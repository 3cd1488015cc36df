"""StABlE training as a callback of any Lightning Trainer."""

from __future__ import annotations

import logging
from math import ceil, inf
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException
from torch import Tensor, optim

from stable_plugin.algorithm.records import WindowRecord
from stable_plugin.algorithm.systems_loop import AnyLoop
from stable_plugin.config import StABlEArguments, takes
from stable_plugin.integrations.build import validate
from stable_plugin.integrations.lightning import outcome
from stable_plugin.integrations.lightning.checkpoint_io import explain_write_error, use_atomic_checkpoints
from stable_plugin.integrations.lightning.compatibility import (
    refuse_manual_optimization,
    refuse_sharded_weights,
    weight_averages,
)
from stable_plugin.integrations.lightning.preemption import EpochPosition, RequeueSignal
from stable_plugin.integrations.progress import ProgressLine
from stable_plugin.integrations.session import NonFiniteGradientError, Session
from stable_plugin.models import WeightAverage
from stable_plugin.runtime.console import show_log

log = logging.getLogger(__name__)

ON_PROGRESS_BAR = ("stable/unstable_fraction", "stable/observable_loss", "stable/ess_fraction", "stable/simulated_ps")


class StABlECallback(Callback):
    """Repairs a potential that fails in molecular dynamics while it is being trained.

    From ``start_epoch`` on, the potential simulates replicas of the training structures. When too many fail, the
    gradient of a reference observable joins that of the user's own loss in each optimizer step. Training ends when fewer
    than ``schedule.max_failures_per_ns`` fail, at 95 % confidence. The repaired weights are then in ``repaired.ckpt``, in
    the folder of the first checkpoint callback or in ``default_root_dir``, and ``best`` and ``last`` of the checkpoint
    callbacks mean them too. Averages of weights that NequIP and SchNetPack keep are set to the weights after each step.

    Optimizer, clipping, precision, accumulation, loggers and checkpoints stay the Trainer's. Works with Trainers of
    ``pytorch_lightning`` and of ``lightning``, and with a module that holds a model of a known family, or has a method
    ``stable_potential(system)``; ``potential=`` is for all others.

    Source: Raja, Amin, Pedregosa and Krishnapriyan, TMLR 2025, arXiv:2402.13984.

    Args:
        arguments: The fields of :class:`~stable_plugin.StABlEConfig` as keyword arguments, or ``config=``, an instance of
            it.

    Attributes:
        config: The settings.
        repaired_path: Path of the checkpoint of the repaired weights; None before training is done.

    Example:
        >>> from pytorch_lightning import Trainer
        >>> from stable_plugin import StABlECallback
        >>> trainer = Trainer(callbacks=[StABlECallback(n_replicas=16)], logger=False)
    """

    @takes(StABlEArguments)
    def __init__(self, arguments: StABlEArguments) -> None:
        super().__init__()
        self.config = arguments.to_config()
        self.session = Session(self.config)
        self.repaired_path: str | None = None
        self._position = EpochPosition(self.session.resume)
        self._requeue_signal: RequeueSignal | None = None
        self._baseline = outcome.Baseline()
        self._own_loss: Tensor | None = None
        self._averages: list[WeightAverage] = []

    def __repr__(self) -> str:
        return repr(self.config).replace(type(self.config).__name__, type(self).__name__, 1)

    def validate(self, device: torch.device | str = "cpu") -> None:
        """Check that settings and structures fit together, before a long training that comes first.

        Args:
            device: Device that the model will be on.

        Raises:
            ValueError: If they do not.
        """
        validate(self.config, device)

    @property
    def loop(self) -> AnyLoop:
        """The training loop, once training has started."""
        return self.session.loop

    @property
    def windows(self) -> list[WindowRecord]:
        """The windows simulated so far."""
        return self.loop.windows if self.session.has_begun else []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, before anything long starts, and install atomic checkpoints."""
        if sum(isinstance(callback, StABlECallback) for callback in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise MisconfigurationException(
                "the Trainer has more than one StABlECallback, and each would change the same weights: keep one, with all "
                "observables in it."
            )
        if stage == "fit":
            self.check_module(pl_module)
            self._averages = weight_averages(trainer, pl_module)
            refuse_sharded_weights(trainer)
            show_log()
        use_atomic_checkpoints(trainer)

    def check_module(self, module: LightningModule) -> None:
        """Check that the callback can join the module's optimizer steps.

        Args:
            module: The module.

        Raises:
            MisconfigurationException: If the module takes its optimizer steps itself.
        """
        refuse_manual_optimization(module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the random streams that the order of the first epoch's batches is drawn from."""
        self._position.on_fit_start(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find potential, structures and reference, and build the training loop."""
        if trainer.is_global_zero:
            self._warn_late_start(trainer)
        self._requeue_signal = RequeueSignal(trainer)
        bar = trainer.progress_bar_callback
        line = ProgressLine(
            self.config.window_ps,
            enabled=bar is not None and trainer.is_global_zero,
            # Lightning's RichProgressBar has this attribute, its other bars have none.
            rich_progress=lambda: getattr(bar, "progress", None),
        )
        self.session.begin(
            pl_module, trainer.train_dataloader, trainer.default_root_dir, line, lambda: self._stop_if_signaled(trainer)
        )
        self._position.on_train_start(trainer)
        self._own_loss = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Simulate until it is time to learn, or training is done."""
        self._position.on_train_epoch_start(trainer)
        if trainer.current_epoch >= self.config.start_epoch:
            self._adopt_averages(trainer)
            self.session.simulate()
            self.log_windows(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Stop before the batch if the job is to be requeued."""
        if self._requeue_signal is not None:
            self._requeue_signal.raise_if_received()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Note the module's own loss, which Lightning divides by the batches that it accumulates, for the margin's weight."""
        if trainer.current_epoch >= self.config.start_epoch:
            self._own_loss = loss.detach() if self._own_loss is None else self._own_loss + loss.detach()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: optim.Optimizer
    ) -> None:
        """Add the observable's gradient to that of the module's own loss."""
        if trainer.current_epoch < self.config.start_epoch:
            return
        self._baseline.record(trainer)
        self.session.users_loss = self._take_own_loss(trainer)
        numbers = self.session.before_step(optimizer)
        self.log_windows(trainer)
        for name, value in (numbers or {}).items():
            pl_module.log(name, value, prog_bar=name in ON_PROGRESS_BAR)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Restore the optimizers' learning rates, and mark a point to resume from."""
        self.session.after_step(trainer.optimizers)
        if trainer.current_epoch >= self.config.start_epoch:
            for average in self._averages:
                average.follow()
        self._position.on_train_batch_end(trainer, batch_idx)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record a validation in the middle of an epoch."""
        self._position.on_validation_start(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the random streams after a validation in the middle of an epoch."""
        self._position.on_validation_end(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record that the next batches are those of another epoch."""
        self._position.on_train_epoch_end()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the checkpoint of the repaired weights, and log what the user should know about the result."""
        if self.session.done:
            self.repaired_path = outcome.save_repaired(trainer, pl_module)
        if not (trainer.is_global_zero and self.windows):
            return
        self._baseline.warn_worse(trainer)
        self.session.warn_energy_drift()
        self.session.log_verification()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write a checkpoint when the run is interrupted, to resume from with ``trainer.fit(ckpt_path=...)``."""
        explain_write_error(trainer, exception)
        if not self.session.has_begun:
            return
        # All processes see a gradient that is not finite; a process that is interrupted alone would wait for the others'
        # parts of the checkpoint.
        interrupted = isinstance(exception, KeyboardInterrupt | SystemExit) and trainer.world_size == 1
        if not interrupted and not isinstance(exception, NonFiniteGradientError):
            return
        self.session.after_step(trainer.optimizers)
        self._position.rewind(trainer)
        if self._requeue_signal is not None and self._requeue_signal.requeue():
            return
        path = Path(trainer.default_root_dir) / f"interrupted-step={trainer.global_step}.ckpt"
        trainer.save_checkpoint(path)
        log.warning("StABlE training was interrupted: resume with ckpt_path=%r.", str(path))

    def log_windows(self, trainer: Trainer) -> None:
        """Log the new windows, and end training when the session is done.

        Args:
            trainer: The Trainer.
        """
        # Windows of probes fall between optimizer steps, where module.log() is not allowed.
        for numbers in self.session.new_windows():
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step=trainer.global_step)
        if self.session.done:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """Return phase, replicas, random streams, windows, and the validation errors before the first step."""
        state = self.session.state_dict()
        return {**state, "baseline": self._baseline.state_dict()} if state else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned; the loop's part once the loop is built."""
        self.session.load_state_dict(state_dict)
        if state_dict:
            self._baseline.load_state_dict(state_dict["baseline"])

    def _adopt_averages(self, trainer: Trainer) -> None:
        """Go on from the averages of weights, which are what the trainer hands back; they follow the weights from here on."""
        if self._averages and trainer.current_epoch == self.config.start_epoch:
            log.info(
                "%s keeps averages of the weights: StABlE training goes on from the averages, which are then set to the "
                "weights after each step, so that what is handed back has been simulated with.",
                ", ".join(average.name for average in self._averages),
            )
        for average in self._averages:
            average.adopt()

    def _take_own_loss(self, trainer: Trainer) -> float | None:
        loss, self._own_loss = self._own_loss, None
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        return None if loss is None else float(loss) / (1.0 if scaler is None else scaler.get_scale())

    def _warn_late_start(self, trainer: Trainer) -> None:
        steps = trainer.num_training_batches / trainer.accumulate_grad_batches
        max_epochs = trainer.max_epochs
        self.session.warn_late_start(
            None if max_epochs is None or max_epochs < 0 else max_epochs,
            None if trainer.max_steps < 0 else trainer.max_steps,
            ceil(steps) if steps < inf else inf,
        )

    def _stop_if_signaled(self, trainer: Trainer) -> None:
        # Lightning checks between batches; a window can take longer than the grace period of schedulers. One process of
        # several does not stop alone: the others would wait for it.
        if trainer.received_sigterm and trainer.world_size == 1:
            raise SIGTERMException
        if self._requeue_signal is not None:
            self._requeue_signal.raise_if_received()
