"""The loops of several systems that one potential is trained on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from stable_plugin.algorithm.energy_zero import EnergyZero
from stable_plugin.algorithm.estimator import Estimate, Estimates
from stable_plugin.algorithm.records import Progress, Verification, WindowRecord
from stable_plugin.algorithm.replica_pool import UnusablePotentialError
from stable_plugin.algorithm.schedule import Phase
from stable_plugin.algorithm.training_loop import TrainingLoop
from stable_plugin.models.base import Potential
from stable_plugin.runtime.distributed import DistributedContext

log = logging.getLogger(__name__)


class SystemsLoop:
    """Trains one potential on several systems, each with a loop of its own.

    The systems take turns: each one is probed until it has something to learn from, or is verified. An optimizer step
    follows the weighted average of the gradients of those that learn. A system that was verified rests meanwhile; as the
    weights have changed since, it is probed and verified again when the others have finished. Training ends when all
    systems are verified with the same weights, or have used up their windows.

    Args:
        loops: Loops of the systems by name, at least one; their potentials hold the same module.
        weights: Weight of the gradient of each system, relative to the others.

    Attributes:
        windows: Records of the windows of all systems, in the order in which they were simulated.
        learning_rates: Learning rates of the optimizer steps so far.
    """

    def __init__(self, loops: Mapping[str, TrainingLoop], weights: Sequence[float]) -> None:
        self.loops = dict(loops)
        self.windows: list[WindowRecord] = []
        self.learning_rates: list[float] = []
        self._weights = dict(zip(loops, weights, strict=True))
        self._learning: list[str] = []
        # What is at hand for the next step, also if the simulation of a later system is interrupted.
        self._estimates: dict[str, Estimates] = {}
        self._n_gradients = 0
        self._done_at: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.loops)})"

    @property
    def potential(self) -> Potential:
        """The potential in training, on the first system."""
        return next(iter(self.loops.values())).potential

    @property
    def context(self) -> DistributedContext:
        """Processes that train together."""
        return next(iter(self.loops.values())).context

    @property
    def on_progress(self) -> Callable[[Progress], None]:
        """Called every few steps of a simulation; may raise to interrupt it."""
        return next(iter(self.loops.values())).on_progress

    @on_progress.setter
    def on_progress(self, call: Callable[[Progress], None]) -> None:
        for loop in self.loops.values():
            loop.on_progress = call

    @property
    def phase(self) -> Phase:
        """The present phase: ``learn`` if a system learns, ``done`` if all are done with the present weights."""
        phases = {loop.phase for loop in self.loops.values()}
        if "learn" in phases:
            return "learn"
        if "verify" in phases:
            return "verify"
        return "probe" if "probe" in phases or self._to_verify_again() else "done"

    @property
    def md_steps(self) -> int:
        """Timesteps simulated so far, summed over the replicas of all systems and processes."""
        return sum(loop.md_steps for loop in self.loops.values())

    @property
    def simulated_ps(self) -> float:
        """Time simulated so far per replica, summed over the systems, in ps."""
        return sum(loop.simulated_ps for loop in self.loops.values())

    @property
    def unstable_fraction(self) -> float | None:
        """Fraction of unstable replicas in the latest probes, averaged over the systems probed so far; None before."""
        fractions = [loop.unstable_fraction for loop in self.loops.values()]
        known = [each for each in fractions if each is not None]
        return sum(known) / len(known) if known else None

    @property
    def lr_factor(self) -> float:
        """Factor of the next step's learning rate: the smallest of the systems that learn."""
        return min(self.loops[name].lr_factor for name in self._learning)

    @property
    def is_new_window(self) -> bool:
        """Whether a window that was just simulated takes part in the latest gradient."""
        return any(self.loops[name].is_new_window for name in self._learning)

    def energy_zero(self) -> EnergyZero:
        """Return what holds the zero of energy on the start frames of all systems."""
        loops = list(self.loops.values())
        frames, cells = zip(*(loop.replicas.start_frames for loop in loops), strict=True)
        return EnergyZero([loop.potential for loop in loops], frames, cells, loops[0].replicas.model_calls)

    def verifications(self) -> list[Verification]:
        """Return what is known of each system's failure rate with the present weights."""
        outdated = self._outdated()
        return [each for name, loop in self.loops.items() for each in loop.verifications(outdated=name in outdated)]

    def simulation_phase(self) -> None:
        """Simulate the systems that do not learn until they have something to learn from, or are verified."""
        for name in self.loops:
            with self._collected(name) as loop:
                loop.simulation_phase()
                self._note_done(name)
        outdated = self._to_verify_again()
        if outdated and not any(loop.phase == "learn" for loop in self.loops.values()):
            log.info("the weights have changed since %s were verified: they are probed again", ", ".join(outdated))
            for name in outdated:
                self.loops[name].probe_again()
                del self._done_at[name]
            self.simulation_phase()

    def gradient(self, users_loss: float | None = None) -> Estimates | None:
        """Return the weighted averages of the systems' gradients, or None when training is done; simulate when needed.

        Args:
            users_loss: The user's loss at the present weights, averaged over the processes; None if it is not known.
        """
        while True:
            for name in self.loops:
                if name in self._estimates:
                    continue
                with self._collected(name) as loop:
                    own = None if loop.phase == "done" else loop.gradient(users_loss)
                if own is None:
                    self._note_done(name)
                else:
                    self._estimates[name] = own
            estimates = {name: self._estimates[name] for name in self.loops if name in self._estimates}
            self._estimates = {}
            self._learning = list(estimates)
            if estimates:
                self._n_gradients += 1
                objectives = dict.fromkeys(objective for own in estimates.values() for objective in own)
                return {
                    objective: self._average(
                        {name: own[objective] for name, own in estimates.items() if objective in own}
                    )
                    for objective in objectives
                }
            if self.phase == "done":
                return None
            self.simulation_phase()

    def _average(self, estimates: Mapping[str, Estimate]) -> Estimate:
        total = sum(self._weights[name] for name in estimates)
        fractions = [self._weights[name] / total for name in estimates]
        parts = list(estimates.values())
        return Estimate(
            loss=sum(fraction * part.loss for fraction, part in zip(fractions, parts, strict=True)),
            mean=torch.cat([part.mean for part in parts]),
            gradients=[
                torch.stack([fraction * each for fraction, each in zip(fractions, tensors, strict=True)]).sum(dim=0)
                for tensors in zip(*(part.gradients for part in parts), strict=True)
            ],
            ess_fraction=min(part.ess_fraction for part in parts),
        )

    def _note_done(self, name: str) -> None:
        if self.loops[name].phase == "done":
            self._done_at.setdefault(name, self._n_gradients)
        else:
            self._done_at.pop(name, None)

    def _outdated(self) -> list[str]:
        """Return the systems that are done with weights that have changed since."""
        return [
            name
            for name, loop in self.loops.items()
            if loop.phase == "done" and self._done_at.get(name, self._n_gradients) < self._n_gradients
        ]

    def _to_verify_again(self) -> list[str]:
        return [name for name in self._outdated() if self.loops[name].tracker.is_verified]

    @contextmanager
    def _collected(self, name: str) -> Iterator[TrainingLoop]:
        """Yield a loop, and collect the records of its new windows, also if it is interrupted."""
        loop = self.loops[name]
        n_before = len(loop.windows)
        try:
            yield loop
        except UnusablePotentialError as error:
            error.args = (f"{name}: {error}",)
            raise
        finally:
            self.windows += loop.windows[n_before:]

    def state_dict(self) -> dict[str, Any]:
        """Return everything that this process needs to continue as if it had not been interrupted."""
        return {
            "loops": {name: loop.state_dict() for name, loop in self.loops.items()},
            "order": [record.system for record in self.windows],
            "n_gradients": self._n_gradients,
            "done_at": dict(self._done_at),
            "learning": list(self._learning),
            "learning_rates": list(self.learning_rates),
            "estimates": {
                name: {objective: vars(each) for objective, each in own.items()}
                for name, own in self._estimates.items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Args:
            state: The state of this process.

        Raises:
            ValueError: If the state is of other systems.
        """
        if "loops" not in state or set(state["loops"]) != set(self.loops):
            raise ValueError(
                f"the checkpoint is of {_described(state)}, this run has the systems {sorted(self.loops)}: resume with the same "
                "systems."
            )
        for name, loop in self.loops.items():
            loop.load_state_dict(state["loops"][name])
        records = {name: iter(loop.windows) for name, loop in self.loops.items()}
        self.windows = [next(records[name]) for name in state["order"]]
        self._n_gradients, self._done_at = state["n_gradients"], dict(state["done_at"])
        self._learning = list(state["learning"])
        self.learning_rates = list(state["learning_rates"])
        device = self.potential.device
        self._estimates = {
            name: {objective: _loaded(each, device) for objective, each in own.items()}
            for name, own in state["estimates"].items()
        }


def _loaded(state: Mapping[str, Any], device: torch.device) -> Estimate:
    return Estimate(
        loss=state["loss"],
        mean=state["mean"].to(device),
        gradients=[gradient.to(device) for gradient in state["gradients"]],
        ess_fraction=state["ess_fraction"],
    )


def _described(state: Mapping[str, Any]) -> str:
    return f"the systems {sorted(state['loops'])}" if "loops" in state else "one system"


AnyLoop = TrainingLoop | SystemsLoop
"""The loop of one system, or of several."""
