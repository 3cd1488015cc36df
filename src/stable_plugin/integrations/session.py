"""StABlE training within another training: the part that the callbacks of all trainers share."""

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

from stable_plugin.algorithm.energy_zero import EnergyZero
from stable_plugin.algorithm.estimator import Estimate, Estimates
from stable_plugin.algorithm.gradients import (
    MarginWeight,
    ObservableWeight,
    TemporaryLearningRate,
    add_gradients,
    norm,
)
from stable_plugin.algorithm.records import Progress, WindowRecord
from stable_plugin.algorithm.replica_pool import UnusablePotentialError
from stable_plugin.algorithm.systems_loop import AnyLoop
from stable_plugin.config import StABlEConfig
from stable_plugin.integrations.build import build_training_loop
from stable_plugin.integrations.progress import ProgressLine
from stable_plugin.integrations.resume import ResumePoint
from stable_plugin.runtime.distributed import DistributedContext

log = logging.getLogger(__name__)

MAX_NONFINITE_STEPS = 3
"""Consecutive gradients that are not finite after which a run ends."""


class NonFiniteGradientError(FloatingPointError):
    """The gradient of the objective was not finite in several consecutive optimizer steps."""


class Session:
    """Runs StABlE training inside a trainer's loop; the trainer's callback decides when, and where numbers are logged.

    The trainer owns the optimizer. :meth:`before_step` adds the observable's gradient to the one that the trainer's own loss
    left in the parameters, :meth:`after_step` restores the learning rate.

    Args:
        config: The settings.

    Attributes:
        resume: Where the run continues after an interruption.
        users_loss: Loss of the trainer in the present optimizer step, which the weight of the margin follows; None if it is not
            known.
    """

    def __init__(self, config: StABlEConfig) -> None:
        self.config = config
        self.weight = ObservableWeight(config.observable_weight, config.gradient_ratio)
        self.margin_weight = MarginWeight(config.margin_weight)
        self.resume = ResumePoint()
        self.users_loss: float | None = None
        self._loop: AnyLoop | None = None
        self._zero: EnergyZero | None = None
        self._has_gradient = False
        self._loaded: dict[str, Any] = {}
        self._pending: dict[str, Any] | None = None
        self._learning_rate = TemporaryLearningRate()
        self._n_logged_windows = 0
        self._n_nonfinite = 0
        self._folder = Path()
        self._line = ProgressLine(config.window_ps, enabled=False)
        self._on_progress: Callable[[], None] = lambda: None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config!r})"

    @property
    def has_begun(self) -> bool:
        """Whether :meth:`begin` has built the loop."""
        return self._loop is not None

    @property
    def loop(self) -> AnyLoop:
        """The loop, once :meth:`begin` has built it."""
        if self._loop is None:
            raise RuntimeError("StABlE training has not begun: the loop is built when training starts.")
        return self._loop

    @property
    def done(self) -> bool:
        """Whether the failure rate is verified, or ``max_windows`` is reached."""
        return self._loop is not None and self._loop.phase == "done"

    @property
    def is_verified(self) -> bool:
        """Whether the failure rate is below ``max_failures_per_ns`` with the present weights, on every system."""
        return self.done and all(each.is_verified for each in self.loop.verifications())

    def begin(
        self,
        module: nn.Module,
        dataloader: Any,
        folder: str | Path,
        line: ProgressLine,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        """Build the loop, and load the state of the checkpoint, if there is one.

        Args:
            module: Module that holds the potential.
            dataloader: Training data.
            folder: Folder for the worst frame of an unusable potential.
            line: Progress line.
            on_progress: Called every few steps of a simulation; may raise to interrupt it.
        """
        self._loop = build_training_loop(self.config, module, dataloader)
        self._zero = self._loop.energy_zero()
        self._n_logged_windows = 0
        if self._pending is not None:
            self._loop.load_state_dict(self._pending["loop"])
            self._zero.load_state_dict(self._pending["energy_zero"])
            self._n_logged_windows = self._pending["n_logged_windows"]
            self._pending = None
        self._folder, self._line, self._on_progress = Path(folder), line, on_progress

    def simulate(self) -> None:
        """Probe and verify, unless training is in a learning phase."""
        with self._monitored() as loop:
            loop.simulation_phase()

    def gradient(self, users_loss: float | None = None) -> Estimates | None:
        """Return the gradient of each objective for the next optimizer step, or None when training is done.

        Args:
            users_loss: Loss of the trainer, averaged over the processes; None if it is not known.
        """
        self._hold_energies(EnergyZero.mark)
        with self._monitored() as loop:
            estimates = loop.gradient(users_loss)
        self._has_gradient = estimates is not None
        return estimates

    def before_step(self, optimizer: optim.Optimizer) -> dict[str, float] | None:
        """Add the gradients of the objectives to the parameters, and set the learning rate of the next step.

        Args:
            optimizer: The optimizer whose step follows.

        Returns:
            Numbers to log, or None when training is done: the parameters then have no gradient, so that the weights that
            passed the simulation are the weights that the user gets.

        Raises:
            ValueError: If the optimizer does not hold the parameters of the simulated potential.
            NonFiniteGradientError: If the gradient of an objective was not finite three times in a row.
        """
        parameters = self.loop.potential.trainable_parameters()
        _check_optimizer(optimizer, parameters)
        users_loss = self._mean_over_processes(self.users_loss)
        estimates = self.gradient(users_loss)
        if estimates is None:
            optimizer.zero_grad(set_to_none=True)
            return None
        numbers = {"stable/unstable_fraction": self.loop.unstable_fraction or 0.0}
        own = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.is_nonfinite(estimates, own):
            optimizer.zero_grad(set_to_none=True)
            return {**numbers, "stable/nonfinite_steps": self._n_nonfinite}
        for objective, estimate in estimates.items():
            factor = self._factor(objective, estimate, own, users_loss)
            add_gradients(parameters, estimate.gradients, factor)
            name = objective.removesuffix("s")
            numbers |= {
                f"stable/{name}_loss": estimate.loss,
                f"stable/{name}_weight": factor,
                f"stable/{name}_gradient_norm": norm(estimate.gradients),
            }
        if "observables" in estimates:
            numbers["stable/ess_fraction"] = estimates["observables"].ess_fraction
        rate = self._learning_rate.set(optimizer, self.config.learning_rate, self.loop.lr_factor)
        self.loop.learning_rates.append(rate)
        return {**numbers, "stable/simulated_ps": self.loop.simulated_ps}

    def _factor(self, objective: str, estimate: Estimate, own: Sequence[Tensor], users_loss: float | None) -> float:
        if objective == "margin":
            return self.margin_weight(users_loss)
        return self.weight(estimate.gradients, own, new_window=self.loop.is_new_window)

    def _mean_over_processes(self, loss: float | None) -> float | None:
        if loss is None:
            return None
        context = self.loop.context
        device = self.loop.potential.device
        return float(context.sum(torch.tensor(loss, dtype=torch.float64, device=device))) / context.size

    def is_nonfinite(self, estimates: Estimates, own: Sequence[Tensor] = ()) -> bool:
        """Return whether a gradient is not finite, so that the step must not be taken.

        Args:
            estimates: Estimates of the objectives.
            own: Gradient of the trainer's own loss, where it is known.

        Raises:
            NonFiniteGradientError: If it is the gradient of an objective for the third time in a row.
        """
        if all(isfinite(norm(estimate.gradients)) for estimate in estimates.values()):
            self._n_nonfinite = 0
            if isfinite(norm(own)):
                return False
            # With scaled losses in half precision this happens now and then, and the gradient scaler handles it.
            log.warning("the gradient of the trainer's own loss is not finite: this step is skipped.")
            return True
        self._n_nonfinite += 1
        latest = self.loop.windows[-1].window
        if self._n_nonfinite == MAX_NONFINITE_STEPS:
            raise NonFiniteGradientError(
                f"the gradient of the objective was not finite in {MAX_NONFINITE_STEPS} consecutive optimizer steps up to "
                f"window {latest}; none of them was taken, the weights are those before. Lower the learning rate, or set a "
                "smaller discard limit of the detector."
            )
        log.warning("window %d: the gradient of the objective is not finite: this step is skipped.", latest)
        return True

    def after_step(self, optimizers: Iterable[optim.Optimizer]) -> None:
        """Restore the optimizers' own learning rates, and the zero of energy, which the step has moved."""
        # An interrupted step, which is taken again, must not move the energies.
        if self._has_gradient:
            self._hold_energies(EnergyZero.restore)
            self._has_gradient = False
        for optimizer in optimizers:
            self._learning_rate.restore(optimizer)

    def warn_late_start(self, max_epochs: int | None, max_steps: int | None, steps_per_epoch: float | None) -> None:
        """Warn if the trainer ends before ``start_epoch``.

        Args:
            max_epochs: Epochs of the trainer; no limit if None.
            max_steps: Optimizer steps of the trainer; no limit if None.
            steps_per_epoch: Optimizer steps of one epoch; None if not known.
        """
        start = self.config.start_epoch
        limits = []
        if max_epochs is not None and start >= max_epochs:
            limits.append(f"max_epochs={max_epochs}")
        if max_steps is not None and steps_per_epoch is not None and start * steps_per_epoch >= max_steps:
            limits.append(f"max_steps={max_steps} ({max_steps / steps_per_epoch:.3g} epochs)")
        if limits:
            log.warning(
                "start_epoch=%d is not below %s of the training, so no StABlE step will be taken: lower start_epoch or raise "
                "the limit.",
                start,
                " and ".join(limits),
            )

    def log_verification(self) -> None:
        """Log the bound of the failure rate that each system ends with; warn of those that are not verified."""
        for each in self.loop.verifications():
            if each.is_verified:
                log.info("%s", each)
            else:
                log.warning("%s Raise max_epochs, max_steps or max_windows and resume.", each)

    def warn_energy_drift(self) -> None:
        """Warn of a drift of the energies' zero that the model keeps no constant for."""
        self._hold_energies(EnergyZero.warn)

    def _hold_energies(self, action: Callable[[EnergyZero], None]) -> None:
        if self._zero is None or self._loop is None:
            return
        with torch.autocast(self._loop.potential.device.type, enabled=False):
            action(self._zero)

    def new_windows(self) -> list[dict[str, float]]:
        """Return numbers to log of the windows simulated since the last call."""
        windows = self.loop.windows[self._n_logged_windows :]
        self._n_logged_windows = len(self.loop.windows)
        for record in windows:
            log.info(
                "%swindow %d (%s, %.0f K): %.0f %% of the replicas unstable (%.0f to %.0f %%)%s, %.2f ps simulated, %.0f s",
                f"{record.system}: " if record.system else "",
                record.window,
                record.phase,
                record.temperature_K,
                100.0 * record.unstable_fraction,
                100.0 * record.unstable_low,
                100.0 * record.unstable_high,
                "" if record.observable_loss is None else f", observable loss {record.observable_loss:.2e}",
                record.simulated_ps,
                record.wall_s,
            )
        return [_numbers(record) for record in windows]

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all processes; every process must call this."""
        if self._loop is None or self._zero is None:
            return self._loaded
        own = {
            "loop": self._loop.state_dict(),
            "energy_zero": self._zero.state_dict(),
            "resume": self.resume.state_dict(),
            "users_loss": self.users_loss,
            "n_logged_windows": self._n_logged_windows,
        }
        return {
            "processes": self._loop.context.gather(own),
            "weight": self.weight.state_dict(),
            "margin_weight": self.margin_weight.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned: the loop's part once it is built, the global random streams at once.

        Args:
            state_dict: The state of all processes.

        Raises:
            ValueError: If the state is of another number of processes.
        """
        if not state_dict:
            return
        context, states = DistributedContext.current(), state_dict["processes"]
        if len(states) != context.size:
            raise ValueError(
                f"the checkpoint holds the replicas of {len(states)} process(es), this run has {context.size}: resume with "
                "the same number of processes."
            )
        own = states[context.rank]
        self._loaded, self._pending = state_dict, own
        self.resume.load_state_dict(own["resume"])
        self.users_loss = own["users_loss"]
        self.weight.load_state_dict(state_dict["weight"])
        self.margin_weight.load_state_dict(state_dict["margin_weight"])

    @contextmanager
    def _monitored(self) -> Iterator[AnyLoop]:
        """Yield the loop with a progress line; save the worst frame if the potential turns out to be unusable."""

        def show(progress: Progress) -> None:
            self._line.show(progress)
            self._on_progress()

        self.loop.on_progress = show
        try:
            # Within a training_step the trainer may use less precision than a simulation needs.
            with torch.autocast(self.loop.potential.device.type, enabled=False):
                yield self.loop
        except UnusablePotentialError as error:
            path = self._folder / f"worst_frame{self.loop.context.suffix}.extxyz"
            path.parent.mkdir(parents=True, exist_ok=True)
            ase.io.write(path, error.frame)
            error.args = (f"{error} The worst frame is in {path}.",)
            raise
        finally:
            self._line.close()


def _numbers(record: WindowRecord) -> dict[str, float]:
    prefix = f"stable/{record.system}" if record.system else "stable"
    numbers = {
        f"{prefix}/{record.phase}/unstable_fraction": record.unstable_fraction,
        f"{prefix}/{record.phase}/unstable_fraction_low": record.unstable_low,
        f"{prefix}/{record.phase}/unstable_fraction_high": record.unstable_high,
        f"{prefix}/window": record.window,
        f"{prefix}/simulated_ps": record.simulated_ps,
    }
    if record.observable_loss is not None:
        numbers[f"{prefix}/{record.phase}/observable_loss"] = record.observable_loss
    if record.bound_per_ns is not None:
        numbers[f"{prefix}/{record.phase}/failures_per_ns_bound"] = record.bound_per_ns
    return numbers


def _check_optimizer(optimizer: optim.Optimizer, parameters: Sequence[Tensor]) -> None:
    if isinstance(optimizer, optim.LBFGS):
        raise ValueError(
            "LBFGS evaluates the loss several times in one step, but a step on frames of a simulation has one gradient: use an "
            "optimizer such as Adam or SGD."
        )
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in held for parameter in parameters):
        raise ValueError(
            f"{type(optimizer).__name__} holds none of the {len(parameters)} parameters of the simulated potential, so its "
            "steps cannot repair it: construct the optimizer with the model's parameters."
        )
