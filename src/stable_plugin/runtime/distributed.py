"""The processes that train one potential together, each with replicas of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")

SEED_STRIDE = 1_000_003
"""Between the seeds of two processes, more than anybody's seeds are apart."""


@dataclass(frozen=True)
class DistributedContext:
    """What this process needs of the others: sums, largest values, and whatever they have to show.

    Every process calls the same methods in the same order, also one that has nothing to add. All get the same numbers, to
    the last bit, so that decisions taken on them are the same everywhere.

    Args:
        rank: Which of them this one is, from zero.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def present(cls) -> DistributedContext:
        """Those that a launcher has started and connected; this one alone if none has."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of everybody's tensors, of one shape."""
        return self._reduced(tensor, distributed.ReduceOp.SUM)

    def max(self, tensor: Tensor) -> Tensor:
        """The largest of everybody's, value by value."""
        return self._reduced(tensor, distributed.ReduceOp.MAX)

    def count(self, number: int, device: torch.device) -> int:
        """The sum of everybody's numbers."""
        return number if self.size == 1 else int(self.sum(torch.tensor(number, device=device)))

    def sum_all(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums of everybody's tensors, one by one, in a single exchange; they are of one dtype."""
        if self.size == 1 or not tensors:
            return list(tensors)
        summed = self.sum(torch.cat([tensor.flatten() for tensor in tensors]))
        parts = summed.split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]

    def gather(self, item: T) -> list[T]:
        """Everybody's item, by rank."""
        if self.size == 1:
            return [item]
        items: list[T | None] = [None] * self.size
        distributed.all_gather_object(items, item)
        return items  # type: ignore[return-value]

    @property
    def suffix(self) -> str:
        """Tells the files of a process from those of the others."""
        return "" if self.size == 1 else f"_{self.rank}"

    def seed(self, seed: int) -> int:
        """A seed of this process's own."""
        return seed + SEED_STRIDE * self.rank

    def _reduced(self, tensor: Tensor, operation: distributed.ReduceOp.RedOpType) -> Tensor:
        if self.size == 1:
            return tensor
        result = tensor.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(result, operation)
        return result
