"""StABlE training as a callback of any Lightning Trainer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException
from torch import optim

from stable_plugin.algorithm.estimator import Loss, mean_squared_error
from stable_plugin.algorithm.schedule import Schedule
from stable_plugin.algorithm.training_loop import TrainingLoop, WindowRecord
from stable_plugin.detectors import Detector
from stable_plugin.integrations import Local, LoopSettings, NonFiniteGradientError, Session, Weight
from stable_plugin.integrations.lightning.checkpoint_io import add_way_out, use_atomic_checkpoints
from stable_plugin.integrations.lightning.preemption import Batches, Requeueing
from stable_plugin.md import Execution, Integrator
from stable_plugin.md.frames import Frames
from stable_plugin.observables import Observable
from stable_plugin.runtime import checks

log = logging.getLogger(__name__)

ON_PROGRESS_BAR = ("stable/unstable_fraction", "stable/observable_loss", "stable/ess", "stable/simulated_ps")


class StABlECallback(Callback):
    """Repairs a potential that fails in molecular dynamics while it is being trained.

    From ``start_epoch`` on, the potential simulates replicas of the training structures. When too many fail, the
    gradient of a reference observable joins that of the user's own loss in each optimizer step, until none fails.
    Training ends when the replicas stay stable for ``schedule.stable_ps``.

    Optimizer, clipping, precision, accumulation, loggers and checkpoints stay the Trainer's. Works with a module that
    holds a MACE model, or has a method ``stable_potential(system)``.

    Source: Raja, Amin, Pedregosa and Krishnapriyan, TMLR 2025, arXiv:2402.13984.

    Args:
        structures: Start frames of the replicas, a file or ASE structures; the training data's if not given.
        reference: Frames that bonds, reference bond lengths and the observables' targets come from; the structures if
            not given. A longer trajectory gives sharper targets.
        bonds: Pairs of bonded atoms; found in the first reference frame from covalent radii if not given.
        integrator: Thermostat, temperature and timestep; Langevin at 300 K with 0.5 fs if not given.
        observables: What should be reproduced. If not given: lengths and amplitudes of the bonds, and by molecule those
            and contacts where there are several; radial distributions of all pairs of elements in liquids and solids.
        detector: When a replica is unstable. If not given: a bond 0.25 Å off its mean length, or two molecules closer than
            two thirds of what they come in the reference; in a crystal without molecules, twice the temperature or atoms
            closer than that.
        n_replicas: Replicas simulated at once, in each process if training runs in several.
        window_ps: Length of a window in ps.
        record_every_fs: Time between frames that the estimator sees, in fs.
        check_every_fs: Time between two looks of the detector, in fs.
        schedule: When to learn and when to stop.
        loss: Of an observable's mean and its target; mean squared error if not given.
        learning_rate: Of the steps that the observable takes part in; the optimizer's own if not given.
        observable_weight: Factor of the observable's gradient. ``auto`` makes it ``gradient_ratio`` times as long as
            that of the user's loss.
        gradient_ratio: See ``observable_weight``.
        steps_per_window: Optimizer steps on one window at most, by reweighting its frames.
        min_ess_fraction: A window is used up when reweighting leaves a smaller share of it effective.
        max_lr_scale: The learning rate is multiplied by up to this, or divided, so that the steps on a window use it up
            together and none of them alone; one leaves it as it is.
        rewind_fraction: Share of stable replicas that start a simulation phase from an earlier checkpoint.
        local: What counts as a sample of its own for the local estimator, which sees one broken molecule among hundreds:
            ``Molecules()``, ``NearestMolecules(n)``, ``AtomsWithin(radius_A)``, or None for whole frames. ``auto`` takes
            molecules if there are several and an observable is local.
        even_sampling: For the local estimator, bins of deviation to draw from evenly, and samples drawn per bin and
            replica; all if not given.
        start_epoch: Epochs of ordinary training that come first.
        chunk: Frames per model call of the estimator; bounds its memory.
        execution: How the simulator runs its steps: captured, compiled, on how many threads. The fastest way that works
            if not given.
        seed: Seeds all random streams of the simulation.

    Example:
        >>> from pytorch_lightning import Trainer
        >>> from stable_plugin import StABlECallback
        >>> trainer = Trainer(callbacks=[StABlECallback()], logger=False)
    """

    def __init__(
        self,
        *,
        structures: Frames | None = None,
        reference: Frames | None = None,
        bonds: Sequence[tuple[int, int]] | None = None,
        integrator: Integrator | None = None,
        observables: Observable | Sequence[Observable] | None = None,
        detector: Detector | None = None,
        n_replicas: int = 32,
        window_ps: float = 0.4,
        record_every_fs: float = 25.0,
        check_every_fs: float = 5.0,
        schedule: Schedule | None = None,
        loss: Loss = mean_squared_error,
        learning_rate: float | None = None,
        observable_weight: Weight = "auto",
        gradient_ratio: float = 15.0,
        steps_per_window: int = 6,
        min_ess_fraction: float = 0.3,
        max_lr_scale: float = 1.0,
        rewind_fraction: float = 0.1,
        local: Local = "auto",
        even_sampling: Sequence[int] | None = None,
        start_epoch: int = 0,
        chunk: int = 64,
        execution: Execution | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.start_epoch = checks.count("start_epoch", start_epoch, at_least=0)
        self.session = Session(
            LoopSettings(
                structures=structures,
                reference=reference,
                bonds=bonds,
                integrator=integrator,
                observables=observables,
                detector=detector,
                n_replicas=n_replicas,
                window_ps=window_ps,
                record_every_fs=record_every_fs,
                check_every_fs=check_every_fs,
                schedule=schedule,
                loss=loss,
                steps_per_window=steps_per_window,
                min_ess_fraction=min_ess_fraction,
                max_lr_scale=max_lr_scale,
                rewind_fraction=rewind_fraction,
                local=local,
                even_sampling=even_sampling,
                chunk=chunk,
                execution=execution,
                seed=seed,
            ),
            learning_rate=learning_rate,
            observable_weight=observable_weight,
            gradient_ratio=gradient_ratio,
        )
        self._batches = Batches(self.session)
        self._requeueing: Requeueing | None = None

    @property
    def loop(self) -> TrainingLoop:
        """What simulates and estimates, once training has started."""
        return self.session.loop

    @property
    def rounds(self) -> list[WindowRecord]:
        """The windows simulated so far."""
        return self.loop.windows if self.session.begun else []

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
        if trainer.current_epoch >= self.start_epoch:
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
        if trainer.current_epoch < self.start_epoch:
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
        if not self.session.begun:
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
