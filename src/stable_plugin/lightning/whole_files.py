"""Checkpoints that are there whole or not at all."""

from __future__ import annotations

import os
from typing import Any

from lightning_fabric.plugins import CheckpointIO


class WholeFiles(CheckpointIO):
    """Writes beside the place of a checkpoint and renames, with whatever writes it.

    Lightning itself writes to the folder for temporary files and moves. Where that is another file system the move is a copy,
    and a process that is killed meanwhile leaves half a checkpoint where a whole one was.

    Args:
        io: What writes and reads.
    """

    def __init__(self, io: Any) -> None:
        self.io = io

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Save, and rename once it is whole; addresses of remote stores are passed on as they are."""
        if "://" in str(path):
            self.io.save_checkpoint(checkpoint, path, storage_options=storage_options)
            return
        partial = f"{path}.partial"
        try:
            self.io.save_checkpoint(checkpoint, partial, storage_options=storage_options)
            os.replace(partial, path)
        except BaseException:
            if os.path.isfile(partial):
                os.remove(partial)
            raise

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As the other one does."""
        checkpoint: dict[str, Any] = self.io.load_checkpoint(path, *args, **kwargs)
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        """As the other one does."""
        self.io.remove_checkpoint(path)


def write_whole_files(trainer: Any) -> None:
    """Have a Trainer that writes checkpoints Lightning's plain way write them whole or not at all."""
    strategy = trainer.strategy
    # The two Lightnings each have a class of this name.
    if type(strategy.checkpoint_io).__name__ == "TorchCheckpointIO":
        strategy.checkpoint_io = WholeFiles(strategy.checkpoint_io)
