"""The arguments of a StABlE run that callback and mixin share, and the loop made from them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from stable_plugin import checks
from stable_plugin.detectors import BondDeviation, Detector
from stable_plugin.frames import Frames, read_frames
from stable_plugin.loop import StABlELoop
from stable_plugin.observables import BondAmplitudes, BondLengths, Observable
from stable_plugin.phases import Schedule
from stable_plugin.potentials import find_potential
from stable_plugin.simulation import Integrator, Langevin
from stable_plugin.systems import System, stack_positions
from stable_plugin.training.structures import training_structures

log = logging.getLogger(__name__)


class LoopSettings:
    """What a :class:`~stable_plugin.loop.StABlELoop` is made from, before the model and the data are known.

    Files are read and numbers checked here, at once.

    Args:
        structures: See :class:`~stable_plugin.StABlECallback`, as for all arguments.
        reference: Likewise.
        bonds: Likewise.
        observables: Likewise.
        integrator: Likewise.
        detector: Likewise.
        schedule: Likewise.
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
        **loop_arguments: Any,
    ) -> None:
        checks.count("n_replicas", loop_arguments["n_replicas"])
        self.structures = None if structures is None else read_frames(structures, "structures")
        self.reference = None if reference is None else read_frames(reference, "reference")
        self.bonds = bonds
        self.observables = [observables] if isinstance(observables, Observable) else observables
        self.loop_arguments: dict[str, Any] = {
            "integrator": integrator or Langevin(),
            "detector": detector or BondDeviation(),
            "schedule": schedule or Schedule(),
            **loop_arguments,
        }

    def build(self, module: nn.Module, dataloader: Any) -> StABlELoop:
        """The loop for a model and its training data.

        Args:
            module: Holds the potential.
            dataloader: Training data, the source of structures and reference where none were given.

        Raises:
            ValueError: If structures, reference, model and settings do not fit together.
            TypeError: If potential or structures cannot be found.
        """
        structures = self.structures or training_structures(module, dataloader)
        reference = self.reference or structures
        system = System.from_atoms(reference[0], self.bonds)
        observables = list(self.observables or [BondLengths(), BondAmplitudes()])
        loop = StABlELoop(
            find_potential(module, system),
            stack_positions(structures, system, "structures"),
            stack_positions(reference, system, "reference"),
            observables=observables,
            **self.loop_arguments,
        )
        log.info(
            "StABlE: %d replicas of %s (%d bonds) from %d structures, targets from %d frames, %s, observables %s, "
            "%s at %g K",
            self.loop_arguments["n_replicas"],
            reference[0].get_chemical_formula(),
            len(system.bonds),
            len(structures),
            len(reference),
            self.loop_arguments["detector"],
            ", ".join(observable.name for observable in observables),
            type(self.loop_arguments["integrator"]).__name__,
            self.loop_arguments["integrator"].temperature_K,
        )
        return loop
