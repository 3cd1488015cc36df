"""Small SchNetPack models, and runs of ``spktrain``."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from ase.io import read
from schnetpack.atomistic import Atomwise, Forces, PairwiseDistances
from schnetpack.data import ASEAtomsData
from schnetpack.model import NeuralNetworkPotential
from schnetpack.nn import CosineCutoff, GaussianRBF
from schnetpack.representation import PaiNN, SchNet
from schnetpack.transform import AddOffsets, CastTo64

ROOT = Path(__file__).parents[2]
CUTOFF = 4.0
ATOMREF = torch.zeros(100, dtype=torch.float64)
ATOMREF[[1, 6, 8]] = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64)
KINDS = {"schnet": SchNet, "painn": PaiNN}


def make_network(kind="schnet", dtype=torch.float64, cutoff=CUTOFF, postprocessors=None, output_modules=None):
    torch.manual_seed(1)
    representation = KINDS[kind](
        n_atom_basis=8,
        n_interactions=2,
        radial_basis=GaussianRBF(n_rbf=6, cutoff=cutoff),
        cutoff_fn=CosineCutoff(cutoff),
    )
    if output_modules is None:
        output_modules = [Atomwise(n_in=8, output_key="energy"), Forces()]
    if postprocessors is None:
        mean = torch.tensor([0.25], dtype=torch.float64)
        postprocessors = [
            CastTo64(),
            AddOffsets("energy", add_mean=True, add_atomrefs=True, atomrefs=ATOMREF, property_mean=mean),
        ]
    return NeuralNetworkPotential(
        representation, [PairwiseDistances()], output_modules, postprocessors=postprocessors
    ).to(dtype)


def make_database(path, n_frames):
    """Write aspirin frames into a database of SchNetPack."""
    frames = read(ROOT / "recipes" / "data" / "aspirin_train.extxyz", f":{n_frames}")
    data = ASEAtomsData.create(str(path), distance_unit="Ang", property_unit_dict={"energy": "eV", "forces": "eV/Ang"})
    labels = [
        {"energy": np.array([frame.info["REF_energy"]]), "forces": frame.arrays["REF_forces"]} for frame in frames
    ]
    data.add_systems(labels, frames)
    return frames


def train(folder, epochs=20, start_epoch=2):
    """Run ``spktrain`` on the example's experiment in miniature; return its output."""
    make_database(folder / "aspirin.db", 8)
    (folder / "recipes").symlink_to(ROOT / "recipes")
    settings = {
        "run.id": "run",
        "seed": 0,
        "data.num_train": 5,
        "data.num_val": 3,
        "trainer.max_epochs": epochs,
        "trainer.accelerator": "cpu",
        "logger": "csv",
        "model.representation.n_atom_basis": 8,
        "model.representation.n_interactions": 2,
        "callbacks.stable.start_epoch": start_epoch,
        "callbacks.stable.n_replicas": 4,
        "callbacks.stable.window_ps": 0.01,
        "callbacks.stable.record_every_fs": 2.5,
        "callbacks.stable.check_every_fs": 2.5,
        "callbacks.stable.steps_per_window": 2,
        # Large steps, so that no checkpoint of the repair is the best.
        "callbacks.stable.learning_rate": 0.3,
        "callbacks.stable.detector": "{_target_: stable_plugin.BondDeviation, threshold: 0.2, discard: 10.0}",
        "callbacks.stable.schedule": "{_target_: stable_plugin.Schedule, max_failures_per_ns: 30000.0, max_windows: 2}",
    }
    arguments = [f"{'' if name == 'logger' else '++'}{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-W", "ignore", "-c", "from schnetpack.cli import train; train()"]
    return subprocess.run(
        [*command, f"--config-dir={ROOT / 'examples'}", "experiment=08_spktrain", *arguments],
        cwd=folder,
        env={**os.environ, "PWD": str(folder), "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
