"""One StABlE phase beside somebody else's training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any

import ase.io
import torch
from torch import Tensor, nn, optim

from stable_plugin.algorithm.estimator import Estimate
from stable_plugin.algorithm.gradients import ObservableWeight, TemporaryLearningRate, Weight, add_gradients, norm
from stable_plugin.algorithm.training_loop import Progress, TrainingLoop, UnusablePotentialError, WindowRecord
from stable_plugin.integrations.progress import ProgressLine
from stable_plugin.integrations.settings import LoopSettings
from stable_plugin.runtime import checks
from stable_plugin.runtime.distributed import DistributedContext
from stable_plugin.runtime.random_state import random_state, restore_random_state

log = logging.getLogger(__name__)

MAX_NONFINITE_STEPS = 3
"""So many gradients in a row that are not finite end a run."""


class NonFiniteGradientError(FloatingPointError):
    """The gradient of the observables was not finite, several optimizer steps in a row."""


class Session:
    """What the callbacks of all trainers do: they only say when, and where the numbers go.

    The trainer owns the optimizer. :meth:`before_step` adds the observable's gradient to what the trainer's own loss
    left in the parameters, :meth:`after_step` undoes what was borrowed for the step.

    Args:
        settings: What the loop is made from.
        learning_rate: Of the steps that the observable takes part in; the optimizer's own if None.
        observable_weight: Factor of the observable's gradient, or ``auto``.
        gradient_ratio: Length of the observable's gradient relative to the other, for ``auto``.

    Attributes:
        batches: What the trainer's adapter wants back when it resumes in the middle of an epoch, and the global random
            streams under ``start`` that the epoch began with.
    """

    def __init__(
        self, settings: LoopSettings, learning_rate: float | None, observable_weight: Weight, gradient_ratio: float
    ) -> None:
        if learning_rate is not None:
            checks.number("learning_rate", learning_rate, above=0)
        self.settings = settings
        self.learning_rate = learning_rate
        self.weight = ObservableWeight(observable_weight, gradient_ratio)
        self._loop: TrainingLoop | None = None
        self.batches: dict[str, Any] = {}
        self._loaded: dict[str, Any] = {}
        self._resumed: dict[str, Any] | None = None
        self._random_loaded: dict[str, Any] = {}
        self._random_at_rest: dict[str, Any] | None = None
        self._rate = TemporaryLearningRate()
        self._n_logged_windows = 0
        self._nonfinite_steps = 0
        self._folder = Path()
        self._show_progress = False
        self._on_progress: Callable[[], None] = lambda: None

    @property
    def begun(self) -> bool:
        """Whether there is a loop yet."""
        return self._loop is not None

    @property
    def loop(self) -> TrainingLoop:
        """The loop, once :meth:`begin` has made it."""
        if self._loop is None:
            raise RuntimeError("StABlE training has not begun: the loop is made when training starts.")
        return self._loop

    @property
    def done(self) -> bool:
        """Whether the replicas were stable for the time asked for, or the windows are used up."""
        return self._loop is not None and self._loop.phases.name == "done"

    def begin(
        self,
        module: nn.Module,
        dataloader: Any,
        folder: str | Path,
        show_progress: bool,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        """Find potential, structures and reference, and take up the state that was loaded, if any.

        Args:
            module: Holds the potential.
            dataloader: Training data.
            folder: Where the worst frame goes if the potential turns out unusable.
            show_progress: Whether to show a progress line while simulating.
            on_progress: Called every few steps of a simulation; may raise to interrupt it.
        """
        self._loop = self.settings.build(module, dataloader)
        self._n_logged_windows = 0
        if self._resumed is not None:
            self._loop.load_state_dict(self._resumed["loop"])
            self._n_logged_windows = self._resumed["n_logged_windows"]
            self._resumed = None
        self._folder, self._show_progress, self._on_progress = Path(folder), show_progress, on_progress

    def simulate(self) -> None:
        """Run the simulation phase, if training is in one."""
        with self._watched() as loop:
            loop.simulation_phase()

    def gradient(self) -> Estimate | None:
        """The observable's gradient for the next optimizer step; None when training is done."""
        with self._watched() as loop:
            return loop.gradient()

    def before_step(self, optimizer: optim.Optimizer) -> dict[str, float] | None:
        """Make the optimizer's next step follow both gradients.

        Returns:
            Numbers to log, or None when training is done: the parameters then have no gradient, so that the weights
            that passed the simulation are the weights the user gets.

        Raises:
            ValueError: If the optimizer does not hold the parameters that are simulated with.
            NonFiniteGradientError: If the observables' gradient was not finite three times in a row.
        """
        parameters = self.loop.potential.trainable_parameters()
        _refuse_foreign(optimizer, parameters)
        estimate = self.gradient()
        if estimate is None:
            optimizer.zero_grad(set_to_none=True)
            return None
        latest = self.loop.windows[-1]
        own = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.is_nonfinite(estimate, own):
            optimizer.zero_grad(set_to_none=True)
            return {
                "stable/unstable_fraction": latest.unstable_fraction,
                "stable/nonfinite_steps": self._nonfinite_steps,
            }
        factor = self.weight(estimate.gradients, own, new_window=latest.steps == 1)
        add_gradients(parameters, estimate.gradients, factor)
        latest.learning_rate = self._rate.set(optimizer, self.learning_rate, self.loop.lr_factor)
        return {
            "stable/unstable_fraction": latest.unstable_fraction,
            "stable/observable_loss": estimate.loss,
            "stable/ess_fraction": estimate.ess_fraction,
            "stable/simulated_ps": self.loop.simulated_ps,
            "stable/observable_weight": factor,
            "stable/observable_gradient_norm": norm(estimate.gradients),
        }

    def is_nonfinite(self, estimate: Estimate, own: Sequence[Tensor] = ()) -> bool:
        """Whether a gradient is not finite, and the step must not be taken.

        Args:
            estimate: Of the observables.
            own: Gradient of the trainer's own loss, as far as it is known.

        Raises:
            NonFiniteGradientError: If it is the observables' for the third time in a row.
        """
        if isfinite(norm(estimate.gradients)):
            self._nonfinite_steps = 0
            if isfinite(norm(own)):
                return False
            # With scaled losses in half precision this happens now and then, and the scaler knows what to do.
            log.warning("the gradient of the trainer's own loss is not finite, this step is not taken.")
            return True
        self._nonfinite_steps += 1
        latest = self.loop.windows[-1].window
        if self._nonfinite_steps == MAX_NONFINITE_STEPS:
            raise NonFiniteGradientError(
                f"the gradient of the observables is not finite, {MAX_NONFINITE_STEPS} optimizer steps in a row up to window "
                f"{latest}; none of them was taken, the weights are those before. Lower the learning rate, or give the "
                "detector a smaller discard limit."
            )
        log.warning("window %d: the gradient of the observables is not finite, this step is not taken.", latest)
        return True

    def after_step(self, optimizers: Iterable[optim.Optimizer]) -> None:
        """Give the learning rate back to its scheduler."""
        for optimizer in optimizers:
            self._rate.give_back(optimizer)

    def new_windows(self) -> list[dict[str, float]]:
        """Numbers to log of the windows simulated since the last call."""
        rounds = self.loop.windows[self._n_logged_windows :]
        self._n_logged_windows = len(self.loop.windows)
        for entry in rounds:
            log.info(
                "window %d (%s): %.0f %% of the replicas unstable, observable loss %.2e, %.2f ps simulated, %.0f s",
                entry.window,
                entry.phase,
                100.0 * entry.unstable_fraction,
                entry.observable_loss,
                entry.simulated_ps,
                entry.wall_s,
            )
        return [_numbers(entry) for entry in rounds]

    def state_dict(self) -> dict[str, Any]:
        """Phase, replicas, rounds and random streams, the global ones included, of all processes, which all call this."""
        if self._loop is None:
            return self._loaded
        own = {
            "loop": self._loop.state_dict(),
            "random": self._random_at_rest or random_state(),
            "batches": self.batches,
            "n_logged_windows": self._n_logged_windows,
        }
        return {"processes": self._loop.processes.gather(own), "weight": self.weight.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave: the loop's once it exists, the global random streams at once.

        Trainers draw the order of the first batches before they say that training starts.

        Raises:
            ValueError: If the state is of another number of processes.
        """
        if not state_dict:
            return
        processes, states = DistributedContext.present(), state_dict["processes"]
        if len(states) != processes.size:
            raise ValueError(
                f"the checkpoint holds the replicas of {len(states)} process(es), this run has {processes.size}: resume with "
                "as many."
            )
        own = states[processes.rank]
        self._loaded, self._resumed = state_dict, own
        self.batches = own["batches"]
        # Who goes on in the middle of an epoch needs its order of batches first.
        self._random_loaded = self.batches.get("start", own["random"])
        self.restore_random()
        self.weight.load_state_dict(state_dict["weight"])

    def restore_random(self) -> None:
        """Put the global random streams back to where they were when the state was saved."""
        restore_random_state(self._random_loaded)

    def at_rest(self, resting: bool = True) -> None:
        """Note the global random streams between two steps: the next one is taken again if it is interrupted.

        Args:
            resting: Whether an interruption goes back to now; otherwise it goes back to whenever it comes.
        """
        self._random_at_rest = random_state() if resting else None

    def interrupted_at(self, random: dict[str, Any]) -> None:
        """Have what is saved from now on go back to these global random streams."""
        self._random_at_rest = random

    @contextmanager
    def _watched(self) -> Iterator[TrainingLoop]:
        """The loop with a progress line, and with the worst frame saved if the potential turns out unusable."""
        line = ProgressLine(self.loop, self._show_progress)

        def show(progress: Progress) -> None:
            line.show(progress)
            self._on_progress()

        self.loop.on_progress = show
        try:
            # Within a training_step the trainer may have asked for less precision than a simulation needs.
            with torch.autocast(self.loop.potential.device.type, enabled=False):
                yield self.loop
        except UnusablePotentialError as error:
            path = self._folder / f"worst_frame{self.loop.processes.suffix}.extxyz"
            path.parent.mkdir(parents=True, exist_ok=True)
            ase.io.write(path, error.frame)
            error.args = (f"{error} The worst frame is in {path}.",)
            raise
        finally:
            line.close()


def _numbers(entry: WindowRecord) -> dict[str, float]:
    assert entry.observable_loss is not None
    return {
        f"stable/{entry.phase}/unstable_fraction": entry.unstable_fraction,
        f"stable/{entry.phase}/observable_loss": entry.observable_loss,
        "stable/window": entry.window,
        "stable/simulated_ps": entry.simulated_ps,
    }


def _refuse_foreign(optimizer: optim.Optimizer, parameters: Sequence[Tensor]) -> None:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in held for parameter in parameters):
        raise ValueError(
            f"{type(optimizer).__name__} holds none of the {len(parameters)} parameters of the potential that is "
            "simulated with, so its steps cannot repair it: give the optimizer the model's parameters."
        )
