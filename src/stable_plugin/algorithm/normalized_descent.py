"""An optimizer for a few parameters with noisy gradients: steps of one length along the gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from stable_plugin.runtime import checks

DAMPING = 0.1
"""Part of the mean diagonal element that is added to a metric: a parameter that hardly matters must not follow its noise."""


class NormalizedDescent(torch.optim.Optimizer):
    r"""Descent in steps of one length, along an average of the gradients.

    .. math:: \Delta\theta = -\eta \frac{G^{-1} \bar g}{\sqrt{\bar g^T G^{-1} \bar g}}

    Adam moves every parameter by about the learning rate, also one whose gradient is noise. Here parameters move in proportion to
    their gradients, so that those on which the loss hardly depends keep their values.

    The metric :math:`G` says what a change of the parameters costs: the step is the one that lowers the loss most among all whose
    length :math:`\sqrt{\Delta\theta^T G \Delta\theta}` is the learning rate, a natural gradient (Amari, Neural Comput. 10, 251, 1998).

    Args:
        params: Parameters; frozen ones are left alone.
        lr: Length of a step: without a metric, the root mean square of the changes, in the unit of the parameters.
        momentum: Weight of earlier gradients in the average, from 0 to 0.99.
        metric: Symmetric positive matrix over all numbers of the parameters that are not frozen, in their order, (n, n).

    Raises:
        ValueError: If an argument is out of range; at the first step, if the metric does not fit the parameters.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, momentum: float = 0.5, metric: Tensor | None = None
    ) -> None:
        checks.number("lr", lr, at_least=0)
        checks.number("momentum", momentum, at_least=0, at_most=0.99)
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self.metric = metric

    @property
    def _parameters(self) -> list[Tensor]:
        return [each for group in self.param_groups for each in group["params"] if each.requires_grad]

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
        parameters, group = self._parameters, self.param_groups[0]
        average = torch.cat([self._average(each, group["momentum"]).flatten() for each in parameters]).double().cpu()
        if average.any():
            direction = torch.linalg.solve(self._damped_metric(len(average)), average)
            change = -group["lr"] / (average @ direction).sqrt() * direction
            for parameter, own in zip(parameters, change.split([each.numel() for each in parameters]), strict=True):
                parameter.add_(own.reshape(parameter.shape).to(parameter))
        return loss

    def _average(self, parameter: Tensor, momentum: float) -> Tensor:
        average: Tensor = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
        return average if parameter.grad is None else average.lerp_(parameter.grad, 1.0 - momentum)

    def _damped_metric(self, n_numbers: int) -> Tensor:
        identity = torch.eye(n_numbers, dtype=torch.float64)
        if self.metric is None:
            return identity / n_numbers
        if self.metric.shape != identity.shape:
            raise ValueError(
                f"metric of shape {tuple(self.metric.shape)} for {n_numbers} numbers: pass one of shape {tuple(identity.shape)}."
            )
        metric = self.metric.to(identity)
        return metric + DAMPING * metric.diagonal().mean() * identity
