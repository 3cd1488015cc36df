"""An optimizer for a few parameters with noisy gradients: steps of one length along the gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from stable_plugin.algorithm.gradients import norm
from stable_plugin.runtime import checks


class NormalizedDescent(torch.optim.Optimizer):
    """Gradient descent with steps of one length, along an average of the gradients.

    Adam moves every parameter by about the learning rate, also one whose gradient is noise. Here parameters move in proportion to
    their gradients, so that those on which the loss hardly depends keep their values.

    Args:
        params: Parameters, or groups of them. Each group has steps of its own length.
        lr: Root mean square of the changes of the parameters in a step, in their unit.
        momentum: Weight of earlier gradients in the average, from 0 to 0.99.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, params: Iterable[Any], lr: float, momentum: float = 0.5) -> None:
        checks.number("lr", lr, at_least=0)
        checks.number("momentum", momentum, at_least=0, at_most=0.99)
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step.

        Args:
            closure: Returns the loss after it has computed the gradients.

        Returns:
            The loss, or None without a closure.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [each for each in group["params"] if each.grad is not None]
            averages = [self._average(parameter, parameter.grad, group["momentum"]) for parameter in parameters]
            length = norm(averages)
            if length > 0:
                n_numbers = sum(parameter.numel() for parameter in parameters)
                for parameter, average in zip(parameters, averages, strict=True):
                    parameter.add_(average, alpha=-group["lr"] * sqrt(n_numbers) / length)
        return loss

    def _average(self, parameter: Tensor, gradient: Tensor, momentum: float) -> Tensor:
        average: Tensor = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
        return average.lerp_(gradient, 1.0 - momentum)
