"""Frames near failures, kept over all windows of a run."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

MAX_BYTES = 2**28
"""Memory of the positions in a buffer."""


@dataclass(frozen=True)
class NearFailures:
    """Frames near or beyond a failure, and how high their energies should be.

    Attributes:
        positions: (n_frames, n_atoms, 3) in Å.
        margin: Smallest energy above that of the reference, (n_frames,) in units of kT.
        atoms: Atoms whose energies count, (n_frames, n_atoms).
        cell: Cells of the frames, (n_frames, 3, 3) in Å; None if all are that of the system.
    """

    positions: Tensor
    margin: Tensor
    atoms: Tensor
    cell: Tensor | None = None

    def __len__(self) -> int:
        return len(self.positions)

    def select(self, index: Tensor) -> NearFailures:
        """Return some of the frames.

        Args:
            index: Their numbers, (n_selected,), or a mask, (n_frames,).
        """
        return replace(self, **{name: value[index] for name, value in self._tensors().items()})

    def to(self, device: torch.device) -> NearFailures:
        """Return the frames on a device."""
        return replace(self, **{name: value.to(device) for name, value in self._tensors().items()})

    def joined(self, other: NearFailures) -> NearFailures:
        """Return these frames and others, which come last."""
        own, more = self._tensors(), other._tensors()
        return replace(self, **{name: torch.cat([own[name], more[name].to(own[name])]) for name in own})

    def _tensors(self) -> dict[str, Tensor]:
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


class FrameBuffer:
    """Frames near failures of all windows so far, on the CPU; when it is full, frames drawn at random make room.

    A failure that has become rare is not seen in most windows. Without its frames, the next steps could bring it back.

    Args:
        max_bytes: Memory of the positions.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self._frames: NearFailures | None = None

    def __len__(self) -> int:
        return 0 if self._frames is None else len(self._frames)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(<{len(self)} frames>, max_bytes={self.max_bytes})"

    def add(self, frames: NearFailures, generator: torch.Generator) -> None:
        """Add frames.

        Args:
            frames: The frames.
            generator: Random stream that draws the frames that are dropped.
        """
        frames = frames.to(torch.device("cpu"))
        self._frames = frames if self._frames is None else self._frames.joined(frames)
        positions = self._frames.positions
        most = max(1, self.max_bytes // (positions[0].numel() * positions.element_size() or 1)) if len(positions) else 1
        if len(positions) > most:
            kept = torch.randperm(len(positions), generator=generator)[:most].sort().values
            self._frames = self._frames.select(kept)

    def draw(self, number: int, generator: torch.Generator) -> NearFailures | None:
        """Return frames drawn at random without repetition, all if there are fewer; None if there are none.

        Args:
            number: Number of frames.
            generator: Random stream.
        """
        if self._frames is None or len(self) == 0:
            return None
        return self._frames.select(torch.randperm(len(self), generator=generator)[:number])

    def state_dict(self) -> dict[str, Tensor] | None:
        """Return the frames as plain data for a checkpoint; None if there are none."""
        return None if self._frames is None else self._frames._tensors()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._frames = None if state is None else NearFailures(**state).to(torch.device("cpu"))
