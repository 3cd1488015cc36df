"""NequIP models with random weights, as SevenNet implements them."""

from __future__ import annotations

import sevenn._keys as KEY
import torch
from ase.data import atomic_numbers
from sevenn._const import DEFAULT_E3_EQUIVARIANT_MODEL_CONFIG
from sevenn.model_build import build_E3_equivariant_model

from stable_plugin.models.sevennet.files import SevenNetModel


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
