"""Checkpoints of a native fairchem training: complete or absent, with StABlE's state, and one more on interruption."""

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
"""Name of StABlE's state in the folder of a fairchem checkpoint."""

RESUME_FILE = "resume.yaml"
"""Name of fairchem's configuration that resumes from the checkpoint it is in."""


class StopSignaled(SystemExit):
    """A signal asked the process to stop; its exit status is zero."""


def save_with(unit: Any, session: Session) -> None:
    """Add the session's state to each of the unit's checkpoints, and let a checkpoint appear only when it is complete.

    fairchem resumes from the newest folder with a ``.metadata``, which it does not write last, and overwrites the folder that
    it has just resumed from.

    Args:
        unit: fairchem's unit.
        session: The session.
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
            # Gathers from all processes, so the others continue only when the first has made the folder.
            state = session.state_dict()
            _unwrap_write_errors(lambda: save_unit(str(partial)))
            if first:
                torch.save(state, partial / STATE_FILE)
                _set_location(partial / RESUME_FILE, checkpoint_location)

    unit.save_state = save_state


def load_with(unit: Any, session: Session) -> bool:
    """Load the session's state from the checkpoint that the unit resumes from.

    Args:
        unit: fairchem's unit.
        session: The session.

    Returns:
        Whether the checkpoint has one.

    Raises:
        ValueError: If the state is damaged.
    """
    if unit.lazy_state_location is None:
        return False
    path = Path(unit.lazy_state_location) / STATE_FILE
    if not path.is_file():
        log.warning("%s has no %s: StABlE training starts from the beginning.", unit.lazy_state_location, STATE_FILE)
        return False
    session.load_state_dict(load_tensors(path, "state of StABlE training"))
    return True


class Interruption:
    """Handles SIGTERM and SIGINT instead of fairchem, in a single process of the local scheduler.

    fairchem's own handler returns to the last checkpoint, and fails when it links it to a folder that it has just made.
    On SLURM its own requeueing stays.

    Args:
        unit: Unit whose checkpoint is written.

    Attributes:
        signaled: Name of the signal that has arrived; None if there was none.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, unit: Any) -> None:
        self.unit = unit
        self.signaled: str | None = None
        self._handlers: dict[int, Any] = {}
        if (
            _is_local(unit.job_config.scheduler.mode)
            and DistributedContext.current().size == 1
            and threading.current_thread() is threading.main_thread()
        ):
            self._handlers = {number: signal.signal(number, self._receive) for number in self.SIGNALS}

    def raise_if_signaled(self) -> None:
        """Interrupt the run.

        Raises:
            StopSignaled: If a signal has arrived.
        """
        if self.signaled is not None:
            raise StopSignaled(0)

    def save(self, reason: str) -> None:
        """Write a checkpoint, and log why training has stopped and how to resume.

        Args:
            reason: Name of the signal or error.
        """
        metadata = self.unit.job_config.metadata
        folder = Path(metadata.checkpoint_dir) / f"step_{self.unit.train_progress.num_steps_completed}"
        self.unit.save_state(str(folder))
        self.restore_handlers()
        log.warning("%s: training has stopped. Resume with: fairchem -c %s", reason, folder / RESUME_FILE)

    def restore_handlers(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _receive(self, number: int, frame: Any) -> None:
        self.signaled = signal.Signals(number).name


def _is_local(mode: Any) -> bool:
    # An enum in a new run, whose value is lower case; its upper-case name in the configuration of a resumed one.
    return str(getattr(mode, "value", mode)).lower() == "local"


def _unwrap_write_errors(save: Callable[[], None]) -> None:
    """Save, and raise a write error itself instead of the exception of torch's distributed checkpoints around it."""
    try:
        save()
    except CheckpointException as error:
        for cause, _ in error.failures.values():
            if is_write_error(cause):
                raise cause from error
        raise


def _set_location(path: Path, location: str) -> None:
    """Set the location of the checkpoint in fairchem's configuration to where its folder is moved after writing."""
    if path.is_file():
        config = OmegaConf.load(path)
        config.job.runner_state_path = location
        OmegaConf.save(config, path)
