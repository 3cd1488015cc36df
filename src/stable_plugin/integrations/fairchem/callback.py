"""StABlE training inside fairchem's own training."""

from __future__ import annotations

import logging
from collections.abc import Sized
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from torch import nn, optim

from stable_plugin.config import StABlEArguments, takes
from stable_plugin.integrations.fairchem.checkpoints import Interruption, StopSignaled, load_with, save_with
from stable_plugin.integrations.progress import ProgressLine
from stable_plugin.integrations.session import NonFiniteGradientError, Session
from stable_plugin.md.system import System
from stable_plugin.models.fairchem.potential import FairchemPotential
from stable_plugin.runtime.distributed import DistributedContext

# After stable_plugin.models.fairchem, whose error says what to install when fairchem is missing.
from torchtnt.framework.callback import Callback  # isort: skip
from torchtnt.framework.state import State  # isort: skip

log = logging.getLogger(__name__)


@dataclass(kw_only=True, repr=False)
class FairchemArguments(StABlEArguments):
    """Arguments of the callback: the settings, and which of the unit's tasks is simulated."""

    task_name: str | None = None
    """Name of the data set whose energies are simulated with; not needed if the unit has only one."""

    conservative: bool = False
    """See :class:`~stable_plugin.models.fairchem.FairchemPotential`."""

    charge: int | None = None
    """Total charge of structures that do not state one."""

    spin: int | None = None
    """Spin multiplicity of structures that do not state one."""


