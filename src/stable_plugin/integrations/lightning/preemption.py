"""Interrupting a Lightning run between optimizer steps, so that the resumed run continues exactly."""

from __future__ import annotations

import logging
import signal
import threading
from typing import Any

from pytorch_lightning.utilities import CombinedLoader
from pytorch_lightning.utilities.exceptions import SIGTERMException

from stable_plugin.integrations.lightning import _lightning_internals as internals
from stable_plugin.integrations.resume import ResumePoint
from stable_plugin.runtime.random_state import random_state, restore_random_state

log = logging.getLogger(__name__)


class EpochPosition:
    """Position of a run within its epoch, so that a resumed run takes the remaining batches in the same order.

    Lightning starts the order of the batches again when it resumes in the middle of an epoch, unless the data loader saves
    a state of its own.

    Args:
        resume: Where the run continues.
    """

    def __init__(self, resume: ResumePoint) -> None:
        self.resume = resume
        self._epoch_start: dict[str, Any] | None = None
        self._is_first_iterator = True
        self._n_batches = 0
        self._was_validated = False

    def on_fit_start(self, trainer: Any) -> None:
        """Save the random streams; Lightning makes the first iterator over the batches soon after this."""
        self._epoch_start, self._is_first_iterator, self._n_batches = random_state(), True, 0
        self.resume.unmark()
        if missing := internals.missing_attributes(trainer):
            self._warn_inexact(f"this version of Lightning has no {', '.join(missing)}")

    def on_train_start(self, trainer: Any) -> None:
        """Skip the batches that were taken before the run was interrupted."""
        saved = self.resume.batches
        if self._epoch_start is None or not saved:
            return
        self._n_batches, self._was_validated = saved["taken"], saved["was_validated"]
        loaders = CombinedLoader(trainer.train_dataloader).flattened
        if not any(hasattr(loader, "load_state_dict") for loader in loaders) and not internals.skip_batches(
            trainer, self._n_batches
        ):
            self._warn_inexact("its batches cannot be skipped, so the epoch starts with other batches")
        restore_random_state(saved["random"])

    def on_train_epoch_start(self, trainer: Any) -> None:
        """Save the random streams; Lightning makes the iterator of a later epoch after this."""
        # A run that resumes at the start of an epoch has all its batches left, while Lightning skips as many as the last
        # epoch had.
        if trainer.fit_loop.restarting:
            trainer.fit_loop.epoch_loop.restarting = False
        if not self._is_first_iterator:
            self._epoch_start = random_state()
        self._n_batches, self.resume.batches = 0, {}

    def on_train_batch_end(self, trainer: Any, batch_idx: int) -> None:
        """Mark the point between two optimizer steps as one to resume from."""
        if self._epoch_start is None or not _has_stepped(trainer):
            return
        self._n_batches, self._was_validated = batch_idx + 1, False
        is_last = self._n_batches >= trainer.num_training_batches
        # A run that resumes at the end of an epoch makes the iterator of the next one itself.
        self.resume.batches = {} if is_last else {"taken": self._n_batches, "start": self._epoch_start, **self._now()}

    def on_validation_start(self, trainer: Any) -> None:
        """Record that a validation follows the last optimizer step."""
        if self._is_at_resume_point(trainer):
            self._was_validated = True
            self.resume.batches["was_validated"] = True

    def on_validation_end(self, trainer: Any) -> None:
        """Save the random streams after a validation between two steps, which is not repeated."""
        if self._is_at_resume_point(trainer):
            self.resume.batches.update(self._now())

    def on_train_epoch_end(self) -> None:
        """Record that the next iterator is that of the next epoch."""
        self._is_first_iterator, self._n_batches, self.resume.batches = False, 0, {}

    def rewind(self, trainer: Any) -> None:
        """Set Lightning's counters to the last point between two steps, for a checkpoint that is written within a step."""
        epoch = trainer.fit_loop.epoch_progress
        if self._epoch_start is None or epoch.total.processed != epoch.total.ready - 1:
            return  # between two epochs
        if self._n_batches > 0:
            self._rewind_batches(trainer)
            return
        for counters in (epoch.total, epoch.current):
            counters.started -= int(epoch.total.started == epoch.total.ready)
        self.resume.mark_at(self._epoch_start)

    def _rewind_batches(self, trainer: Any) -> None:
        progress = trainer.fit_loop.epoch_loop.batch_progress
        progress.total.ready -= progress.current.ready - self._n_batches
        progress.current.ready = self._n_batches
        for counters in (progress.total, progress.current):
            counters.started = counters.processed = counters.completed = counters.ready
        progress.is_last_batch = False
        if self._was_validated:
            internals.uncount_stepped_batch(trainer)

    def _is_at_resume_point(self, trainer: Any) -> bool:
        ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return bool(self.resume.batches) and ready == self._n_batches

    def _now(self) -> dict[str, Any]:
        return {"random": random_state(), "was_validated": self._was_validated}

    def _warn_inexact(self, reason: str) -> None:
        log.warning(
            "resuming in the middle of an epoch is not exact (%s): resume from a checkpoint written at the end of an epoch.",
            reason,
        )


class RequeueSignal:
    """Receives the signal by which SLURM announces the end of a job, and passes it to Lightning's handler later.

    Lightning's handler writes its checkpoint wherever the signal arrives, possibly in the middle of an optimizer step.

    Args:
        trainer: The Trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self._handler: Any = None
        self._received: int | None = None
        environment = internals.slurm_environment(trainer)
        if (
            environment is not None
            and environment.auto_requeue
            and environment.requeue_signal is not None
            and trainer.world_size == 1
            and threading.current_thread() is threading.main_thread()
        ):
            self._handler = signal.signal(environment.requeue_signal, self._receive)

    def raise_if_received(self) -> None:
        """Interrupt the run.

        Raises:
            SIGTERMException: If the signal has arrived.
        """
        if self._received is not None:
            raise SIGTERMException

    def requeue(self) -> bool:
        """Let Lightning write its checkpoint and requeue the job if the signal has arrived, and return whether it has."""
        if self._received is None or not callable(self._handler):
            return False
        self._handler(self._received, None)
        return True

    def _receive(self, number: int, frame: Any) -> None:
        self._received = number


def _has_stepped(trainer: Any) -> bool:
    """Return whether the batch that just ended was the last one before an optimizer step, and not only accumulated."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    is_last = progress.is_last_batch or progress.current.ready == trainer.num_training_batches
    return bool(is_last or progress.current.ready % trainer.accumulate_grad_batches == 0)
