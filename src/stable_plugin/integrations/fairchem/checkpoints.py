"""Checkpoints of a native fairchem training: whole or not at all, with our state in them, and one more when told to stop."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch.distributed.checkpoint.api import CheckpointException

from stable_plugin.integrations.session import Session
from stable_plugin.runtime.atomic_files import atomic_folder, is_write_error, partial_folder
from stable_plugin.runtime.distributed import DistributedContext
from stable_plugin.runtime.serialization import load_tensors

log = logging.getLogger(__name__)

STATE_FILE = "stable.pt"
"""Name of our state in a folder of fairchem's checkpoint."""

RESUME_FILE = "resume.yaml"
"""Name of fairchem's configuration that goes on from the checkpoint it is in."""


class StopSignaled(SystemExit):
    """The process was told to stop, and ends as one that did as it was told."""


def save_with(unit: Any, session: Session) -> None:
    """Have each of the unit's checkpoints hold the session's state too, and appear once everything is in it.

    fairchem goes on from the newest folder with a ``.metadata``, which it writes before it is done, and saves over the
    folder that it has just resumed from.
    """
    save_unit = unit.save_state

    def save_state(checkpoint_location: str) -> None:
        first = DistributedContext.current().rank == 0
        folder = (
            atomic_folder(checkpoint_location, "checkpoint")
            if first
            else nullcontext(partial_folder(checkpoint_location))
        )
        with folder as partial:
            # Of all processes, together: the others go on once the first has made the folder.
            state = session.state_dict()
            _saved(lambda: save_unit(str(partial)))
            if first:
                torch.save(state, partial / STATE_FILE)
                _name_place(partial / RESUME_FILE, checkpoint_location)

    unit.save_state = save_state


def load_with(unit: Any, session: Session) -> bool:
    """Take up the session's state from the checkpoint that the unit goes on from, and say whether there was one."""
    if unit.lazy_state_location is None:
        return False
    path = Path(unit.lazy_state_location) / STATE_FILE
    if not path.is_file():
        log.warning("%s has no %s: StABlE training begins afresh.", unit.lazy_state_location, STATE_FILE)
        return False
    session.load_state_dict(load_tensors(path, "state of StABlE training"))
    return True


class Interruption:
    """Hears SIGTERM and SIGINT in a single process that fairchem has started here, in place of fairchem.

    fairchem's own handler goes back to the last checkpoint, and fails when it links it to a folder that it has just made.
    On SLURM its own requeueing stays.

    Args:
        unit: Whose checkpoint is written.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, unit: Any) -> None:
        self.unit = unit
        self.signaled: str | None = None
        self._handlers: dict[int, Any] = {}
        local = str(getattr(unit.job_config.scheduler.mode, "value", unit.job_config.scheduler.mode)) == "local"
        if local and DistributedContext.current().size == 1 and threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._hear) for number in self.SIGNALS}

    def raise_if_signaled(self) -> None:
        """Leave what is going on.

        Raises:
            StopSignaled: If a signal has come.
        """
        if self.signaled is not None:
            raise StopSignaled(0)

    def save(self, reason: str) -> None:
        """Write the checkpoint, and say why training has stopped and how to go on."""
        metadata = self.unit.job_config.metadata
        folder = Path(metadata.checkpoint_dir) / f"step_{self.unit.train_progress.num_steps_completed}"
        self.unit.save_state(str(folder))
        self.forget()
        log.warning("%s: training has stopped. Go on with: fairchem -c %s", reason, folder / RESUME_FILE)

    def forget(self) -> None:
        """Put the handlers back that were there before."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _hear(self, number: int, frame: Any) -> None:
        self.signaled = signal.Signals(number).name


def _saved(save: Callable[[], None]) -> None:
    """Save, and if it fails raise what torch's distributed checkpoints wrap, which says what the matter was."""
    try:
        save()
    except CheckpointException as error:
        for cause, _ in error.failures.values():
            if is_write_error(cause):
                raise cause from error
        raise


def _name_place(path: Path, place: str) -> None:
    """Have fairchem's configuration name the place where its folder will be, not the one where it was written."""
    if path.is_file():
        config = OmegaConf.load(path)
        config.job.runner_state_path = place
        OmegaConf.save(config, path)