class StABlECallback(Callback):
    """Adds StABlE training to a native fairchem training, as one entry of ``runner.callbacks``.

    Batches, losses, clipping, optimizer, averaging, schedule and checkpoints stay those of fairchem's unit. The
    observable's gradient is added before the optimizer's step, and the sum is clipped as the unit clips its own.

    When training is done, the averaged weights, which inference uses, are set to those that passed the simulation.

    Args:
        arguments: The fields of :class:`FairchemArguments` as keyword arguments: those of
            :class:`~stable_plugin.StABlEConfig`, or ``config=``, and ``task_name``, ``conservative``, ``charge``, ``spin``.

    Example:
        In the YAML of a fairchem training::

            runner:
              callbacks:
                - _target_: stable_plugin.integrations.fairchem.StABlECallback
                  task_name: omol
                  n_replicas: 16
    """

    @takes(FairchemArguments)
    def __init__(self, arguments: FairchemArguments) -> None:
        self.config = arguments.to_config()
        self.session = Session(self.config)
        self._arguments = arguments
        self._unit: Any = None
        self._in_train_step = False
        self._finished = False
        self._resumed = False
        self._interruption: Any = None

    def __repr__(self) -> str:
        return repr(self._arguments).replace(type(self._arguments).__name__, type(self).__name__, 1)

    def on_train_start(self, state: State, unit: Any) -> None:
        """Build the training loop, and register the hooks of the optimizer."""
        _refuse_second(unit, self.session)
        self._unit = unit
        assert state.train_state is not None
        if DistributedContext.current().rank == 0:
            _warn_late_start(state.train_state, self.session)
        self._resumed = load_with(unit, self.session)
        self._interruption = Interruption(unit)
        self.session.begin(
            _SimulatedModel(unit, self._arguments),
            state.train_state.dataloader,
            Path(unit.job_config.metadata.results_dir),
            ProgressLine(self.config.window_ps, enabled=DistributedContext.current().rank == 0),
            self._interruption.raise_if_signaled,
        )
        unit.optimizer.register_step_pre_hook(self._before_step)
        unit.optimizer.register_step_post_hook(self._after_step)
        save_with(unit, self.session)
        self._wrap_train_step(unit)
        self._end_if_done(state, unit)

    def on_train_get_next_batch_end(self, state: State, unit: Any) -> None:
        """Restore the random streams of the checkpoint, or mark those that an interrupted step returns to."""
        if self._resumed:
            # Making the iterator of the batches has drawn from them since they were loaded.
            self.session.resume.restore()
            self._resumed = False
        self.session.resume.mark()

    def on_train_step_start(self, state: State, unit: Any) -> None:
        """Simulate until it is time to learn, or training is done."""
        try:
            self._interruption.raise_if_signaled()
            if self._active(unit):
                self.session.simulate()
                self._log_windows(state, unit)
        except StopSignaled:
            self._interruption.save(self._interruption.signaled)
            raise

    def on_train_step_end(self, state: State, unit: Any) -> None:
        """Log, and end training when the session is done."""
        self.session.resume.unmark()
        if self._active(unit):
            self._log_windows(state, unit)

    def on_train_end(self, state: State, unit: Any) -> None:
        """Restore the signal handlers, and log what the user should know about the result."""
        self._interruption.restore_handlers()
        if self.session.has_begun and DistributedContext.current().rank == 0:
            self.session.warn_energy_drift()
            self.session.log_verification()

    def on_exception(self, state: State, unit: Any, exc: BaseException) -> None:
        """Restore the signal handlers when training ends with an error."""
        if self._interruption is not None:
            self._interruption.restore_handlers()

    def _active(self, unit: Any) -> bool:
        return bool(unit.train_progress.num_epochs_completed >= self.config.start_epoch)

    def _before_step(self, optimizer: optim.Optimizer, args: Any, kwargs: Any) -> None:
        # Saving a checkpoint calls step() too, to create the state of a new optimizer.
        if not (self._in_train_step and self._active(self._unit)):
            return
        numbers = self.session.before_step(optimizer)
        if numbers is None:
            return
        if self._unit.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(self._unit.model.parameters(), max_norm=self._unit.clip_grad_norm)
        self._log(numbers)

    def _after_step(self, optimizer: optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.session.after_step([optimizer])

    def _wrap_train_step(self, unit: Any) -> None:
        """Let the optimizer's hooks know that a step is one of training, and save when it is interrupted."""
        train_step = unit.train_step

        def wrapped(state: State, data: Any) -> Any:
            self._in_train_step = True
            try:
                result = train_step(state, data)
                # fairchem notes the loss of a step after it, so the weight of the margin follows that of the step before.
                loss = getattr(unit, "last_loss", None)
                self.session.users_loss = None if loss is None else float(loss)
                return result
            except (StopSignaled, NonFiniteGradientError) as error:
                # A resumed run takes this step again.
                unit.optimizer.zero_grad(set_to_none=True)
                self._in_train_step = False
                self._interruption.save(self._interruption.signaled or type(error).__name__)
                raise
            finally:
                self._in_train_step = False

        unit.train_step = wrapped

    def _log_windows(self, state: State, unit: Any) -> None:
        for numbers in self.session.new_windows():
            self._log(numbers)
        self._end_if_done(state, unit)

    def _end_if_done(self, state: State, unit: Any) -> None:
        if self.session.done and not self._finished:
            self._finished = True
            if unit.ema_model is not None:
                unit.ema_model.module.load_state_dict(unit.model.state_dict())
            # Not state.stop(), which would cut the last evaluation short: fairchem divides by the number of its batches.
            assert state.train_state is not None
            state.train_state._max_steps = unit.train_progress.num_steps_completed

    def _log(self, numbers: dict[str, float]) -> None:
        if self._unit.logger is not None:
            self._unit.logger.log(numbers, step=self._unit.train_progress.num_steps_completed, commit=False)


class _SimulatedModel(nn.Module):
    """The unit's model, with the arguments that the simulation needs."""

    def __init__(self, unit: Any, arguments: FairchemArguments) -> None:
        super().__init__()
        self.network = getattr(unit.model, "module", unit.model)
        self._tasks, self._arguments = unit.tasks, arguments

    def stable_potential(self, system: System) -> FairchemPotential:
        arguments = self._arguments
        system = system.with_electrons(arguments.charge, arguments.spin)
        return FairchemPotential(self.network, system, self._tasks, arguments.task_name, arguments.conservative)


def _warn_late_start(training: Any, session: Session) -> None:
    batches = [
        len(training.dataloader) if isinstance(training.dataloader, Sized) else inf,
        training.max_steps_per_epoch or inf,
    ]
    session.warn_late_start(training.max_epochs, training.max_steps, None if min(batches) == inf else min(batches))


def _refuse_second(unit: Any, session: Session) -> None:
    if getattr(unit, "stable_session", session) is not session:
        raise ValueError(
            "runner.callbacks has more than one StABlECallback, and each would change the same weights: keep one, with all "
            "observables in it."
        )
    unit.stable_session = session
