"""Checkpoints that are there whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_fabric.plugins import CheckpointIO

from stable_plugin.runtime.atomic_files import atomic_write, is_explained, is_write_error, write_obstacle
from stable_plugin.runtime.serialization import read_as_data


class AtomicCheckpointIO(CheckpointIO):
    """Writes beside the place of a checkpoint and renames, with whatever writes it.

    Lightning itself writes to the folder for temporary files and moves. Where that is another file system the move is a copy,
    and a process that is killed meanwhile leaves half a checkpoint where a whole one was.

    Args:
        io: What writes and reads.
    """

    def __init__(self, io: Any) -> None:
        self.io = io

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Save, and rename once it is whole; addresses of remote stores are passed on as they are.

        Raises:
            OSError: If it cannot be written; names the path and the way out.
        """
        if "://" in str(path):
            self.io.save_checkpoint(checkpoint, path, storage_options=storage_options)
            return
        with atomic_write(path, "checkpoint") as partial:
            self.io.save_checkpoint(checkpoint, str(partial), storage_options=storage_options)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As the other one does.

        Raises:
            ValueError: If it is damaged, or not made of what it may be made of; names the path and the way out.
        """
        with read_as_data(path):
            checkpoint: dict[str, Any] = self.io.load_checkpoint(path, *args, **kwargs)
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        """As the other one does."""
        self.io.remove_checkpoint(path)


def use_atomic_checkpoints(trainer: Any) -> None:
    """Have a Trainer that writes checkpoints Lightning's plain way write them whole or not at all."""
    strategy = trainer.strategy
    # The two Lightnings each have a class of this name.
    if type(strategy.checkpoint_io).__name__ == "TorchCheckpointIO":
        strategy.checkpoint_io = AtomicCheckpointIO(strategy.checkpoint_io)


def add_way_out(trainer: Any, error: BaseException) -> None:
    """Tell an error of writing which of the run's folders it comes from, and how to go on.

    Loggers raise what the system says, often without a path.
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
    paths = {path for callback in callbacks for path in (callback.best_model_path, callback.last_model_path) if path}
    whole = max(
        (path for path in map(Path, paths) if path.is_file()), key=lambda path: path.stat().st_mtime, default=None
    )
    if whole is not None:
        error.add_note(f"The last checkpoint is whole. Go on with ckpt_path={str(whole)!r}.")
