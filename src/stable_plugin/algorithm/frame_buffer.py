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
    """Frames near or beyond a failure, and how high the energies of what fails should be.

    In a frame of a liquid several molecules may be near failures, each of its own.

    Attributes:
        positions: (n_frames, n_atoms, 3) in Å.
        frame: Number of the frame that each failure is in, (n_failures,).
        margin: Smallest energy of each failure above that of the reference, (n_failures,) in units of kT.
        atoms: Atoms whose energies count, (n_failures, n_atoms).
        cell: Cells of the frames, (n_frames, 3, 3) in Å; None if all are that of the system.
    """

    positions: Tensor
    frame: Tensor
    margin: Tensor
    atoms: Tensor
    cell: Tensor | None = None

    def __len__(self) -> int:
        return len(self.positions)

    def select(self, index: Tensor) -> NearFailures:
        """Return some of the frames.

        Args:
            index: Their numbers, (n_selected,), none of them twice, or a mask, (n_frames,).
        """
        place = torch.full((len(self),), -1, device=self.frame.device)
        place[index] = torch.arange(len(self.positions[index]), device=place.device)
        frame = place[self.frame]
        kept = frame >= 0
        return replace(
            self,
            positions=self.positions[index],
            frame=frame[kept],
            margin=self.margin[kept],
            atoms=self.atoms[kept],
            cell=None if self.cell is None else self.cell[index],
        )

    def to(self, device: torch.device) -> NearFailures:
        """Return the frames on a device."""
        return replace(self, **{name: value.to(device) for name, value in self._tensors().items()})

    def joined(self, other: NearFailures) -> NearFailures:
        """Return these frames and others, which come last."""
        own, more = self._tensors(), other._tensors()
        more["frame"] = more["frame"] + len(self)
        return replace(self, **{name: torch.cat([own[name], more[name].to(own[name])]) for name in own})

    def sums(self, values: Tensor) -> Tensor:
        """Return the sum of a quantity over the failures of each frame, (n_frames, ...).

        Args:
            values: Quantity of each failure, (n_failures, ...).
        """
        return values.new_zeros(len(self), *values.shape[1:]).index_add(0, self.frame, values)

    def _tensors(self) -> dict[str, Tensor]:
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


class FrameBuffer:
    """Frames near failures of all windows so far, on the CPU; when it is full, frames drawn at random make room.

    A failure that has become rare is not seen in most windows. Without its frames, the next steps could bring it back.
    Half of each draw is in proportion to how far frames fell short of their margins when they were used last, and to the whole
    margin of new ones: most others exert no pull, and one weak bond among many is not drowned by frames that lack little.
    Source: proportional prioritization, T. Schaul et al., ICLR 2016, arXiv:1511.05952.

    Args:
        max_bytes: Memory of the positions.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self._frames: NearFailures | None = None
        self._shortfall = torch.empty(0, dtype=torch.float64)
        self._drawn = torch.empty(0, dtype=torch.long)

    def __len__(self) -> int:
        return len(self._shortfall)

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
        self._shortfall = torch.cat([self._shortfall, frames.sums(frames.margin.double())])
        most = max(1, self.max_bytes // (frames.positions.shape[1:].numel() * frames.positions.element_size()))
        if len(self) > most:
            kept = torch.randperm(len(self), generator=generator)[:most].sort().values
            self._frames, self._shortfall = self._frames.select(kept), self._shortfall[kept]

    def draw(self, number: int, generator: torch.Generator) -> NearFailures | None:
        """Return different frames drawn at random, up to half of them by how far they fall short; None if there are none.

        Args:
            number: Number of frames; all are taken if there are fewer.
            generator: Random stream.
        """
        if self._frames is None or len(self) == 0:
            return None
        order = torch.randperm(len(self), generator=generator)
        n_short = min(self.n_short, (number + 1) // 2)
        first = order[:0]
        if n_short:
            first = torch.multinomial(self._shortfall, n_short, generator=generator)
        taken = torch.zeros(len(self), dtype=torch.bool)
        taken[first] = True
        self._drawn = torch.cat([first, order[~taken[order]][: number - len(first)]])
        return self._frames.select(self._drawn)

    def update(self, shortfall: Tensor) -> None:
        """Note how far the frames of the latest draw fall short of their margins.

        Args:
            shortfall: Sum over the failures of each, (n_drawn,) in kT, zero for those that do not.
        """
        self._shortfall[self._drawn] = shortfall.double().cpu()

    @property
    def n_short(self) -> int:
        """Number of frames that fall short of their margins, or have not been used yet."""
        return int((self._shortfall > 0.0).sum())

    def state_dict(self) -> dict[str, Any]:
        """Return the frames as plain data for a checkpoint."""
        frames = None if self._frames is None else self._frames._tensors()
        return {"frames": frames, "shortfall": self._shortfall.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        cpu, frames = torch.device("cpu"), state["frames"]
        self._frames = None if frames is None else NearFailures(**frames).to(cpu)
        self._shortfall = state["shortfall"].to(cpu).clone()
        self._drawn = self._drawn[:0]
