"""Averages of weights that trainers keep beside the weights, and hand back instead of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WeightAverage:
    """The average of weights that a LightningModule or a callback keeps.

    Attributes:
        name: Name of what keeps it, for messages.
        copies: Returns for each weight: the weight, its average, and whatever else is kept of it.
    """

    name: str
    copies: Callable[[], Sequence[tuple[Tensor, ...]]]

    @torch.no_grad()
    def adopt(self) -> None:
        """Set the weights to their averages."""
        for weight, average, *others in self.copies():
            for each in (weight, *others):
                each.copy_(average)

    @torch.no_grad()
    def follow(self) -> None:
        """Set the averages to the weights."""
        for weight, *others in self.copies():
            for each in others:
                each.copy_(weight)
