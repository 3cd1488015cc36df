"""StABlE training as a callback of any Lightning Trainer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ase.io
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn, optim

from stable_plugin import checks
from stable_plugin.detectors import Detector
from stable_plugin.estimator import Estimate, Loss, mean_squared_error
from stable_plugin.frames import Frames
from stable_plugin.lightning.gradients import BorrowedLearningRate, ObservableWeight, Weight, add_gradients, norm
from stable_plugin.lightning.progress import ProgressLine
from stable_plugin.lightning.settings import LoopSettings
from stable_plugin.loop import Round, StABlELoop, UnusablePotentialError
from stable_plugin.observables import Observable
from stable_plugin.phases import Schedule
from stable_plugin.simulation import Integrator

log = logging.getLogger(__name__)


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
        observables: What should be reproduced; lengths and amplitudes of the bonds if not given.
        detector: When a replica is unstable; a bond 0.25 Å off its mean length if not given.
        n_replicas: Replicas simulated at once.
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
        min_effective_share: A window is used up when reweighting leaves a smaller share of it effective.
        rewind_share: Share of stable replicas that start a simulation phase from an earlier checkpoint.
        start_epoch: Epochs of ordinary training that come first.
        chunk: Frames per model call of the estimator; bounds its memory.
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
        min_effective_share: float = 0.3,
        rewind_share: float = 0.1,
        start_epoch: int = 0,
        chunk: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if learning_rate is not None:
            checks.number("learning_rate", learning_rate, above=0)
        self.start_epoch = checks.count("start_epoch", start_epoch, least=0)
        self.learning_rate = learning_rate
        self.weight = ObservableWeight(observable_weight, gradient_ratio)
        self.settings = LoopSettings(
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
            min_effective_share=min_effective_share,
            rewind_share=rewind_share,
            chunk=chunk,
            seed=seed,
        )
        self.loop: StABlELoop | None = None
        self._resumed: dict[str, Any] | None = None
        self._rate = BorrowedLearningRate()
        self._logged_rounds = 0

    @property
    def rounds(self) -> list[Round]:
        """The windows simulated so far."""
        return [] if self.loop is None else self.loop.rounds

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, before anything long begins."""
        if stage == "fit" and not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "StABlECallback adds its gradient before Trainer's optimizer step, which manual optimization "
                f"({type(pl_module).__name__}.automatic_optimization = False) bypasses: use StABlEMixin and its "
                "stable_loss() in training_step."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find potential, structures and reference."""
        self.loop = self.settings.build(pl_module, trainer.train_dataloader)
        if self._resumed is not None:
            self.loop.load_state_dict(self._resumed)
            self._resumed = None
        self._logged_rounds = len(self.loop.rounds)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Simulate until it is time to learn, or training is done."""
        if trainer.current_epoch >= self.start_epoch:
            self.simulate(trainer)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: optim.Optimizer
    ) -> None:
        """Add the observable's gradient to what the user's loss left behind."""
        if trainer.current_epoch < self.start_epoch:
            return
        estimate = self.estimate(trainer)
        assert self.loop is not None
        if estimate is None:
            # The weights that passed the simulation are the weights the user gets: this step must not move them.
            optimizer.zero_grad(set_to_none=True)
            return
        parameters = self.loop.potential.trainable_parameters()
        latest = self.loop.rounds[-1]
        factor = self.weight(estimate.gradients, _gradients(parameters), new_window=latest.steps == 1)
        add_gradients(parameters, estimate.gradients, factor)
        latest.learning_rate = self._rate.set(optimizer, self.learning_rate, self.loop.phases.lr_factor)
        pl_module.log_dict(
            {
                "stable/unstable_share": latest.unstable_share,
                "stable/observable_loss": estimate.loss,
                "stable/ess": estimate.effective_share,
                "stable/simulated_ps": self.loop.simulated_ps,
            },
            prog_bar=True,
        )
        pl_module.log_dict(
            {"stable/observable_weight": factor, "stable/observable_gradient_norm": norm(estimate.gradients)}
        )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Give the learning rate back to its scheduler."""
        for optimizer in trainer.optimizers:
            self._rate.give_back(optimizer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave a checkpoint behind when the run is interrupted, to go on with ``trainer.fit(ckpt_path=...)``."""
        if self.loop is None or not isinstance(exception, KeyboardInterrupt | SystemExit):
            return
        path = Path(trainer.default_root_dir) / f"interrupted-step={trainer.global_step}.ckpt"
        for optimizer in trainer.optimizers:
            self._rate.give_back(optimizer)
        trainer.save_checkpoint(path)
        log.warning("StABlE training was interrupted. Go on with ckpt_path=%r.", str(path))

    def simulate(self, trainer: Trainer) -> None:
        """Run the simulation phase, if training is in one."""
        with self._watched(trainer) as loop:
            loop.simulation_phase()
        self._stop_when_done(trainer)

    def estimate(self, trainer: Trainer) -> Estimate | None:
        """The observable's gradient for the next optimizer step; None when training is done."""
        with self._watched(trainer) as loop:
            estimate = loop.gradient()
        self._stop_when_done(trainer)
        return estimate

    def state_dict(self) -> dict[str, Any]:
        """Phase, replicas, random streams and rounds."""
        return {} if self.loop is None else {"loop": self.loop.state_dict(), "weight": self.weight.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave, once the loop exists."""
        if state_dict:
            self._resumed = state_dict["loop"]
            self.weight.load_state_dict(state_dict["weight"])

    def _stop_when_done(self, trainer: Trainer) -> None:
        assert self.loop is not None
        self._log_rounds(trainer)
        if self.loop.phases.name == "done":
            trainer.should_stop = True

    def _log_rounds(self, trainer: Trainer) -> None:
        """Windows of the simulation phase come between optimizer steps, where only the loggers themselves listen."""
        assert self.loop is not None
        for entry in self.loop.rounds[self._logged_rounds :]:
            metrics: dict[str, Any] = {
                f"stable/{entry.phase}/unstable_share": entry.unstable_share,
                f"stable/{entry.phase}/observable_loss": entry.observable_loss,
                "stable/round": entry.round,
                "stable/simulated_ps": entry.simulated_ps,
            }
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)
            log.info(
                "window %d (%s): %.0f %% of the replicas unstable, observable loss %.2e, %.2f ps simulated, %.0f s",
                entry.round,
                entry.phase,
                100.0 * entry.unstable_share,
                entry.observable_loss,
                entry.simulated_ps,
                entry.wall_s,
            )
        self._logged_rounds = len(self.loop.rounds)

    def _watched(self, trainer: Trainer) -> _Watched:
        assert self.loop is not None
        return _Watched(self.loop, trainer)


class _Watched:
    """The loop with a progress line, and with the worst frame saved if the potential turns out unusable."""

    def __init__(self, loop: StABlELoop, trainer: Trainer) -> None:
        self.loop = loop
        self.line = ProgressLine(loop, enabled=trainer.progress_bar_callback is not None and trainer.is_global_zero)
        self.folder = Path(trainer.default_root_dir)

    def __enter__(self) -> StABlELoop:
        self.loop.on_progress = self.line.show
        return self.loop

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.line.close()
        if isinstance(error, UnusablePotentialError):
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / "worst_frame.extxyz"
            ase.io.write(path, error.frame)
            error.args = (f"{error} The worst frame is in {path}.",)


def _gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]
