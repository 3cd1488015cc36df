"""StABlE training as a callback of any Lightning Trainer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException
from torch import optim

from stable_plugin.algorithm.records import WindowRecord
from stable_plugin.algorithm.training_loop import TrainingLoop
from stable_plugin.config import StABlEArguments, takes
from stable_plugin.integrations.build import validate
from stable_plugin.integrations.lightning.checkpoint_io import add_way_out, use_atomic_checkpoints
from stable_plugin.integrations.lightning.preemption import Batches, Requeueing
from stable_plugin.integrations.session import NonFiniteGradientError, Session

log = logging.getLogger(__name__)

ON_PROGRESS_BAR = ("stable/unstable_fraction", "stable/observable_loss", "stable/ess_fraction", "stable/simulated_ps")


class StABlECallback(Callback):
    """Repairs a potential that fails in molecular dynamics while it is being trained.

    From ``start_epoch`` on, the potential simulates replicas of the training structures. When too many fail, the
    gradient of a reference observable joins that of the user's own loss in each optimizer step, until none fails.
    Training ends when the replicas stay stable for ``schedule.stable_ps``.

    Optimizer, clipping, precision, accumulation, loggers and checkpoints stay the Trainer's. Works with a module that
    holds a MACE model, or has a method ``stable_potential(system)``.

    Source: Raja, Amin, Pedregosa and Krishnapriyan, TMLR 2025, arXiv:2402.13984.

    Args:
        arguments: The fields of :class:`~stable_plugin.StABlEConfig` as keyword arguments, or ``config=``, an instance of
            it.

    Attributes:
        config: The settings.

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
        self._batches = Batches(self.session.resume)
        self._requeueing: Requeueing | None = None

    def validate(self, device: torch.device | str = "cpu") -> None:
        """Check that settings and structures fit together, before a long training that comes first.

        Args:
            device: Device that the model will be on.

        Raises:
            ValueError: If they do not.
        """
        validate(self.config, device)

    @property
    def loop(self) -> TrainingLoop:
        """What simulates and estimates, once training has started."""
        return self.session.loop

    @property
    def windows(self) -> list[WindowRecord]:
        """The windows simulated so far."""
        return self.loop.windows if self.session.has_begun else []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, before anything long begins, and see to checkpoints that are whole."""
        if sum(isinstance(callback, StABlECallback) for callback in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise MisconfigurationException(
                "the Trainer has more than one StABlECallback, which would both move the same weights: keep one, with all "
                "observables in it."
            )
        if stage == "fit":
            self.refuse_steps_of_its_own(pl_module)
            _refuse_averages(trainer)
            _refuse_sharded(trainer)
        use_atomic_checkpoints(trainer)

    def refuse_steps_of_its_own(self, module: LightningModule) -> None:
        """Refuse a module that takes its optimizer steps itself.

        Raises:
            MisconfigurationException: If it does.
        """
        if not module.automatic_optimization:
            raise MisconfigurationException(
                "StABlECallback adds its gradient before Trainer's optimizer step, which manual optimization "
                f"({type(module).__name__}.automatic_optimization = False) bypasses: use StABlEMixin and its "
                "stable_loss() in training_step."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what the order of the first epoch's batches comes from."""
        self._batches.on_fit_start()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find potential, structures and reference."""
        self._requeueing = Requeueing(trainer)

        def stop_if_told() -> None:
            # Lightning looks between batches; a window can take longer than the grace that schedulers give. One process of
            # several does not stop by itself: the others would wait for it.
            if trainer.received_sigterm and trainer.world_size == 1:
                raise SIGTERMException
            if self._requeueing is not None:
                self._requeueing.raise_if_signaled()

        show_progress = trainer.progress_bar_callback is not None and trainer.is_global_zero
        folder = trainer.default_root_dir
        self.session.begin(pl_module, trainer.train_dataloader, folder, show_progress, stop_if_told)
        self._batches.on_train_start(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Simulate until it is time to learn, or training is done."""
        self._batches.on_train_epoch_start(trainer)
        if trainer.current_epoch >= self.config.start_epoch:
            self.session.simulate()
            self.log_windows(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Stop here if the job is to be requeued."""
        if self._requeueing is not None:
            self._requeueing.raise_if_signaled()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: optim.Optimizer
    ) -> None:
        """Add the observable's gradient to what the user's loss left behind."""
        if trainer.current_epoch < self.config.start_epoch:
            return
        numbers = self.session.before_step(optimizer)
        self.log_windows(trainer)
        for name, value in (numbers or {}).items():
            pl_module.log(name, value, prog_bar=name in ON_PROGRESS_BAR)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Give the learning rate back to its scheduler."""
        self.session.after_step(trainer.optimizers)
        self._batches.on_train_batch_end(trainer, batch_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what a validation in the middle of an epoch has drawn."""
        self._batches.on_validation_end(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the next batches are those of another epoch."""
        self._batches.on_train_epoch_end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave a checkpoint behind when the run is stopped, to go on with ``trainer.fit(ckpt_path=...)``."""
        add_way_out(trainer, exception)
        if not self.session.has_begun:
            return
        # Spoiled gradients are everybody's; who is interrupted alone would wait for what the others have to save.
        interrupted = isinstance(exception, KeyboardInterrupt | SystemExit) and trainer.world_size == 1
        if not interrupted and not isinstance(exception, NonFiniteGradientError):
            return
        self.session.after_step(trainer.optimizers)
        self._batches.go_back(trainer)
        if self._requeueing is not None and self._requeueing.requeue():
            return
        path = Path(trainer.default_root_dir) / f"interrupted-step={trainer.global_step}.ckpt"
        trainer.save_checkpoint(path)
        log.warning("StABlE training was stopped. Go on with ckpt_path=%r.", str(path))

    def log_windows(self, trainer: Trainer) -> None:
        """Log the new windows, and end training when the session is done."""
        # Windows of the simulation phase come between optimizer steps, where only the loggers themselves listen.
        for numbers in self.session.new_windows():
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step=trainer.global_step)
        if self.session.done:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """Phase, replicas, random streams and rounds."""
        return self.session.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave, once the loop exists."""
        self.session.load_state_dict(state_dict)


def _refuse_averages(trainer: Trainer) -> None:
    averaging = ("StochasticWeightAveraging", "WeightAveraging")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if any(kind.__name__ in averaging for kind in type(callback).__mro__):
            raise MisconfigurationException(
                f"{type(callback).__name__} would hand back averages of weights, which StABlECallback has not simulated with: "
                "leave it out of this Trainer. In an earlier training without StABlECallback it may stay."
            )


def _refuse_sharded(trainer: Trainer) -> None:
    strategy = type(trainer.strategy).__name__
    if strategy in ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"):
        raise MisconfigurationException(
            f"{strategy} divides the weights between processes, and StABlECallback simulates with all of them in each: use "
            "Trainer(strategy='ddp'), where every process has replicas of its own."
        )
