"""Sections of a recipe for each architecture: small models, the same for all systems but for their cutoff."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from benchmarks.recipes import shipped

COSINE = {"_target_": "torch.optim.lr_scheduler.CosineAnnealingLR", "_partial_": True}


def esen(cutoff: float, epochs: int) -> dict[str, Any]:
    """Return the ``model`` of a recipe: the eSEN of the peptide recipe."""
    model = OmegaConf.to_container(shipped("peptide_esen").runner.model)
    assert isinstance(model, dict)
    changes = {"checkpoint": None, "task_name": "omol", "scheduler": {**COSINE, "T_max": epochs}}
    return {**model, **changes, "backbone": {**model["backbone"], "cutoff": cutoff}}


def nequip(symbols: list[str], cutoff: float, epochs: int) -> dict[str, Any]:
    """Return the ``model`` of a recipe: NequIP, as SevenNet implements it."""
    return {
        "_target_": "stable_plugin.models.FineTuningModule",
        "model": {
            "_target_": "benchmarks.evidence.new_nequip.new_nequip",
            "symbols": symbols,
            "cutoff": cutoff,
            "seed": "${seed}",
        },
        "E0s": "average",
        "lr": 0.01,
        "scheduler": {**COSINE, "T_max": epochs},
    }
