"""The arguments of a StABlE run that callback and mixin share, and the loop made from them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from ase import Atoms
from torch import nn

from stable_plugin.algorithm.schedule import Schedule
from stable_plugin.algorithm.training_loop import TrainingLoop
from stable_plugin.defaults import Local, chosen_local, default_detector, default_observables
from stable_plugin.detectors import Detector
from stable_plugin.integrations.structures import training_structures
from stable_plugin.md import Integrator, Langevin
from stable_plugin.md.frames import Frames, read_frames
from stable_plugin.md.system import System, stack_positions
from stable_plugin.models import NoInteraction, find_potential
from stable_plugin.observables import Observable
from stable_plugin.runtime import checks
from stable_plugin.runtime.distributed import DistributedContext

log = logging.getLogger(__name__)


class LoopSettings:
    """What a :class:`~stable_plugin.algorithm.training_loop.TrainingLoop` is made from, before the model and the data are known.

    Files are read and numbers checked here, at once.

    Args:
        structures: See :class:`~stable_plugin.StABlECallback`, as for all arguments.
        reference: Likewise.
        bonds: Likewise.
        observables: Likewise.
        integrator: Likewise.
        detector: Likewise.
        schedule: Likewise.
        local: Likewise.
        loop_arguments: Further arguments of the loop.
    """

    def __init__(
        self,
        *,
        structures: Frames | None,
        reference: Frames | None,
        bonds: Sequence[tuple[int, int]] | None,
        observables: Observable | Sequence[Observable] | None,
        integrator: Integrator | None,
        detector: Detector | None,
        schedule: Schedule | None,
        local: Local,
        **loop_arguments: Any,
    ) -> None:
        checks.count("n_replicas", loop_arguments["n_replicas"], at_most=checks.MAX_REPLICAS)
        checks.seed(loop_arguments["seed"])
        self.structures = None if structures is None else read_frames(structures, "structures")
        self.reference = None if reference is None else read_frames(reference, "reference")
        self.bonds = bonds
        self.observables = [observables] if isinstance(observables, Observable) else observables
        self.detector, self.local = detector, local
        self.loop_arguments: dict[str, Any] = {
            "integrator": integrator or Langevin(),
            "schedule": schedule or Schedule(),
            **loop_arguments,
        }

    def build(self, module: nn.Module, dataloader: Any) -> TrainingLoop:
        """The loop for a model and its training data.

        Args:
            module: Holds the potential.
            dataloader: Training data, the source of structures and reference where none were given.

        Raises:
            ValueError: If structures, reference, model and settings do not fit together.
            TypeError: If potential or structures cannot be found.
        """
        structures = self.structures or training_structures(module, dataloader)
        loop = self._loop(module, structures)
        log.info(
            "StABlE: %d replicas of %s (%d bonds) from %d structures, targets from %d frames, unstable by %s, observables "
            "%s, samples are %s, %s at %g K",
            self.loop_arguments["n_replicas"],
            structures[0].get_chemical_formula(),
            len(loop.potential.system.bonds),
            len(structures),
            len(self.reference or structures),
            loop.simulator.detector,
            ", ".join(observable.name for observable in loop.observables),
            "whole frames" if loop.sampler.local is None else loop.sampler.local,
            type(loop.simulator.integrator).__name__,
            loop.simulator.integrator.temperature_K,
        )
        return loop

    def validate(self, device: torch.device | str = "cpu") -> None:
        """Make the loop once with a potential that does nothing, where structures were given.

        For a training that begins with something long: what does not fit together comes out first.

        Args:
            device: Where the model is going to be.

        Raises:
            ValueError: As of :meth:`build`.
        """
        if self.structures is not None:
            self._loop(NoInteraction().to(device), self.structures)

    def _loop(self, module: nn.Module, structures: Sequence[Atoms]) -> TrainingLoop:
        reference = self.reference or structures
        system = System.from_atoms(reference[0], self.bonds)
        start, targets = (
            stack_positions(frames, system, name)
            for frames, name in ((structures, "structures"), (reference, "reference"))
        )
        observables = list(self.observables or default_observables(system))
        detector = self.detector or default_detector(system, targets, self.loop_arguments["integrator"].temperature_K)
        return TrainingLoop(
            find_potential(module, system),
            start,
            targets,
            observables=observables,
            detector=detector,
            local=chosen_local(self.local, system, observables),
            processes=DistributedContext.present(),
            **self.loop_arguments,
        )
