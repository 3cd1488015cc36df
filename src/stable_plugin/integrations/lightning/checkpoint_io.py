"""Checkpoints of Lightning that are complete or absent, never half written."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lightning_fabric.plugins import CheckpointIO, TorchCheckpointIO

from stable_plugin.runtime.atomic_files import atomic_write, is_explained, is_write_error, write_obstacle
from stable_plugin.runtime.serialization import read_as_data

TRUSTED = "If you trust its source, load it with Trainer.fit(..., weights_only=False)."


class AtomicCheckpointIO(CheckpointIO):
    """Writes a checkpoint next to its final place and renames it, with any other CheckpointIO.

    Lightning itself writes to the folder for temporary files and moves the file. On another file system the move is a copy,
    and a process that is killed during the copy leaves half a checkpoint in place of a complete one.

    :class:`~stable_plugin.StABlECallback` installs it unless the Trainer has another CheckpointIO.

    Args:
        checkpoint_io: CheckpointIO that writes and reads; Lightning's own if None.

    Example:
        >>> from pytorch_lightning import Trainer
        >>> from stable_plugin.integrations.lightning import AtomicCheckpointIO
        >>> trainer = Trainer(plugins=[AtomicCheckpointIO()], logger=False)
    """

    def __init__(self, checkpoint_io: Any | None = None) -> None:
        self.checkpoint_io = TorchCheckpointIO() if checkpoint_io is None else checkpoint_io
        _register_with_lightning()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.checkpoint_io).__name__}())"

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint, and rename it when it is complete; write to addresses of remote stores directly.

        Args:
            checkpoint: The checkpoint.
            path: Its path.
            storage_options: Passed on.

        Raises:
            OSError: If it cannot be written; names the path and the remedy.
        """
        if "://" in str(path):
            self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options=storage_options)
            return
        with atomic_write(path, "checkpoint") as partial:
            self.checkpoint_io.save_checkpoint(checkpoint, str(partial), storage_options=storage_options)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint.

        Args:
            path: Its path.
            args: Passed on.
            kwargs: Passed on.

        Returns:
            The checkpoint.

        Raises:
            ValueError: If the file is damaged, or holds what ``weights_only=True`` does not allow; names the path and the
                remedy.
        """
        with read_as_data(path, remedy=TRUSTED):
            checkpoint: dict[str, Any] = self.checkpoint_io.load_checkpoint(path, *args, **kwargs)
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint."""
        self.checkpoint_io.remove_checkpoint(path)


def use_atomic_checkpoints(trainer: Any) -> None:
    """Replace Lightning's own CheckpointIO of a Trainer by :class:`AtomicCheckpointIO`; leave any other in place."""
    strategy = trainer.strategy
    # By name, because pytorch_lightning and lightning each have a class of this name.
    if type(strategy.checkpoint_io).__name__ == "TorchCheckpointIO":
        strategy.checkpoint_io = AtomicCheckpointIO(strategy.checkpoint_io)


def explain_write_error(trainer: Any, error: BaseException) -> None:
    """Add notes to a write error: which folder of the run it comes from, and the checkpoint to resume from.

    Loggers raise the system's message, often without a path.
    """
    if not is_write_error(error):
        return
    callbacks = [callback for callback in trainer.checkpoint_callbacks if getattr(callback, "dirpath", None)]
    if not is_explained(error):
        folders = [logger.log_dir or logger.save_dir for logger in trainer.loggers]
        folders += [callback.dirpath for callback in callbacks] + [trainer.default_root_dir]
        for folder in dict.fromkeys(str(folder) for folder in folders if folder):
            if (message := write_obstacle(folder)) is not None:
                error.add_note(message)
    paths = {
        Path(path)
        for callback in callbacks
        for path in (getattr(callback, "best_model_path", ""), getattr(callback, "last_model_path", ""))
        if path
    }
    complete = max((path for path in paths if path.is_file()), key=lambda path: path.stat().st_mtime, default=None)
    if complete is not None:
        error.add_note(f"The last checkpoint is complete: resume with ckpt_path={str(complete)!r}.")


def _register_with_lightning() -> None:
    """Let Trainers of ``lightning``, which check plugins against a class of their own, accept ours."""
    fabric = sys.modules.get("lightning.fabric.plugins")
    if fabric is not None:
        fabric.CheckpointIO.register(AtomicCheckpointIO)
