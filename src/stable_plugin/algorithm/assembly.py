"""Build a training loop from a potential, frames and settings."""

from __future__ import annotations

from math import ceil

from torch import Tensor

from stable_plugin.algorithm.estimator import BoltzmannEstimator
from stable_plugin.algorithm.failure_margin import FailureMargin
from stable_plugin.algorithm.replica_pool import ReplicaPool
from stable_plugin.algorithm.training_loop import TrainingLoop
from stable_plugin.algorithm.window_data import WindowEstimator
from stable_plugin.config import MIN_FRAMES, StABlEConfig
from stable_plugin.defaults import choose
from stable_plugin.md.cells import optional
from stable_plugin.md.simulator import Simulator
from stable_plugin.models.base import Potential
from stable_plugin.runtime.distributed import DistributedContext
from stable_plugin.runtime.random_state import RandomStreams


def assemble(
    potential: Potential,
    structures: Tensor,
    reference: Tensor,
    config: StABlEConfig,
    context: DistributedContext | None = None,
    *,
    cell: Tensor | None = None,
    reference_cell: Tensor | None = None,
    name: str = "",
) -> TrainingLoop:
    """Return the training loop for a potential.

    Args:
        potential: The potential in training.
        structures: Start frames of the replicas, (n_frames, n_atoms, 3) in Å.
        reference: Frames that bonds and targets are computed from, (n_frames, n_atoms, 3) in Å.
        config: Settings; observables and detector are chosen for the system where they are None.
        context: Processes that train together, each with ``n_replicas`` of its own and the same settings; this one alone
            if None.
        cell: Cells of the start frames, (n_frames, 3, 3) in Å; that of the system if None.
        reference_cell: Cells of the reference frames, (n_frames, 3, 3) in Å; that of the system if None.
        name: Name of the system in records, where several are trained on.

    Raises:
        ValueError: If there are fewer than two reference frames, or frames, system and settings do not fit together.
    """
    if len(reference) < MIN_FRAMES:
        raise ValueError(
            f"reference holds {len(reference)} frame(s), but targets and reference bond lengths need at least "
            f"{MIN_FRAMES}: pass more frames."
        )
    context = context or DistributedContext()
    reference = reference.to(potential.system.masses)
    reference_cell = None if reference_cell is None else reference_cell.to(reference)
    cell = None if cell is None else cell.to(reference)
    chosen = choose(config, potential.system, reference, *optional(reference_cell))
    chosen.detector.check_reference(structures.to(reference), "structures", *optional(cell))
    simulator = Simulator(
        potential,
        config.integrator,
        chosen.detector,
        check_every_fs=config.check_every_fs,
        execution=config.execution,
    )
    simulator.check_record_every(config.record_steps)
    simulator.forces.expected_steps = config.window_steps * config.schedule.expected_windows(
        config.window_ps, config.n_replicas * context.size
    )
    learning_simulator = None
    if config.heating > 1.0:
        detector = chosen.detector.heated(config.heating)
        detector.bind(potential.system, reference, *optional(reference_cell))
        integrator = config.integrator.changed(temperature_K=config.heating * config.integrator.temperature_K)
        learning_simulator = simulator.changed(integrator, detector)
    chunk = None if config.chunk == "auto" else config.chunk
    estimator = WindowEstimator(
        BoltzmannEstimator(potential, config.integrator.temperature_K, chunk, context),
        chosen.observables,
        loss=config.loss,
        local=chosen.local,
        even_sampling=config.even_sampling,
    )
    streams = RandomStreams(context.seed(config.seed), potential.device)
    margin = None
    if config.uses_margin:
        n_reference = ceil(config.margin_frames / 4)
        margin = FailureMargin(estimator.estimator, chosen.detector, reference, reference_cell, n_reference)
    replicas = ReplicaPool(simulator, structures, config, streams, context, cell, learning_simulator)
    return TrainingLoop(config, replicas, estimator, margin, name)
