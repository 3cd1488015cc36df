"""StABlE training in a module's own ``training_step``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from stable_plugin.config import StABlEArguments, StABlEConfig, takes
from stable_plugin.integrations.lightning.callback import StABlECallback


class StABlEMixin:
    """Adds the observables' loss to a LightningModule with its own ``training_step``, also with manual optimization.

    Inherit from it before ``LightningModule``, call :meth:`configure_stable` in ``__init__``, and add :meth:`stable_loss` to
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
        ...         if observable_loss is None:  # training is done
        ...             return None
        ...         return self.my_loss(batch) + 100.0 * observable_loss
    """

    _stable: ModuleCallback

    @takes(StABlEArguments)
    def configure_stable(self, arguments: StABlEArguments) -> None:
        """Configure StABlE training.

        Args:
            arguments: The fields of :class:`~stable_plugin.StABlEConfig` as keyword arguments, or ``config=``. The weight of
                the observable is the factor in ``training_step``, so ``observable_weight``, ``gradient_ratio``,
                ``margin_weight`` and ``learning_rate`` do not apply.

        Raises:
            ValueError: If an argument does not apply here.
        """
        for name in ("observable_weight", "gradient_ratio", "margin_weight", "learning_rate"):
            value = getattr(arguments, name)
            if value != getattr(StABlEConfig, name):
                raise ValueError(
                    f"{name}={value!r} does not apply to the mixin: multiply stable_loss() with a factor and set the "
                    "optimizer's learning rate instead."
                )
        self._stable = ModuleCallback(config=arguments.to_config())

    def stable_loss(self) -> Tensor | None:
        """Return the observables' loss, whose gradient is the Boltzmann estimate; simulate when needed.

        Returns:
            A scalar: zero before ``start_epoch``, and if its gradient is not finite; None when training is done.

        Raises:
            NonFiniteGradientError: If the gradient was not finite three times in a row.
        """
        module: Any = self
        if module.current_epoch < self._stable.config.start_epoch:
            return torch.zeros((), device=module.device)
        estimates = self._stable.session.gradient()
        self._stable.log_windows(module.trainer)
        if estimates is None:
            return None
        if self._stable.session.is_nonfinite(estimates):
            return torch.zeros((), device=module.device)
        parameters = self._stable.loop.potential.trainable_parameters()
        parts = [with_gradient(each.loss, parameters, each.gradients) for each in estimates.values()]
        return torch.stack(parts).sum()

    def configure_callbacks(self) -> list[Callback]:
        """Return the callback that simulates, saves and resumes, to be added to the callbacks of the Trainer."""
        return [*super().configure_callbacks(), self._stable]  # type: ignore[misc]


class ModuleCallback(StABlECallback):
    """The callback without the optimizer step, whose gradient comes from :meth:`StABlEMixin.stable_loss`."""

    def on_before_optimizer_step(self, trainer: Trainer, *args: Any) -> None:
        """Leave the gradients unchanged."""
        if trainer.current_epoch >= self.config.start_epoch:
            self._baseline.record(trainer)

    def check_module(self, module: LightningModule) -> None:
        """Accept modules with manual optimization too: they can add the loss in their own steps."""


def with_gradient(value: float, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> Tensor:
    """Return a scalar with the given value and gradients.

    Args:
        value: Value of the scalar.
        parameters: Leaves of the backward pass.
        gradients: Gradient of each parameter, with the parameter's shape.
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
