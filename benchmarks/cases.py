"""What is measured: a small MACE model of aspirin, as in the aspirin recipe."""

from pathlib import Path

import numpy as np
import torch
from ase.io import read
from mace import modules

from stable_plugin import BondDeviation, System
from stable_plugin.potentials.base import default_dtype
from stable_plugin.potentials.mace import MACEPotential

from e3nn import o3  # isort: skip  (after mace, which configures it)

DATA = Path(__file__).parents[1] / "recipes" / "data"


def aspirin(n_replicas: int) -> tuple[MACEPotential, torch.Tensor, BondDeviation]:
    """A potential with random weights, thermal positions (n_replicas, 21, 3) in Å, and a detector bound to them."""
    frames = read(DATA / "aspirin_train.extxyz", ":")
    system = System.from_atoms(frames[0])
    interaction = modules.interaction_classes["RealAgnosticResidualInteractionBlock"]
    with default_dtype(torch.float32):
        torch.manual_seed(0)
        model = modules.ScaleShiftMACE(
            r_max=4.5,
            num_bessel=8,
            num_polynomial_cutoff=5,
            max_ell=1,
            interaction_cls=interaction,
            interaction_cls_first=interaction,
            num_interactions=2,
            num_elements=3,
            hidden_irreps=o3.Irreps("8x0e"),
            MLP_irreps=o3.Irreps("16x0e"),
            atomic_energies=np.zeros(3),
            avg_num_neighbors=12.4,
            atomic_numbers=[1, 6, 8],
            correlation=1,
            gate=torch.nn.functional.silu,
            # Small, so that the molecules stay whole: a random potential should not tear them apart.
            atomic_inter_scale=0.01,
            atomic_inter_shift=0.0,
        )
    potential = MACEPotential(model, system)
    positions = torch.tensor(np.stack([frame.positions for frame in frames]), dtype=torch.float32)
    detector = BondDeviation(threshold=5.0, discard=50.0)
    detector.bind(potential.system, positions)
    return potential, positions[torch.arange(n_replicas) % len(positions)], detector
