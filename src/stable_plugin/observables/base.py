"""What a potential should reproduce: per-frame values, their mean, and the target for it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from stable_plugin.md.system import System


class Observable(Metric):
    """A vector-valued observable as a :class:`torchmetrics.Metric`: ``update`` with frames, ``compute`` the mean.

    A subclass gives :meth:`per_frame`, and :meth:`bind` if it needs to know the system.

    Args:
        target: Mean that the potential should reproduce, (n_values,); taken from the reference frames if not given.
        kwargs: Passed to :class:`torchmetrics.Metric`.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None
    total: Tensor
    count: Tensor
    squares: Tensor
    blocks: Tensor

    def __init__(self, target: Sequence[float] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._given_target = None if target is None else torch.as_tensor(target, dtype=torch.float64)
        self.target: Tensor | None = None
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        # Of the blocks' means, each weighed by its frames; and how many blocks.
        self.add_state("squares", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("blocks", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @property
    def name(self) -> str:
        """Name in logs and reports."""
        return snake_case(type(self).__name__)

    def bind(self, system: System, reference: Tensor) -> None:
        """Take what is needed from the system, and the target from reference frames.

        Args:
            system: What is simulated.
            reference: (n_frames, n_atoms, 3) in Å.

        Raises:
            ValueError: If a target was given and has another length.
        """
        from_reference = self.per_frame(reference).double().mean(dim=0)
        if self._given_target is not None and self._given_target.shape != from_reference.shape:
            raise ValueError(
                f"target of {type(self).__name__} has shape {tuple(self._given_target.shape)}, but the observable has "
                f"{tuple(from_reference.shape)}: give one number per value."
            )
        self.target = from_reference if self._given_target is None else self._given_target.to(from_reference.device)

    @abstractmethod
    def per_frame(self, positions: Tensor) -> Tensor:
        """The observable of each frame.

        Args:
            positions: (n_frames, n_atoms, 3) in Å.

        Returns:
            (n_frames, n_values).
        """

    def update(self, positions: Tensor) -> None:
        """Add a block of frames, (n_frames, n_atoms, 3) in Å.

        Frames of one block may depend on each other, blocks should not, for :meth:`standard_error` to be right: give a
        stretch of one replica at a time, longer than its memory.
        """
        if len(positions) == 0:
            return
        total = self.per_frame(positions).double().sum(dim=0)
        self.total = self.total + total
        self.count = self.count + len(positions)
        self.squares = self.squares + total.square() / len(positions)
        self.blocks = self.blocks + 1

    def compute(self) -> Tensor:
        """Mean over all frames seen, (n_values,); torchmetrics gives a single value without its axis, ()."""
        return self.total / self.count

    def standard_error(self) -> Tensor:
        """Standard error of :meth:`compute` from the spread of the blocks' means; NaN with fewer than two blocks.

        Source: block averaging, Flyvbjerg and Petersen, J. Chem. Phys. 91, 461 (1989), with blocks of given length.
        """
        spread = (self.squares / self.count - (self.total / self.count).square()).clamp_min(0.0)
        return (spread / (self.blocks - 1)).sqrt() if self.blocks > 1 else torch.full_like(spread, torch.nan)

    @property
    def known_target(self) -> Tensor:
        """The target, (n_values,).

        Raises:
            RuntimeError: If none is bound yet.
        """
        if self.target is None:
            raise RuntimeError(f"{type(self).__name__} has no target yet: call bind(system, reference) first.")
        return self.target

    def mean_absolute_error(self) -> float:
        """Mean over the values of the absolute difference between mean and target."""
        return (self.compute() - self.known_target.to(self.total.device)).abs().mean().item()

    def axis(self) -> dict[str, Any]:
        """How to draw the values: ``kind`` (bars or curve), ``x``, ``xlabel`` and ``ylabel``."""
        n_values = 0 if self.target is None else len(self.target)
        return {"kind": "bars", "x": list(range(n_values)), "xlabel": "value", "ylabel": self.name}


def snake_case(name: str) -> str:
    """``BondLengths`` as ``bond_lengths``."""
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")


def smeared_histogram(values: Tensor, centres: Tensor, width: float) -> Tensor:
    """Gaussian-smeared counts per frame.

    Args:
        values: (n_frames, n_samples).
        centres: Evenly spaced bin centres, (n_bins,).
        width: Standard deviation of the Gaussian, in the units of ``values``.

    Returns:
        (n_frames, n_bins); each sample adds to each bin the share of its Gaussian that lies in it, one in all.
    """
    rows = torch.arange(len(values), device=values.device)[:, None].expand_as(values)
    return smeared_counts(values.flatten(), rows.flatten(), len(values), centres, width)


def smeared_counts(values: Tensor, rows: Tensor, n_rows: int, centres: Tensor, width: float) -> Tensor:
    """Gaussian-smeared counts of rows of any number of samples.

    Args:
        values: (n_samples,).
        rows: Row that each sample counts in, (n_samples,).
        n_rows: Number of rows.
        centres: Evenly spaced bin centres, (n_bins,).
        width: Standard deviation of the Gaussian, in the units of ``values``.

    Returns:
        (n_rows, n_bins), as of :func:`smeared_histogram`.
    """
    spacing = centres[1] - centres[0]
    n_bins = len(centres)
    # Five standard deviations hold all but 6e-7 of the Gaussian, and few bins of the many.
    reach = int(torch.ceil(torch.as_tensor(5.0 * width) / spacing)) + 1
    nearest = ((values - centres[0]) / spacing).round()
    bins = nearest[:, None] + torch.arange(-reach, reach + 1, device=values.device)
    edges = torch.cat([bins - 0.5, bins[:, -1:] + 0.5], dim=1)
    distance = centres[0] + edges * spacing - values[:, None]
    weight = 0.5 * torch.erf(distance / (width * 2.0**0.5)).diff(dim=1)
    inside = (bins >= 0) & (bins < n_bins)
    place = rows[:, None] * n_bins + bins.clamp(0, n_bins - 1).long()
    counts = values.new_zeros(n_rows * n_bins)
    return counts.index_add(0, place[inside], weight[inside]).reshape(n_rows, n_bins)
