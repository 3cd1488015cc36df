"""Build the training loop for a model and its training data."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from ase import Atoms
from torch import nn

from stable_plugin.algorithm.assembly import assemble
from stable_plugin.algorithm.training_loop import TrainingLoop
from stable_plugin.config import StABlEConfig
from stable_plugin.integrations.structures import training_structures
from stable_plugin.md.frames import read_frames
from stable_plugin.md.system import System, stack_cells, stack_positions
from stable_plugin.models import NoInteraction, PotentialMaker, find_potential
from stable_plugin.runtime.distributed import DistributedContext

log = logging.getLogger(__name__)


def build_training_loop(config: StABlEConfig, module: nn.Module, dataloader: Any) -> TrainingLoop:
    """Return the training loop for a model and its training data.

    Args:
        config: The settings.
        module: Module that holds the potential.
        dataloader: Training data; the source of structures and reference where the settings name none.

    Raises:
        ValueError: If structures, reference, model and settings do not fit together.
        TypeError: If potential or structures cannot be found.
    """
    structures = (
        training_structures(module, dataloader) if config.structures is None else read_frames(config.structures)
    )
    loop = _build(config, module, structures, config.potential)
    log.info(
        "StABlE: %d replicas of %s (%d bonds) from %d structures, targets from %d frames, unstable by %s, observables "
        "%s, samples are %s, %s at %g K",
        config.n_replicas,
        structures[0].get_chemical_formula(),
        len(loop.potential.system.bonds),
        len(structures),
        len(structures if config.reference is None else read_frames(config.reference)),
        loop.simulator.detector,
        ", ".join(observable.name for observable in loop.estimator.observables),
        "whole frames" if loop.estimator.local is None else loop.estimator.local,
        type(config.integrator).__name__,
        config.integrator.temperature_K,
    )
    return loop


def validate(config: StABlEConfig, device: torch.device | str = "cpu") -> None:
    """Check that settings and structures fit together, before anything long begins.

    Builds the loop once with atoms that do not interact, where the settings name structures.

    Args:
        config: The settings.
        device: Device that the model will be on.

    Raises:
        ValueError: As for :func:`build_training_loop`.
    """
    if config.structures is not None:
        _build(config, NoInteraction().to(device), read_frames(config.structures))


def _build(
    config: StABlEConfig, module: nn.Module, structures: Sequence[Atoms], potential: str | PotentialMaker | None = None
) -> TrainingLoop:
    reference = structures if config.reference is None else read_frames(config.reference)
    system = System.from_frames(reference, config.bonds)
    positions = stack_positions(structures, system, "structures")
    reference_positions = stack_positions(reference, system, "reference")
    cell, reference_cell = stack_cells(structures, system), stack_cells(reference, system)
    return assemble(
        find_potential(module, system.with_cells(cell, reference_cell), potential),
        positions,
        reference_positions,
        config,
        DistributedContext.current(),
        cell=cell,
        reference_cell=reference_cell,
    )
