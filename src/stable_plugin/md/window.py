"""The result of one simulated window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stable_plugin.md.state import State

NEVER = -1
"""Step index of an event that has not happened."""


@dataclass(frozen=True, repr=False)
class Window:
    """The result of one simulated window.

    Attributes:
        positions: Recorded frames, (n_frames, n_replicas, n_atoms, 3) in Å.
        velocities: Velocities of the same frames, in Å per ASE time.
        cell: Cells of the same frames, (n_frames, n_replicas, 3, 3) in Å; None if all are that of the system.
        valid: Whether a frame is finite and within the discard limit, (n_frames, n_replicas).
        unstable_step: First step at which the replica was flagged as unstable, (n_replicas,); ``NEVER`` if it was not,
            zero if it was not finite at the start.
        stopped: Whether the replica passed the discard limit, became non-finite or was not active, (n_replicas,).
        start: State at the beginning.
        end: State at the end; a stopped replica stays where it was last finite.
        n_steps: Number of steps.
        timestep_fs: Timestep in fs.
    """

    positions: Tensor
    velocities: Tensor
    cell: Tensor | None
    valid: Tensor
    unstable_step: Tensor
    stopped: Tensor
    start: State
    end: State
    n_steps: int
    timestep_fs: float

    def __repr__(self) -> str:
        n_frames, n_replicas, n_atoms, _ = self.positions.shape
        return (
            f"Window(n_frames={n_frames}, n_replicas={n_replicas}, n_atoms={n_atoms}, n_steps={self.n_steps}, "
            f"timestep_fs={self.timestep_fs}, unstable_fraction={self.unstable_fraction:g})"
        )

    @property
    def unstable(self) -> Tensor:
        """Whether each replica was flagged, (n_replicas,)."""
        return self.unstable_step != NEVER

    @property
    def unstable_fraction(self) -> float:
        """Fraction of the replicas that were flagged."""
        return self.unstable.double().mean().item()

    @property
    def duration_ps(self) -> float:
        """Simulated time per replica in ps."""
        return self.n_steps * self.timestep_fs / 1000.0

    def every(self, stride: int) -> Window:
        """Return the window with every ``stride``-th of its frames.

        Args:
            stride: One keeps all.
        """
        kept = slice(stride - 1, None, stride)
        cell = None if self.cell is None else self.cell[kept]
        return replace(
            self, positions=self.positions[kept], velocities=self.velocities[kept], cell=cell, valid=self.valid[kept]
        )

    def frames(self) -> Tensor:
        """Return the valid frames of all replicas as one sample, (n_valid, n_atoms, 3) in Å."""
        return self.positions[self.valid]

    def frame_cells(self) -> Tensor | None:
        """Return the cells of :meth:`frames`, (n_valid, 3, 3) in Å, or None if all are that of the system."""
        return None if self.cell is None else self.cell[self.valid]


Recorded = tuple[Tensor, Tensor, Tensor, Tensor]
"""Positions, velocities, cells and validity of one recorded frame."""


def stack_frames(frames: Sequence[Recorded], start: State) -> Recorded:
    """Stack recorded frames as :class:`Window` holds them; there may be none."""
    if not frames:
        empty = start.positions.new_empty(0, *start.positions.shape)
        valid = torch.empty(0, start.n_replicas, dtype=torch.bool, device=empty.device)
        return empty, empty, start.cell.new_empty(0, *start.cell.shape), valid
    positions, velocities, cell, valid = (torch.stack(each) for each in zip(*frames, strict=True))
    return positions, velocities, cell, valid
