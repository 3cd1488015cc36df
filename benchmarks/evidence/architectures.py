"""Sections of a recipe for each architecture: small models, the same for all systems but for their cutoff."""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import OmegaConf

from benchmarks.recipes import shipped
from stable_plugin.models.sevennet.files import SevenNetModel

import sevenn._keys as KEY  # isort: skip
from ase.data import atomic_numbers  # isort: skip
from sevenn._const import DEFAULT_E3_EQUIVARIANT_MODEL_CONFIG  # isort: skip
from sevenn.model_build import build_E3_equivariant_model  # isort: skip

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
        "model": {"_target_": f"{__name__}.new_nequip", "symbols": symbols, "cutoff": cutoff, "seed": "${seed}"},
        "E0s": "average",
        "lr": 0.01,
        "scheduler": {**COSINE, "T_max": epochs},
    }


def new_nequip(symbols: list[str], cutoff: float, seed: int, channels: int = 8, n_layers: int = 2) -> SevenNetModel:
    """Return a NequIP model with random weights.

    Args:
        symbols: Elements of the systems.
        cutoff: Cutoff in Å.
        seed: Seed of the weights.
        channels: Features of each order of an atom.
        n_layers: Convolutions.
    """
    numbers = sorted(atomic_numbers[symbol] for symbol in symbols)
    config = {
        **DEFAULT_E3_EQUIVARIANT_MODEL_CONFIG,
        KEY.CUTOFF: cutoff,
        KEY.NODE_FEATURE_MULTIPLICITY: channels,
        KEY.NUM_CONVOLUTION: n_layers,
        KEY.CONVOLUTION_WEIGHT_NN_HIDDEN_NEURONS: [16],
        KEY.IS_PARITY: False,
        KEY.NUM_SPECIES: len(numbers),
        KEY.TYPE_MAP: {number: index for index, number in enumerate(numbers)},
        KEY.CHEMICAL_SPECIES_BY_ATOMIC_NUMBER: numbers,
        KEY.CONV_DENOMINATOR: 12.0,
        KEY.USE_SPECIES_WISE_SHIFT_SCALE: True,
        KEY.SHIFT: [0.0] * len(numbers),  # where the energies of isolated atoms go
        KEY.SCALE: [1.0] * len(numbers),
    }
    torch.manual_seed(seed)
    return SevenNetModel(build_E3_equivariant_model(config), config)
