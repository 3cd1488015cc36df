"""An optimizer for a few parameters with noisy gradients: steps of one length along the gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from stable_plugin.runtime import checks

DAMPING = 0.1
"""What is added to the weights, as a part of their mean: a parameter of little weight must not follow its noise."""


class NormalizedDescent(torch.optim.Optimizer):
    r"""Gradient descent with steps of one length, along an average of the gradients.

    .. math:: \Delta\theta_k = -\eta\, \frac{d_k}{\sqrt{\sum_j w_j d_j^2}}, \qquad d_k = \frac{\bar g_k}{w_k + \lambda}

    Adam moves every parameter by about the learning rate, also one whose gradient is noise. Here parameters move in proportion to
    their gradients, so that those on which the loss hardly depends keep their values. With weights from how much a parameter
    changes the energy of frames, a step is a change of the energy, and the direction is that of a natural gradient with a diagonal
    metric: S. Amari, Neural Comput. 10, 251 (1998).

    Args:
        params: Parameters.
        lr: Length of a step: the norm of the change, or what the weights make of it.
        momentum: Weight of earlier gradients in the average, from 0 to 0.99.
        weights: Weights :math:`w_k` of the squares of the changes by parameter, each in the shape of its parameter; one where a
            parameter is not in it.

    Raises:
        ValueError: If an argument is out of range, or weights do not have the shape of their parameter.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float = 0.5,
        weights: Mapping[Tensor, Tensor] | None = None,
    ) -> None:
        checks.number("lr", lr, at_least=0)
        checks.number("momentum", momentum, at_least=0, at_most=0.99)
        params = list(params)
        given = dict(weights or {})
        self.weights = [given.get(each, torch.ones_like(each)) for each in params]
        for parameter, weight in zip(params, self.weights, strict=True):
            if weight.shape != parameter.shape:
                raise ValueError(
                    f"weights of shape {tuple(weight.shape)} for a parameter of shape {tuple(parameter.shape)}: pass a weight "
                    "for each of its numbers."
                )
        super().__init__(params, {"lr": lr, "momentum": momentum})
        numbers = torch.cat([each.flatten() for each in given.values() or self.weights])
        self._damping = DAMPING * float(numbers.mean())

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
        (group,) = self.param_groups
        directions, square = [], 0.0
        for parameter, weight in zip(group["params"], self.weights, strict=True):
            average = self._average(parameter, group["momentum"])
            direction = average / (weight.to(average) + self._damping)
            square += float((weight.to(average) * direction.square()).sum())
            directions.append(direction)
        if square > 0:
            for parameter, direction in zip(group["params"], directions, strict=True):
                parameter.add_(direction, alpha=-group["lr"] / sqrt(square))
        return loss

    def _average(self, parameter: Tensor, momentum: float) -> Tensor:
        average: Tensor = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
        return average if parameter.grad is None else average.lerp_(parameter.grad, 1.0 - momentum)
