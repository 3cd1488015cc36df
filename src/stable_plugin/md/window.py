"""What one simulated window leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stable_plugin.md.state import State

NEVER = -1
"""Step index of something that has not happened."""


@dataclass(frozen=True)
class Window:
    """What one simulated window leaves behind.

    Attributes:
        positions: Recorded frames, (n_frames, n_replicas, n_atoms, 3) in Å.
        velocities: Of the same frames, in Å per ASE time.
        valid: Frames that are finite and within the discard limit, (n_frames, n_replicas).
        unstable_step: First step at which the replica was flagged, (n_replicas,); ``NEVER`` if it was not, zero if it
            was not finite to begin with.
        stopped: Replicas that went beyond the discard limit or became non-finite, (n_replicas,).
        start: State at the beginning.
        end: State at the end; a stopped replica rests where it was last finite.
        n_steps: Steps simulated.
        timestep_fs: Timestep in fs.
    """

    positions: Tensor
    velocities: Tensor
    valid: Tensor
    unstable_step: Tensor
    stopped: Tensor
    start: State
    end: State
    n_steps: int
    timestep_fs: float

    @property
    def unstable(self) -> Tensor:
        """Replicas that were flagged, (n_replicas,)."""
        return self.unstable_step != NEVER

    @property
    def unstable_fraction(self) -> float:
        """Share of the replicas that were flagged."""
        return self.unstable.double().mean().item()

    @property
    def duration_ps(self) -> float:
        """Simulated time per replica in ps."""
        return self.n_steps * self.timestep_fs / 1000.0

    def frames(self) -> Tensor:
        """The valid frames of all replicas in one sample, (n_valid, n_atoms, 3)."""
        return self.positions[self.valid]


def stack_frames(frames: Sequence[tuple[Tensor, Tensor, Tensor]], start: State) -> tuple[Tensor, Tensor, Tensor]:
    """Positions, velocities and validity of recorded frames as the tensors of a :class:`Window`, also if there are none."""
    if not frames:
        empty = start.positions.new_empty(0, *start.positions.shape)
        return empty, empty, torch.empty(0, start.n_replicas, dtype=torch.bool, device=empty.device)
    positions, velocities, valid = zip(*frames, strict=True)
    return torch.stack(positions), torch.stack(velocities), torch.stack(valid)
