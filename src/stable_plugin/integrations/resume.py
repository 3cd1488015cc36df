"""Where a run continues after an interruption: the remaining batches of the epoch, and the global random streams."""

from __future__ import annotations

from typing import Any

from stable_plugin.runtime.random_state import random_state, restore_random_state


class ResumePoint:
    """The point between two optimizer steps that a checkpoint returns to.

    Attributes:
        batches: What the trainer's adapter needs to continue in the middle of an epoch, with the global random streams
            under ``start`` that the epoch began with; empty between two epochs.
    """

    def __init__(self) -> None:
        self.batches: dict[str, Any] = {}
        self._loaded: dict[str, Any] = {}
        self._marked: dict[str, Any] | None = None

    def mark(self) -> None:
        """Return to the present random streams if the next step is interrupted."""
        self._marked = random_state()

    def mark_at(self, random: dict[str, Any]) -> None:
        """Return to the given random streams."""
        self._marked = random

    def unmark(self) -> None:
        """Save the random streams as they are whenever a checkpoint is written."""
        self._marked = None

    def restore(self) -> None:
        """Restore the global random streams of the loaded checkpoint."""
        restore_random_state(self._loaded)

    def state_dict(self) -> dict[str, Any]:
        """Return the random streams and batches to continue with."""
        return {"random": self._marked or random_state(), "batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, and restore the random streams at once.

        Trainers draw the order of the first batches before their hooks for the start of training. A run that continues in
        the middle of an epoch needs the order of that epoch's batches first.
        """
        self.batches = state["batches"]
        self._loaded = self.batches.get("start", state["random"])
        self.restore()
