"""What trainers and modules keep beside the weights, and refusal of those whose training StABlECallback cannot repair."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.optim.swa_utils import AveragedModel

from stable_plugin.models import WeightAverage, families

AVERAGE_NAMES = re.compile(r"(?<![A-Z])EMA(?![a-z])|ExponentialMovingAverage|WeightAverag|AveragedModel")
"""Names of classes that keep averages of weights: Lightning's, torch's, torch_ema's, NequIP's, SchNetPack's."""

AVERAGE_FLAGS = ("use_ema", "use_swa")
"""Attributes of modules and callbacks that switch averages on."""

SHARDED_STRATEGIES = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")
"""Strategies that divide the weights between processes."""


def weight_averages(trainer: Any, module: Any) -> list[WeightAverage]:
    """Return the averages of weights that a family of models knows how to set; refuse all others.

    Users would get averages that were never simulated with.

    Args:
        trainer: Trainer with all its callbacks.
        module: The LightningModule.

    Returns:
        The averages of module and callbacks.

    Raises:
        MisconfigurationException: If the module or a callback keeps an average that no family knows.
    """
    found = []
    for holder in (*trainer.callbacks, module):
        known = next((average for family in families() if (average := family.average(holder)) is not None), None)
        if known is not None:
            found.append(known)
            continue
        kept = next(_averages(holder), None)
        if kept is not None:
            raise MisconfigurationException(
                f"{kept} would hand back averages of weights, which StABlECallback has not simulated with: remove it from the "
                "training with StABlECallback, starting from the averaged weights if they are better. It may stay in an "
                "earlier training without StABlECallback."
            )
    return found


def refuse_sharded_weights(trainer: Any) -> None:
    """Refuse strategies that divide the weights between processes.

    Args:
        trainer: The Trainer.

    Raises:
        MisconfigurationException: If the Trainer has one.
    """
    strategy = type(trainer.strategy).__name__
    if strategy in SHARDED_STRATEGIES:
        raise MisconfigurationException(
            f"{strategy} divides the weights between processes, and StABlECallback simulates with all of them in each: use "
            "Trainer(strategy='ddp'), where every process has replicas of its own."
        )


def refuse_manual_optimization(module: Any) -> None:
    """Refuse a module that takes its optimizer steps itself.

    Args:
        module: The module.

    Raises:
        MisconfigurationException: If it does.
    """
    if not module.automatic_optimization:
        raise MisconfigurationException(
            "StABlECallback adds its gradient before Trainer's optimizer step, which manual optimization "
            f"({type(module).__name__}.automatic_optimization = False) bypasses: use StABlEMixin and its "
            "stable_loss() in training_step."
        )


def _averages(holder: Any) -> Iterator[str]:
    """Yield descriptions of the averages that a callback or a module keeps."""
    name = type(holder).__name__
    if _is_average(holder):
        yield name
    has_modules = hasattr(holder, "named_modules")
    for attribute, value in [*vars(holder).items(), *(holder.named_children() if has_modules else [])]:
        if _is_average(value):
            yield f"{name} ({attribute}: {type(value).__name__})"
        elif attribute in AVERAGE_FLAGS and value is True:
            yield f"{name} ({attribute}=True)"
    if has_modules:
        # Deeper inside a model, a moving average may also be one of data, so only torch's class counts.
        for path, module in holder.named_modules():
            if isinstance(module, AveragedModel):
                yield f"{name} ({path}: {type(module).__name__})"


def _is_average(item: Any) -> bool:
    return any(AVERAGE_NAMES.search(kind.__name__) for kind in type(item).__mro__)
