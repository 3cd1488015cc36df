"""What makes a Lightning run that is told to stop in the middle of an epoch go on as if it had not been."""

from __future__ import annotations

import signal
import threading
from typing import Any

from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from pytorch_lightning.utilities.exceptions import SIGTERMException

from stable_plugin.integrations.resume import ResumePoint
from stable_plugin.runtime.random_state import random_state, restore_random_state


class Batches:
    """Where a run is within its epoch, so that one that resumes takes the batches that are left, in the same order.

    Lightning begins the order of the batches anew when it resumes in the middle of an epoch, unless the data loader saves a
    state of its own.

    Args:
        resume: Where the run continues.
    """

    def __init__(self, resume: ResumePoint) -> None:
        self.resume = resume
        self._at_start: dict[str, Any] | None = None
        self._iterator_is_new = True
        self._taken = 0

    def on_fit_start(self) -> None:
        """Lightning makes the first iterator of the batches soon after this."""
        self._at_start, self._iterator_is_new, self._taken = random_state(), True, 0
        self.resume.unmark()

    def on_train_start(self, trainer: Any) -> None:
        """Pass over the batches that were taken before the run was interrupted."""
        left_off = self.resume.batches
        if self._at_start is None or not left_off:
            return
        self._taken = left_off["taken"]
        loop = trainer.fit_loop
        if not any(hasattr(loader, "load_state_dict") for loader in loop._combined_loader.flattened):
            fetched = loop._data_fetcher.fetched
            for _ in range(self._taken):
                next(loop._data_fetcher)
            loop._data_fetcher.fetched = fetched  # Lightning adds those of before itself
        restore_random_state(left_off["random"])

    def on_train_epoch_start(self, trainer: Any) -> None:
        """Lightning makes the iterator of a later epoch after this."""
        # Who resumes where an epoch begins has all its batches before him; Lightning takes those of the last one for taken.
        if trainer.fit_loop.restarting:
            trainer.fit_loop.epoch_loop.restarting = False
        if not self._iterator_is_new:
            self._at_start = random_state()
        self._taken, self.resume.batches = 0, {}

    def on_train_batch_end(self, trainer: Any, batch_idx: int) -> None:
        """Between two optimizer steps a run can be left and taken up again."""
        if self._at_start is None or trainer.fit_loop.epoch_loop._should_accumulate():
            return
        self._taken = batch_idx + 1
        is_last = self._taken >= trainer.num_training_batches
        # Whoever resumes at the end of an epoch makes the next one's iterator.
        self.resume.batches = (
            {} if is_last else {"taken": self._taken, "start": self._at_start, "random": random_state()}
        )

    def on_validation_end(self, trainer: Any) -> None:
        """A validation between two steps draws from the global random streams; it is not done again."""
        if self.resume.batches and trainer.fit_loop.epoch_loop.batch_progress.current.ready == self._taken:
            self.resume.batches["random"] = random_state()

    def on_train_epoch_end(self) -> None:
        """The next iterator is the next epoch's own."""
        self._iterator_is_new, self._taken, self.resume.batches = False, 0, {}

    def go_back(self, trainer: Any) -> None:
        """Have a checkpoint that is written in the middle of a step say that the step was not begun."""
        fit_loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
        epoch, batch = fit_loop.epoch_progress, epoch_loop.batch_progress
        if self._at_start is None or epoch.total.processed != epoch.total.ready - 1:
            return  # between two epochs
        if self._taken == 0:
            for each in (epoch.total, epoch.current):
                each.started -= int(epoch.total.started == epoch.total.ready)
            self.resume.mark_at(self._at_start)
            return
        begun = batch.current.ready - self._taken
        batch.total.ready -= begun
        for each, name in (
            (each, name) for each in (batch.current, batch.total) for name in ("started", "processed", "completed")
        ):
            setattr(each, name, batch.total.ready if each is batch.total else self._taken)
        batch.current.ready = self._taken
        batch.is_last_batch = False
        if epoch_loop._should_check_val_fx(fit_loop._data_fetcher):
            epoch_loop._batches_that_stepped -= (
                1  # Lightning counts it again when it passes over the validation it has done
            )


class Requeueing:
    """Hears the signal by which SLURM says that a job's time is over, and lets Lightning's handler have it later.

    That handler writes its checkpoint wherever the signal comes, in the middle of an optimizer's step if need be.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._handler: Any = None
        self._signaled: int | None = None
        environment = trainer._accelerator_connector.cluster_environment
        if (
            isinstance(environment, SLURMEnvironment)
            and environment.auto_requeue
            and environment.requeue_signal is not None
            and trainer.world_size == 1
            and threading.current_thread() is threading.main_thread()
        ):
            self._handler = signal.signal(environment.requeue_signal, self._hear)

    def raise_if_signaled(self) -> None:
        """Leave what is going on.

        Raises:
            SIGTERMException: If the signal has come.
        """
        if self._signaled is not None:
            raise SIGTERMException

    def requeue(self) -> bool:
        """Have Lightning write its checkpoint and requeue the job, if the signal has come, and say so."""
        if self._signaled is None or not callable(self._handler):
            return False
        self._handler(self._signaled, None)
        return True

    def _hear(self, number: int, frame: Any) -> None:
        self._signaled = number
