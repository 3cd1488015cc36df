"""The processes that train one potential together, each with replicas of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")

SEED_STRIDE = 1_000_003
"""Distance of the seeds of two processes; larger than the distance of seeds that users choose."""


@dataclass(frozen=True)
class DistributedContext:
    """Reductions over the processes of a distributed run.

    Every process calls the same methods in the same order, also one that has nothing to contribute. All get the same
    numbers, to the last bit, so that decisions based on them agree.

    Args:
        rank: Index of this process, from zero.
        size: Number of processes.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> DistributedContext:
        """Return the context of the initialized process group, or of a single process if there is none."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all processes of tensors of one shape."""
        return self._reduced(tensor, distributed.ReduceOp.SUM)

    def max(self, tensor: Tensor) -> Tensor:
        """Return the elementwise maximum over all processes."""
        return self._reduced(tensor, distributed.ReduceOp.MAX)

    def count(self, number: int, device: torch.device) -> int:
        """Return the sum of an integer over all processes."""
        return number if self.size == 1 else int(self.sum(torch.tensor(number, device=device)))

    def sum_all(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the sums of several tensors of one dtype, in a single exchange."""
        if self.size == 1 or not tensors:
            return list(tensors)
        summed = self.sum(torch.cat([tensor.flatten() for tensor in tensors]))
        parts = summed.split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]

    def gather(self, item: T) -> list[T]:
        """Return the items of all processes, ordered by rank."""
        if self.size == 1:
            return [item]
        items: list[T | None] = [None] * self.size
        distributed.all_gather_object(items, item)
        return items  # type: ignore[return-value]

    @property
    def suffix(self) -> str:
        """Suffix for names of files that every process writes."""
        return "" if self.size == 1 else f"_{self.rank}"

    def seed(self, seed: int) -> int:
        """Return the seed of this process."""
        return seed + SEED_STRIDE * self.rank

    def _reduced(self, tensor: Tensor, operation: distributed.ReduceOp.RedOpType) -> Tensor:
        if self.size == 1:
            return tensor
        result = tensor.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(result, operation)
        return result
