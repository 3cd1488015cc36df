"""What ``stable-plugin repair`` does: from a potential's own file and labeled frames to a file of the same kind."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from stable_plugin.config import Schedule, StABlEConfig
from stable_plugin.integrations.recipes.launch import prepare
from stable_plugin.integrations.recipes.pipeline import require_new, require_suffix
from stable_plugin.integrations.recipes.run_folder import RunFolder
from stable_plugin.models.registry import find_family

log = logging.getLogger(__name__)

RATE_FRACTION = 0.2
"""Learning rate relative to the default of the module, which is meant for a new model."""

UNLABELED_MARGIN_WEIGHT = 1.0
"""Weight of the margin beside labels of the potential itself, whose loss is zero at first and gives no automatic weight. With the
usual weight of 100 of squared forces in eV/Å, a shortfall of 1 kT is worth an error of 0.1 eV/Å."""

ANCHOR_SHARE = 0.5
"""Fraction of the training frames that are anchors, beside labeled ones."""

MAX_WINDOWS = 20
"""Learning windows after which a repair ends; the report then says that stability was not verified."""


def prepare_repair(
    model: str,
    data: str,
    output: str,
    *,
    overrides: Sequence[str] = (),
    valid: str | None = None,
    reference: str | None = None,
    temperature_K: float = 300.0,
    unlabeled: bool = False,
    anchors: str | None = None,
) -> RunFolder:
    """Return the pipeline that repairs a potential, validated as that of a recipe.

    Args:
        model: File of the potential, or name of a pretrained one.
        data: File of labeled frames, whose energies and forces are kept in training; replicas start from them.
        output: File to write.
        overrides: Changes of the recipe, as ``stable-plugin train`` takes them.
        valid: File of labeled frames that are not trained on: replicas of the evaluation start from them.
        reference: File of frames that the observables are measured on; the labeled frames if None.
        temperature_K: Temperature of the simulations.
        unlabeled: Whether the frames have no labels: the energies and forces that the potential has on them are kept.
        anchors: File of frames of other systems, on which the energies and forces of the potential are kept as well.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a value is invalid, or the family of the model has no LightningModule.
    """
    recipe = repair_recipe(
        model,
        data,
        output,
        valid=valid,
        reference=reference,
        temperature_K=temperature_K,
        unlabeled=unlabeled,
        anchors=anchors,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "repair.yaml")
        OmegaConf.save(OmegaConf.create(recipe), path)
        return prepare(path, overrides)


def repair_recipe(
    model: str,
    data: str,
    output: str,
    *,
    valid: str | None = None,
    reference: str | None = None,
    temperature_K: float = 300.0,
    unlabeled: bool = False,
    anchors: str | None = None,
) -> dict[str, Any]:
    """Return the recipe of a repair as plain data; arguments and errors as for :func:`prepare_repair`.

    Args:
        model: File of the potential, or name of a pretrained one.
        data: File of labeled frames.
        output: File to write.
        valid: File of labeled frames that are not trained on.
        reference: File of frames that the observables are measured on.
        temperature_K: Temperature of the simulations.
        unlabeled: Whether the frames have no labels: the energies and forces that the potential has on them are kept.
        anchors: File of frames of other systems, on which the energies and forces of the potential are kept as well.

    Raises:
        ValueError: If the family of the model has no LightningModule, or its files have another suffix than ``output``.
        FileExistsError: If ``output`` exists.
    """
    family = find_family(model)
    module = family.lightning_module()
    if module is None:
        raise ValueError(
            f"model={model!r} is of the family {family.name!r}, which has no LightningModule in this package: add "
            "StABlECallback to the Trainer of that family's own training."
        )
    # Before frames are labeled, which takes long. Modules of other families know their suffix when they have read the model.
    require_suffix("output", output, getattr(module, "potential_suffix", ""))
    require_new("output", output)
    data, output, valid, reference, anchors = (_absolute(path) for path in (data, output, valid, reference, anchors))
    integrator = {"_target_": "stable_plugin.Langevin", "temperature_K": temperature_K}
    trainer = {"_target_": "pytorch_lightning.Trainer", "_partial_": True, "enable_model_summary": False}
    source = _absolute(model) if Path(model).is_file() else model
    return {
        "job": {"run_dir": "runs/repair", "device_type": None, "seed": 0},
        "runner": {
            "_target_": "stable_plugin.StABlERunner",
            "title": f"Repair of {Path(model).name}",
            "control": False,
            "output": output,
            "data": {**_data(source, data, valid, unlabeled, anchors), "batch_size": 10},
            "model": {"_target_": _target(module), module.model_argument: source},
            # The potential is trained already; runner.supervised.max_epochs=N fine-tunes it first.
            "supervised": {**trainer, "max_epochs": 0},
            "stable": {
                "_target_": "stable_plugin.StABlECallback",
                "structures": data,
                "reference": reference,
                "integrator": integrator,
                "n_replicas": StABlEConfig.n_replicas,
                "window_ps": StABlEConfig.window_ps,
                "learning_rate": RATE_FRACTION * signature(module).parameters["lr"].default,
                "margin_weight": UNLABELED_MARGIN_WEIGHT if unlabeled else StABlEConfig.margin_weight,
                "schedule": {
                    "_target_": "stable_plugin.Schedule",
                    "max_failures_per_ns": Schedule.max_failures_per_ns,
                    "max_windows": MAX_WINDOWS,
                },
                "seed": StABlEConfig.seed,
            },
            "stable_trainer": {
                **trainer,
                "max_epochs": -1,
                "check_val_every_n_epoch": 10,
                "gradient_clip_val": 10.0,
                "log_every_n_steps": 1,
            },
            "evaluation": {
                "_target_": "stable_plugin.Evaluator",
                "starts": valid or data,
                "labeled": None if unlabeled else valid or data,
                "reference": reference or data,
                "integrator": integrator,
                "n_replicas": StABlEConfig.n_replicas,
                "horizons_ps": [1.0],
                "max_failures_per_ns": "${runner.stable.schedule.max_failures_per_ns}",
                "seed": StABlEConfig.seed,
            },
        },
    }


def _data(source: str, data: str, valid: str | None, unlabeled: bool, anchors: str | None) -> dict[str, Any]:
    """Return the data module: labels of its own, or of the potential itself, or both."""
    own = {"_target_": "stable_plugin.PseudoLabeledDataModule", "model": source}
    if unlabeled:
        return {**own, "train": data if anchors is None else [data, anchors], "valid": valid}
    if anchors is not None:
        return {**own, "train": anchors, "labeled": data, "labeled_valid": valid, "share": ANCHOR_SHARE}
    return {"_target_": "stable_plugin.ExtxyzDataModule", "train": data, "valid": valid}


def _absolute(path: Any) -> Any:
    """Return a path that a resumed run finds from another folder too."""
    return None if path is None else str(Path(path).absolute())


def _target(kind: type) -> str:
    """Return the public name of a class: that of the family's package where it exports the class."""
    package = kind.__module__.rpartition(".")[0]
    exported = getattr(import_module(package), kind.__name__, None) is kind if package else False
    return f"{package if exported else kind.__module__}.{kind.__qualname__}"
