"""StABlE training inside one's own ``training_step``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule
from torch import Tensor, nn

from stable_plugin.config import StABlEArguments, StABlEConfig, takes
from stable_plugin.integrations.lightning.callback import StABlECallback


class StABlEMixin:
    """For a LightningModule that writes its own ``training_step``, also with manual optimization.

    Mix it in before ``LightningModule``, call :meth:`configure_stable` in ``__init__``, and add :meth:`stable_loss` to
    the loss. A module that overrides ``configure_callbacks`` adds its own to those of ``super()``.

    Example:
        >>> from pytorch_lightning import LightningModule
        >>> from stable_plugin import StABlEMixin
        >>> class MyModule(StABlEMixin, LightningModule):
        ...     def __init__(self, model):
        ...         super().__init__()
        ...         self.model = model
        ...         self.configure_stable(n_replicas=16)
        ...     def training_step(self, batch, batch_idx):
        ...         observable_loss = self.stable_loss()
        ...         if observable_loss is None:  # the replicas were stable for the time asked for
        ...             return None
        ...         return self.my_loss(batch) + 100.0 * observable_loss
    """

    _stable: ModuleCallback

    @takes(StABlEArguments)
    def configure_stable(self, arguments: StABlEArguments) -> None:
        """Configure StABlE training.

        Args:
            arguments: The fields of :class:`~stable_plugin.StABlEConfig` as keyword arguments, or ``config=``. The weight of
                the observable is the factor in ``training_step``, so ``observable_weight``, ``gradient_ratio`` and
                ``learning_rate`` do not apply.

        Raises:
            ValueError: If an argument does not apply here.
        """
        for name in ("observable_weight", "gradient_ratio", "learning_rate"):
            value = getattr(arguments, name)
            if value != getattr(StABlEConfig, name):
                raise ValueError(
                    f"{name}={value!r} does not apply to the mixin: multiply stable_loss() with a factor and set the "
                    "optimizer's learning rate instead."
                )
        self._stable = ModuleCallback(config=arguments.to_config())

    def stable_loss(self) -> Tensor | None:
        """The observables' loss, whose gradient is the Boltzmann estimate; simulates when it has to.

        Returns:
            A scalar: zero before ``start_epoch``, and where its gradient is not finite; None when training is done.

        Raises:
            NonFiniteGradientError: If the gradient was not finite three times in a row.
        """
        module: Any = self
        if module.current_epoch < self._stable.config.start_epoch:
            return torch.zeros((), device=module.device)
        estimate = self._stable.session.gradient()
        self._stable.log_windows(module.trainer)
        if estimate is None:
            return None
        if self._stable.session.is_nonfinite(estimate):
            return torch.zeros((), device=module.device)
        parameters = self._stable.loop.potential.trainable_parameters()
        return with_gradient(estimate.loss, parameters, estimate.gradients)

    def configure_callbacks(self) -> list[Callback]:
        """What simulates, saves and resumes, beside the callbacks of the Trainer."""
        return [*super().configure_callbacks(), self._stable]  # type: ignore[misc]


class ModuleCallback(StABlECallback):
    """All of the callback but the step, which is the module's own."""

    def on_before_optimizer_step(self, *args: Any) -> None:
        """Leave the step as it is: :meth:`StABlEMixin.stable_loss` has its part in it."""

    def refuse_steps_of_its_own(self, module: LightningModule) -> None:
        """A module that takes its steps itself can add the loss to them."""


def with_gradient(value: float, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> Tensor:
    """A scalar of a given value whose backward pass hands out given gradients.

    Args:
        value: Of the scalar.
        parameters: Leaves of the backward pass.
        gradients: One per parameter, shaped like it.
    """
    result: Tensor = _WithGradient.apply(value, tuple(gradients), *parameters)  # type: ignore[no-untyped-call]
    return result


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: float, gradients: tuple[Tensor, ...], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return parameters[0].new_tensor(value)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        return None, None, *(upstream[0] * gradient for gradient in ctx.gradients)
