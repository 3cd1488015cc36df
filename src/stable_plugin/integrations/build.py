"""Build the training loop for a model and its training data."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from stable_plugin.algorithm.assembly import assemble
from stable_plugin.algorithm.systems_loop import AnyLoop, SystemsLoop
from stable_plugin.algorithm.training_loop import TrainingLoop
from stable_plugin.config import MIN_FRAMES, StABlEConfig, SystemConfig, named_systems
from stable_plugin.integrations.structures import training_structures
from stable_plugin.md.cells import stack_cells
from stable_plugin.md.compositions import frames_by_name, split_by_composition
from stable_plugin.md.frames import read_frames, warn_temperature
from stable_plugin.md.system import System, stack_positions
from stable_plugin.models import NoInteraction, find_potential
from stable_plugin.runtime.distributed import DistributedContext

log = logging.getLogger(__name__)

SEED_STRIDE = 1_000_003
"""Distance between the seeds of two systems, more than those of the processes of one system are apart."""

MAX_NAMES = 10
"""Most names of compositions in one message."""


def build_training_loop(config: StABlEConfig, module: nn.Module, dataloader: Any) -> AnyLoop:
    """Return the training loop for a model and its training data: that of one system, or of several.

    Args:
        config: The settings.
        module: Module that holds the potential.
        dataloader: Training data; the source of structures and reference where the settings name none.

    Raises:
        ValueError: If structures, reference, model and settings do not fit together.
        TypeError: If potential or structures cannot be found.
    """
    if config.systems is None and config.structures is None:
        config = replace(config, structures=training_structures(module, dataloader))
    singles = single_systems(config)
    loop = _build(singles, module)
    if config.systems is None:
        _log_systems(config, singles)
    for each in loop.loops.values() if isinstance(loop, SystemsLoop) else [loop]:
        _log_choices(each)
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
    if config.systems is not None or config.structures is not None:
        # The potential of the settings is made from the user's module.
        _build(single_systems(replace(config, potential=None)), NoInteraction().to(device))


def single_systems(config: StABlEConfig) -> list[StABlEConfig]:
    """Return the settings of each system by itself: those of ``systems``, or of each one found in the structures.

    Args:
        config: The settings, with ``structures`` or ``systems``.

    Raises:
        ValueError: If no composition has frames enough for a target, or bonds are set for several compositions.
    """
    if config.systems is not None:
        systems = cast("Sequence[SystemConfig]", config.systems)  # those of mappings are made on construction
        singles = [config.for_system(system) for system in named_systems(systems)]
    else:
        singles = _by_composition(config)
    if len(singles) == 1:
        return singles
    return [replace(single, seed=config.seed + SEED_STRIDE * number) for number, single in enumerate(singles)]


def _by_composition(config: StABlEConfig) -> list[StABlEConfig]:
    assert config.structures is not None
    starts = split_by_composition(read_frames(config.structures))
    reference = None if config.reference is None else read_frames(config.reference)
    if len(starts) == 1 and (reference is None or len(split_by_composition(reference)) == 1):
        return [config]
    references = starts if reference is None else frames_by_name(starts, reference)
    usable = [name for name in starts if len(starts[name][0]) > 1 and len(references.get(name, ())) >= MIN_FRAMES]
    taken = usable[: config.max_systems]
    if not taken:
        raise ValueError(
            f"structures have {len(starts)} systems ({_listed(list(starts))}), none with {MIN_FRAMES} reference frames, "
            "which targets and reference bond lengths need: pass structures= and reference= of the systems to simulate."
        )
    if config.bonds is not None and len({tuple(starts[name][0].numbers) for name in taken}) > 1:
        raise ValueError(
            f"bonds= belongs to one composition, but the structures have several ({_listed(taken)}): pass systems= with the "
            "bonds of each."
        )
    singles = [
        # Detectors and observables hold what they are bound to.
        replace(config, name=name, structures=starts[name], reference=references[name], **_own_parts(config))
        for name in taken
    ]
    return singles


def _own_parts(config: StABlEConfig) -> dict[str, Any]:
    return copy.deepcopy({name: getattr(config, name) for name in ("observables", "detector", "local")})


def _build(singles: Sequence[StABlEConfig], module: nn.Module) -> AnyLoop:
    if len(singles) == 1:
        # Names tell several systems apart; logs and metrics of one system have none.
        return _build_single(replace(singles[0], name=""), module)
    loops = {single.name: _build_single(single, module) for single in singles}
    return SystemsLoop(loops, [single.weight for single in singles])


def _build_single(config: StABlEConfig, module: nn.Module) -> TrainingLoop:
    assert config.structures is not None
    structures = read_frames(config.structures)
    reference = structures if config.reference is None else read_frames(config.reference)
    warn_temperature(reference, config.integrator.temperature_K, "reference")
    system = System.from_frames(reference, config.bonds).with_fixed(structures, reference)
    positions = stack_positions(structures, system, "structures")
    reference_positions = stack_positions(reference, system, "reference")
    cell, reference_cell = stack_cells(structures, system), stack_cells(reference, system)
    return assemble(
        find_potential(module, system.with_cells(cell, reference_cell), config.potential),
        positions,
        reference_positions,
        config,
        DistributedContext.current(),
        cell=cell,
        reference_cell=reference_cell,
        name=config.name,
    )


def _log_systems(config: StABlEConfig, singles: Sequence[StABlEConfig]) -> None:
    """Log which systems of the structures are simulated, and which frames are not used."""
    assert config.structures is not None
    starts = split_by_composition(read_frames(config.structures))
    if len(starts) > 1:
        taken = {
            single.name: len(read_frames(single.structures)) for single in singles if single.structures is not None
        }
        left_out = _listed([name for name in starts if name not in taken])
        rule = f"with fewer than {MIN_FRAMES} reference frames or beyond max_systems={config.max_systems}"
        log.info(
            "StABlE: %d systems in the structures, by composition, charge, spin, head and fixed atoms; simulated: %s%s",
            len(starts),
            ", ".join(f"{name} ({n_frames} frames)" for name, n_frames in taken.items()),
            f"; left out, {rule}: {left_out}" if left_out else "",
        )
    if config.reference is None:
        return
    reference = read_frames(config.reference)
    used = {id(frame) for single in singles if single.reference is not None for frame in read_frames(single.reference)}
    n_unused = sum(id(frame) not in used for frame in reference)
    if n_unused:
        log.info("StABlE: %d of %d reference frames are of no system that is simulated", n_unused, len(reference))


def _log_choices(loop: TrainingLoop) -> None:
    config = loop.config
    assert config.structures is not None
    structures = read_frames(config.structures)
    reference = structures if config.reference is None else read_frames(config.reference)
    log.info(
        "StABlE: %d replicas of %s (%d bonds) from %d structures, targets from %d frames, unstable by %s, observables "
        "%s, samples are %s, %s at %g K%s",
        config.n_replicas,
        loop.name or structures[0].get_chemical_formula(),
        len(loop.potential.system.bonds),
        len(structures),
        len(reference),
        loop.simulator.detector,
        ", ".join(observable.name for observable in loop.estimator.observables),
        "whole frames" if loop.estimator.local is None else loop.estimator.local,
        type(config.integrator).__name__,
        config.integrator.temperature_K,
        "" if config.integrator.barostat is None else f" and {config.integrator.barostat.pressure_GPa:g} GPa",
    )


def _listed(names: Sequence[str]) -> str:
    more = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
