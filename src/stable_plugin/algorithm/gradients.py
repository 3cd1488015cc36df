"""How the observable's gradient joins that of the user's own loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stable_plugin.runtime import checks

Weight = float | Literal["auto"]


class ObservableWeight:
    """The factor of the observable's gradient.

    The norms of the two gradients differ by orders of magnitude between systems and over a run, so ``auto`` makes the
    observable's gradient ``ratio`` times as long as the other. It does so once per window, on the frames as simulated:
    while their reweighting makes the broken ones fade, their pull fades too, instead of being blown up again. A bound
    lets it fade near the target, where it is mostly noise.

    Args:
        weight: A fixed factor, or ``auto``.
        ratio: Length of the observable's gradient relative to the other.
        largest: Bound of the automatic factor relative to the first one of the run.
    """

    def __init__(self, weight: Weight = "auto", ratio: float = 15.0, largest: float = 150.0) -> None:
        if weight != "auto":
            checks.number("observable_weight", weight, at_least=0, hint="Or 'auto'.")
        self.weight = weight
        self.ratio = checks.number("gradient_ratio", ratio, above=0)
        self.largest = checks.number("largest_weight", largest, above=0)
        self.first: float | None = None
        self.latest = 1.0

    def __call__(self, observable: Sequence[Tensor], other: Sequence[Tensor], *, new_window: bool) -> float:
        """The factor for a pair of gradients.

        Args:
            observable: Gradient of the observables' loss.
            other: Gradient of the user's loss.
            new_window: Whether the frames have just been simulated.
        """
        if self.weight != "auto":
            return float(self.weight)
        pull, rest = norm(observable), norm(other)
        if new_window and pull > 0.0 and rest > 0.0:
            factor = self.ratio * rest / pull
            self.first = factor if self.first is None else self.first
            self.latest = min(factor, self.largest * self.first)
        return self.latest

    def state_dict(self) -> dict[str, float | None]:
        """What a resumed run needs."""
        return {"first": self.first, "latest": self.latest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave."""
        self.first, self.latest = state["first"], state["latest"]


def norm(tensors: Sequence[Tensor]) -> float:
    """Euclidean norm of all tensors together."""
    if not tensors:
        return 0.0
    norms = torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensors])
    return float(torch.linalg.vector_norm(norms))


def add_gradients(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor], factor: float) -> None:
    """Add ``factor`` times the gradients to those that the parameters hold."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        extra = factor * gradient.to(parameter.dtype)
        parameter.grad = extra if parameter.grad is None else parameter.grad + extra


class TemporaryLearningRate:
    """Another learning rate for single optimizer steps; the schedulers never see it."""

    def __init__(self) -> None:
        self._before: list[float] | None = None

    def set(self, optimizer: torch.optim.Optimizer, learning_rate: float | None, factor: float) -> float:
        """Set the learning rate of the next step.

        Args:
            optimizer: Whose.
            learning_rate: The rate, or None for the optimizer's own.
            factor: What it is multiplied with.

        Returns:
            The rate of the first parameter group.

        Raises:
            ValueError: If the optimizer's own rate is zero and no other is given.
        """
        own = [group["lr"] for group in optimizer.param_groups]
        if learning_rate is None and not any(own):
            raise ValueError(
                "the optimizer's learning rate is zero, so the potential cannot be repaired: its schedule has ended. Give "
                "StABlECallback(learning_rate=...), for instance a tenth to a half of the one that training began with."
            )
        self._before = own
        for group in optimizer.param_groups:
            group["lr"] = factor * (group["lr"] if learning_rate is None else learning_rate)
        return float(optimizer.param_groups[0]["lr"])

    def give_back(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the optimizer's own rates back."""
        if self._before is not None:
            for group, before in zip(optimizer.param_groups, self._before, strict=True):
                group["lr"] = before
            self._before = None
