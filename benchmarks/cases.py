"""Benchmark cases: small models with random weights, on the systems of the recipes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from ase import Atoms
from ase.io import read
from mace import modules
from omegaconf import OmegaConf

from benchmarks.recipes import ROOT, shipped
from stable_plugin import BondDeviation, Detector, System
from stable_plugin.md.labels import read_labeled
from stable_plugin.models import Potential
from stable_plugin.models.base import default_dtype
from stable_plugin.models.mace import MACEPotential

from e3nn import o3  # isort: skip  (mace configures it)

DATA = ROOT / "recipes" / "data"


@dataclass(frozen=True)
class Case:
    """One system with its potential and simulation settings.

    Attributes:
        name: Label in the results.
        potential: Potential with random weights.
        positions: Thermal start frames, (n_replicas, n_atoms, 3) in Å.
        detector: Detector with a threshold that is never reached.
        temperature_K: Temperature.
        timestep_fs: Timestep.
    """

    name: str
    potential: Potential
    positions: torch.Tensor
    detector: Detector
    temperature_K: float
    timestep_fs: float

    @property
    def is_mace(self) -> bool:
        """Whether the model is MACE, which other programs can run as well."""
        return isinstance(self.potential, MACEPotential)


def aspirin(n_replicas: int, device: str = "cpu", channels: int = 8) -> Case:
    """Return aspirin with MACE, as in the aspirin recipe."""
    frames = read(DATA / "aspirin_train.extxyz", ":")
    model = _mace(frames[0], 4.5, device, channels)
    return _case(f"{n_replicas} aspirins, MACE", frames, model, n_replicas, 500.0, 0.5)


def peptide_mace(n_replicas: int, device: str = "cpu") -> Case:
    """Return the molecule of the peptide recipe with MACE."""
    frames = read(DATA / "peptide_train.extxyz", ":")
    model = _mace(frames[0], 4.5, device)
    return _case(f"{n_replicas} tetrapeptides, MACE", frames, model, n_replicas, 500.0, 0.5)


def peptide(n_replicas: int) -> Case:
    """Return the peptide with eSEN, as in the peptide recipe."""
    from stable_plugin.models.fairchem.files import new_fairchem

    section = shipped("peptide_esen").runner.model
    backbone, heads = OmegaConf.to_container(section.backbone), OmegaConf.to_container(section.heads)
    frames = read(DATA / "peptide_train.extxyz", ":")
    torch.manual_seed(0)
    labeled = read_labeled(DATA / "peptide_train.extxyz", "frames")
    model = new_fairchem(backbone, heads, labeled, task_name="omol", energy_weight=1.0, forces_weight=10.0)
    potential = model.stable_potential(System.from_atoms(frames[0]))
    return _with_detector(f"{n_replicas} tetrapeptides, eSEN", potential, frames, n_replicas, 500.0, 0.5)


def water(n_replicas: int, device: str = "cpu", repeat: int = 1) -> Case:
    """Return liquid water with MACE, as in the water recipe, with the cell repeated along each axis."""
    frames = [frame.repeat(repeat) for frame in read(DATA / "water_train.extxyz", ":")]
    name = f"{n_replicas} × {len(frames[0])} atoms of water, MACE"
    return _case(name, frames, _mace(frames[0], 3.5, device), n_replicas, 300.0, 1.0)


def _case(
    name: str,
    frames: Sequence[Atoms],
    model: torch.nn.Module,
    n_replicas: int,
    temperature_K: float,
    timestep_fs: float,
) -> Case:
    potential = MACEPotential(model, System.from_atoms(frames[0]))
    return _with_detector(name, potential, frames, n_replicas, temperature_K, timestep_fs)


def _with_detector(
    name: str, potential: Potential, frames: Sequence[Atoms], n_replicas: int, temperature_K: float, timestep_fs: float
) -> Case:
    positions = torch.tensor(np.stack([frame.positions for frame in frames]), dtype=torch.float32)
    detector = BondDeviation(threshold=5.0, discard=50.0)
    positions = positions.to(potential.device)
    detector.bind(potential.system, positions)
    chosen = positions[torch.arange(n_replicas) % len(positions)]
    return Case(name, potential, chosen, detector, temperature_K, timestep_fs)


def _mace(frame: Atoms, r_max: float, device: str, channels: int = 8) -> torch.nn.Module:
    elements = sorted(set(frame.numbers.tolist()))
    interaction = modules.interaction_classes["RealAgnosticResidualInteractionBlock"]
    with default_dtype(torch.float32):
        torch.manual_seed(0)
        model = modules.ScaleShiftMACE(
            r_max=r_max,
            num_bessel=8,
            num_polynomial_cutoff=5,
            max_ell=1,
            interaction_cls=interaction,
            interaction_cls_first=interaction,
            num_interactions=2,
            num_elements=len(elements),
            hidden_irreps=o3.Irreps(f"{channels}x0e"),
            MLP_irreps=o3.Irreps("16x0e"),
            atomic_energies=np.zeros(len(elements)),
            avg_num_neighbors=12.4,
            atomic_numbers=elements,
            correlation=1,
            gate=torch.nn.functional.silu,
            # Small forces keep the molecules intact under a random potential.
            atomic_inter_scale=0.01,
            atomic_inter_shift=0.0,
        )
    return model.to(device)
