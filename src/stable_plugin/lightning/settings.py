"""The arguments of a StABlE run that callback and mixin share, and the loop made from them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from stable_plugin import checks
from stable_plugin.detectors import BondDeviation, Detector
from stable_plugin.estimator import Loss, mean_squared_error
from stable_plugin.frames import Frames, read_frames
from stable_plugin.lightning.structures import training_structures
from stable_plugin.loop import StABlELoop
from stable_plugin.observables import BondAmplitudes, BondLengths, Observable
from stable_plugin.phases import Schedule
from stable_plugin.potentials import find_potential
from stable_plugin.simulation import Integrator, Langevin
from stable_plugin.systems import System, stack_positions

log = logging.getLogger(__name__)


class LoopSettings:
    """What a :class:`~stable_plugin.loop.StABlELoop` is made from, before the model and the data are known.

    Files are read and numbers checked here, at once; see :class:`~stable_plugin.StABlECallback` for the arguments.
    """

    def __init__(
        self,
        *,
        structures: Frames | None = None,
        reference: Frames | None = None,
        bonds: Sequence[tuple[int, int]] | None = None,
        integrator: Integrator | None = None,
        observables: Observable | Sequence[Observable] | None = None,
        detector: Detector | None = None,
        n_replicas: int = 32,
        window_ps: float = 0.4,
        record_every_fs: float = 25.0,
        check_every_fs: float = 5.0,
        schedule: Schedule | None = None,
        loss: Loss = mean_squared_error,
        steps_per_window: int = 6,
        min_effective_share: float = 0.3,
        rewind_share: float = 0.1,
        chunk: int = 64,
        seed: int = 0,
    ) -> None:
        checks.count("n_replicas", n_replicas)
        self.structures = None if structures is None else read_frames(structures, "structures")
        self.reference = None if reference is None else read_frames(reference, "reference")
        self.bonds = bonds
        self.observables = [observables] if isinstance(observables, Observable) else observables
        self.loop_arguments: dict[str, Any] = {
            "integrator": integrator or Langevin(),
            "detector": detector or BondDeviation(),
            "n_replicas": n_replicas,
            "window_ps": window_ps,
            "record_every_fs": record_every_fs,
            "check_every_fs": check_every_fs,
            "schedule": schedule or Schedule(),
            "loss": loss,
            "steps_per_window": steps_per_window,
            "min_effective_share": min_effective_share,
            "rewind_share": rewind_share,
            "chunk": chunk,
            "seed": seed,
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
