"""What a run with StABlECallback ends with: the checkpoint of the repaired weights, and warnings in the last lines."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

from stable_plugin.algorithm.records import WindowRecord
from stable_plugin.config import MAX_ENERGY_MAE_RATIO, MAX_FORCE_MAE_GROWTH

log = logging.getLogger(__name__)

REPAIRED = "repaired"
"""Name of the checkpoint of the repaired weights."""


class Baseline:
    """Validation errors and best checkpoints before the first step with the observable's gradient.

    Attributes:
        metrics: Errors of energies and forces as validated last, by name; None before the first step.
        best_scores: Best score of each checkpoint callback.
    """

    def __init__(self) -> None:
        self.metrics: dict[str, float] | None = None
        self.best_scores: list[float | None] = []

    def record(self, trainer: Any) -> None:
        """Record the present values, at the first step only."""
        if self.metrics is None:
            self.metrics, self.best_scores = _errors(trainer), _best_scores(trainer)

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

    def warn_outdated_best(self, trainer: Any, repaired: str) -> None:
        """Warn if the checkpoint callbacks keep nothing but checkpoints from before the first step.

        Args:
            trainer: The Trainer.
            repaired: Checkpoint to use instead.
        """
        callbacks = trainer.checkpoint_callbacks
        if not callbacks or any(getattr(callback, "monitor", None) is None for callback in callbacks):
            return
        if self.metrics is not None and _best_scores(trainer) == self.best_scores:
            best = ", ".join(repr(callback.best_model_path) for callback in callbacks if callback.best_model_path)
            log.warning(
                "every ModelCheckpoint monitors a metric (%s), and the best checkpoint (%s) is from before the first StABlE "
                "step: use %r instead.",
                ", ".join(callback.monitor for callback in callbacks),
                best or "none was written",
                repaired,
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"metrics": self.metrics, "best_scores": self.best_scores}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.metrics, self.best_scores = state["metrics"], state["best_scores"]


def save_repaired(trainer: Any) -> str:
    """Write the checkpoint of the repaired weights; every process must call this.

    It goes to the folder of the first checkpoint callback, or to ``default_root_dir``. An existing file is never
    overwritten; as with ModelCheckpoint, the name gets a version instead.

    Args:
        trainer: The Trainer.

    Returns:
        Path of the checkpoint.
    """
    folders = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    folder = str(next((folder for folder in folders if folder), trainer.default_root_dir))
    # Existing files are those that the first process sees.
    path: str = trainer.strategy.broadcast(_new_path(folder))
    trainer.save_checkpoint(path)
    if trainer.is_global_zero:
        log.info("the repaired weights are in %r", path)
    return path


def warn_not_verified(record: WindowRecord) -> None:
    """Warn that training has ended although the replicas were not stable for long enough.

    Args:
        record: The last window.
    """
    log.warning(
        "the potential is not verified to be stable%s: training ended in the %s phase, with %.0f %% of the replicas unstable in "
        "window %d. Raise max_epochs, max_steps or max_windows and resume with ckpt_path, or see the last windows in the log.",
        f" for {record.system}" if record.system else "",
        record.phase,
        100.0 * record.unstable_fraction,
        record.window,
    )


def _new_path(folder: str) -> str:
    path, version = os.path.join(folder, f"{REPAIRED}.ckpt"), 0
    while os.path.lexists(path):
        version += 1
        path = os.path.join(folder, f"{REPAIRED}-v{version}.ckpt")
    return path


def _errors(trainer: Any) -> dict[str, float]:
    """Return the validation errors of energies and forces that the module has logged."""

    def is_error(name: str) -> bool:
        lower = name.lower()
        quantity, measure = ("energy" in lower or "force" in lower), ("mae" in lower or "rmse" in lower)
        return quantity and measure and "train" not in lower

    return {name: float(torch.as_tensor(value)) for name, value in trainer.callback_metrics.items() if is_error(name)}


def _best_scores(trainer: Any) -> list[float | None]:
    scores = [getattr(callback, "best_model_score", None) for callback in trainer.checkpoint_callbacks]
    return [None if score is None else float(score) for score in scores]
