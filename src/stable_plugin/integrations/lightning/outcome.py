"""What a run with StABlECallback ends with: the checkpoint of the repaired weights, and warnings in the last lines."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from stable_plugin.config import MAX_ENERGY_MAE_RATIO, MAX_FORCE_MAE_GROWTH
from stable_plugin.models import families

log = logging.getLogger(__name__)

REPAIRED = "repaired"
"""Name of the checkpoint of the repaired weights."""

NOT_REPAIRED = "-not-repaired"
"""Added to the name of a best checkpoint whose place the repaired weights take."""


class Baseline:
    """Validation errors before the first step with the observable's gradient.

    Attributes:
        metrics: Errors of energies and forces as validated last, by name; None before the first step.
    """

    def __init__(self) -> None:
        self.metrics: dict[str, float] | None = None

    def record(self, trainer: Any) -> None:
        """Record the present values, at the first step only."""
        if self.metrics is None:
            self.metrics = _errors(trainer)

    def warn_worse(self, trainer: Any) -> None:
        """Warn about energies and forces that are worse than before the first step by more than the allowed ratio."""
        now = _errors(trainer)
        for name, before in (self.metrics or {}).items():
            bound = 1.0 + MAX_FORCE_MAE_GROWTH if "force" in name.lower() else MAX_ENERGY_MAE_RATIO
            # Also if it is NaN.
            if name in now and not now[name] <= bound * before:
                log.warning(
                    "%s was %.4g before the first StABlE step and is %.4g now, more than %g times as much: lower "
                    "gradient_ratio or learning_rate, or train longer without StABlECallback first.",
                    name,
                    before,
                    now[name],
                    bound,
                )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"metrics": self.metrics}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.metrics = state["metrics"]


def save_repaired(trainer: Any, module: Any) -> str:
    """Write the checkpoint of the repaired weights, and let others mean these weights too; every process must call this.

    It goes to the folder of the first checkpoint callback, or to ``default_root_dir``. An existing file is never
    overwritten; as with ModelCheckpoint, the name gets a version instead.

    A callback that monitors a metric keeps weights that were not simulated with: an error of energies and forces is smallest
    before the repair. Trainers load these weights after training, and users compile or package them. So ``best`` and ``last``
    are handed over to the repaired weights, and the previous best is kept under another name.

    Args:
        trainer: The Trainer.
        module: The LightningModule.

    Returns:
        Path of the checkpoint.
    """
    folders = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    folder = str(next((folder for folder in folders if folder), trainer.default_root_dir))
    # Existing files are those that the first process sees.
    path: str = trainer.strategy.broadcast(_new_path(folder, REPAIRED))
    replaced = [place for callback in trainer.checkpoint_callbacks for place in _hand_over(trainer, callback, path)]
    # Only now: a checkpoint contains the paths that the callbacks hold.
    trainer.save_checkpoint(path)
    for place in replaced:
        _replace(trainer, place)
    if trainer.is_global_zero:
        log.info("the repaired weights are in %r", path)
        _export_again(trainer, module)
    return path


def _hand_over(trainer: Any, callback: Any, repaired: str) -> list[str]:
    """Return the files of a checkpoint callback that the repaired weights replace; keep the best under another name."""
    last, best = (getattr(callback, f"{kind}_model_path", "") for kind in ("last", "best"))
    replaced = [last] if last and "://" not in last else []
    if not best or getattr(callback, "monitor", None) is None:
        return replaced
    # A name such as epoch=3-val_loss=0.1.ckpt says what is in the file, so another file takes over.
    is_named = "=" in os.path.basename(best) or "://" in best or not trainer.strategy.broadcast(os.path.isfile(best))
    if is_named:
        callback.best_model_path = repaired
        kept, place = best, repaired
    else:
        kept, place = _new_path(os.path.dirname(best), f"{Path(best).stem}{NOT_REPAIRED}"), best
        replaced.append(best)
        if trainer.is_global_zero:
            shutil.copyfile(best, kept)
    if trainer.is_global_zero:
        log.warning(
            "the best checkpoint by %s is not repaired and is kept as %r: from here on the best checkpoint is %r, with the "
            "repaired weights.",
            callback.monitor,
            kept,
            place,
        )
    return replaced


def _export_again(trainer: Any, module: Any) -> None:
    """Replace the models that callbacks of the families' own trainers have exported."""
    for callback in trainer.callbacks:
        for family in families():
            path = family.export_again(callback, module, NOT_REPAIRED)
            if path is not None:
                log.info("%r is the repaired potential; %r is the one before", path, path + NOT_REPAIRED)


def _replace(trainer: Any, path: str) -> None:
    """Write the present checkpoint in the place of a file or a link."""
    if trainer.is_global_zero and os.path.islink(path):
        os.unlink(path)
    trainer.strategy.barrier()
    trainer.save_checkpoint(path)


def _new_path(folder: str, stem: str) -> str:
    path, version = os.path.join(folder, f"{stem}.ckpt"), 0
    while os.path.lexists(path):
        version += 1
        path = os.path.join(folder, f"{stem}-v{version}.ckpt")
    return path


def _errors(trainer: Any) -> dict[str, float]:
    """Return the validation errors of energies and forces that the module has logged."""

    def is_error(name: str) -> bool:
        lower = name.lower()
        quantity, measure = ("energy" in lower or "force" in lower), ("mae" in lower or "rmse" in lower)
        return quantity and measure and "train" not in lower

    return {name: float(torch.as_tensor(value)) for name, value in trainer.callback_metrics.items() if is_error(name)}
