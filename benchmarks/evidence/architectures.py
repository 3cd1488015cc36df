"""Sections of a recipe for each architecture: small models, the same for all systems but for their cutoff."""

from __future__ import annotations

from typing import Any

import torch

from stable_plugin.models.sevennet.files import SevenNetModel

import sevenn._keys as KEY  # isort: skip
from ase.data import atomic_numbers  # isort: skip
from sevenn._const import DEFAULT_E3_EQUIVARIANT_MODEL_CONFIG  # isort: skip
from sevenn.model_build import build_E3_equivariant_model  # isort: skip

COSINE = {"_target_": "torch.optim.lr_scheduler.CosineAnnealingLR", "_partial_": True}


def esen(cutoff: float, epochs: int) -> dict[str, Any]:
    """Return the ``model`` of a recipe: eSEN, as in the peptide recipe."""
    return {
        "_target_": "stable_plugin.models.fairchem.FairchemModule",
        "task_name": "omol",
        "charge": 0,
        "spin": 1,
        "lr": 0.003,
        "scheduler": {**COSINE, "T_max": epochs},
        "seed": "${seed}",
        "backbone": {
            "model": "fairchem.core.models.uma.escn_md.eSCNMDBackbone",
            "sphere_channels": 12,
            "hidden_channels": 12,
            "edge_channels": 16,
            "num_distance_basis": 16,
            "lmax": 1,
            "mmax": 1,
            "num_layers": 1,
            "cutoff": cutoff,
            "max_neighbors": 300,
            "otf_graph": True,
            "always_use_pbc": False,
            "direct_forces": False,
            "regress_forces": True,
            "chg_spin_emb_type": "rand_emb",
            "dataset_mapping": {"omol": "omol"},
        },
        "heads": {"efs": {"module": "fairchem.core.models.uma.escn_md.MLP_EFS_Head"}},
    }


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
