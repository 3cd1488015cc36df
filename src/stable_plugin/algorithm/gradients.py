"""How the observable's gradient joins the gradient of the user's own loss."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from math import isfinite
from typing import Any, Literal

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

MAX_WEIGHT_RATIO = 150.0
"""Bound of the automatic weight relative to the first one of the run."""

MARGIN_FRACTION = 0.3
"""Factor of the margin relative to the user's loss, with the automatic weight."""

SMALLEST_LOSS = 1e-4
"""A user's loss that says nothing about the scale of the labels' errors, in the unit of any usual loss."""


class ObservableWeight:
    """Factor of the observable's gradient.

    The norms of the two gradients differ by orders of magnitude between systems and over a run, so ``auto`` makes the
    observable's gradient ``ratio`` times as long as the other. It does so once per window, on the frames as simulated:
    while reweighting makes the broken frames fade, their gradient fades too, instead of being amplified again. A bound lets
    it fade near the target, where it is mostly noise.

    Args:
        weight: A fixed factor, or ``auto``.
        ratio: Length of the observable's gradient relative to the other.
        max_ratio: Bound of the automatic factor relative to the first one of the run.
    """

    def __init__(
        self, weight: float | Literal["auto"] = "auto", ratio: float = 15.0, max_ratio: float = MAX_WEIGHT_RATIO
    ) -> None:
        self.weight = weight
        self.ratio = ratio
        self.max_ratio = max_ratio
        self.first: float | None = None
        self.latest = 1.0

    def __repr__(self) -> str:
        return f"{type(self).__name__}(weight={self.weight!r}, ratio={self.ratio:g}, max_ratio={self.max_ratio:g})"

    def __call__(self, observable: Sequence[Tensor], other: Sequence[Tensor], *, new_window: bool) -> float:
        """Return the factor for a pair of gradients.

        Args:
            observable: Gradient of the observables' loss.
            other: Gradient of the user's loss.
            new_window: Whether the frames have just been simulated.
        """
        if self.weight != "auto":
            return float(self.weight)
        observable_norm, other_norm = norm(observable), norm(other)
        if new_window and observable_norm > 0.0 and other_norm > 0.0:
            factor = self.ratio * other_norm / observable_norm
            self.first = factor if self.first is None else self.first
            self.latest = min(factor, self.max_ratio * self.first)
        return self.latest

    def state_dict(self) -> dict[str, float | None]:
        """Return what a resumed run needs."""
        return {"first": self.first, "latest": self.latest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.first, self.latest = state["first"], state["latest"]


class MarginWeight:
    """Factor of the margin's gradient.

    The loss of the margin is in kT, that of the user in any unit. ``auto`` takes :data:`MARGIN_FRACTION` of the user's loss,
    averaged over the steps so far: that much more of it is worth one unit of the margin's loss.

    Args:
        weight: A fixed factor, or ``auto``.
    """

    def __init__(self, weight: float | Literal["auto"] = "auto") -> None:
        self.weight = weight
        self._sum, self._n_steps = 0.0, 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}(weight={self.weight!r})"

    def __call__(self, users_loss: float | None) -> float:
        """Return the factor for the next step.

        Args:
            users_loss: The user's loss in this step; None if it is not known yet.
        """
        if self.weight != "auto":
            return float(self.weight)
        if users_loss is not None and isfinite(users_loss):
            self._sum, self._n_steps = self._sum + users_loss, self._n_steps + 1
            if self._n_steps == 1 and abs(users_loss) < SMALLEST_LOSS:
                log.warning(
                    "margin_weight='auto' is %g times your loss, which is %.2g: failures have next to no weight. Pass a number, "
                    "for instance margin_weight=1 with labels of the potential itself.",
                    MARGIN_FRACTION,
                    users_loss,
                )
        return MARGIN_FRACTION * self._sum / max(self._n_steps, 1)

    def state_dict(self) -> dict[str, float]:
        """Return what a resumed run needs."""
        return {"sum": self._sum, "n_steps": self._n_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._sum, self._n_steps = state["sum"], int(state["n_steps"])


def norm(tensors: Sequence[Tensor]) -> float:
    """Return the Euclidean norm of all tensors together."""
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
    """Sets another learning rate for single optimizer steps; schedulers never see it."""

    def __init__(self) -> None:
        self._own: list[float] | None = None

    def set(self, optimizer: torch.optim.Optimizer, learning_rate: float | None, factor: float) -> float:
        """Set the learning rate of the next step.

        Args:
            optimizer: The optimizer.
            learning_rate: The rate, or None for the optimizer's own.
            factor: Factor of the rate.

        Returns:
            The rate of the first parameter group.

        Raises:
            ValueError: If the optimizer's own rate is zero and no other is passed, or the step has begun already.
        """
        if self._own is not None:
            raise ValueError(
                f"{type(optimizer).__name__} evaluates the loss several times in one step, but a step on frames of a simulation "
                "has one gradient: use an optimizer such as Adam or SGD."
            )
        own = [group["lr"] for group in optimizer.param_groups]
        if learning_rate is None and not any(own):
            raise ValueError(
                "the optimizer's learning rate is zero because its schedule has ended, so its steps cannot repair the "
                "potential: set StABlECallback(learning_rate=...), for instance to a tenth or a half of the initial one."
            )
        self._own = own
        for group in optimizer.param_groups:
            group["lr"] = factor * (group["lr"] if learning_rate is None else learning_rate)
        return float(optimizer.param_groups[0]["lr"])

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        """Restore the optimizer's own rates."""
        if self._own is not None:
            for group, own in zip(optimizer.param_groups, self._own, strict=True):
                group["lr"] = own
            self._own = None
