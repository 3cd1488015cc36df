"""The loop of StABlE training, without a trainer: probe, learn with gradients of observables, verify.

Source: Raja, Amin, Pedregosa and Krishnapriyan, TMLR 2025, arXiv:2402.13984, section 3.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from math import ceil, isfinite
from typing import Any

from stable_plugin.algorithm.energy_zero import EnergyZero
from stable_plugin.algorithm.estimator import Estimate, Estimates
from stable_plugin.algorithm.failure_margin import FailureMargin
from stable_plugin.algorithm.frame_buffer import FrameBuffer
from stable_plugin.algorithm.records import Progress, Verification, WindowRecord
from stable_plugin.algorithm.replica_pool import ReplicaPool
from stable_plugin.algorithm.schedule import Phase, PhaseTracker
from stable_plugin.algorithm.step_plan import StepPlan
from stable_plugin.algorithm.step_size import LearningRateScale
from stable_plugin.algorithm.window_data import WindowData, WindowEstimator
from stable_plugin.config import StABlEConfig
from stable_plugin.md.simulator import Simulator
from stable_plugin.md.state import State
from stable_plugin.md.window import Window
from stable_plugin.models.base import Potential
from stable_plugin.runtime.distributed import DistributedContext
from stable_plugin.runtime.intervals import binomial_limits

log = logging.getLogger(__name__)

REMEDY = "Raise learning_rate, or allow more windows or patience in the schedule."


class TrainingLoop:
    """Simulates with a potential in training and estimates gradients of the observables' loss.

    The caller owns the optimizer: it asks for :meth:`gradient`, applies it, and asks again.
    :func:`~stable_plugin.algorithm.assembly.assemble` builds a loop from a potential and frames.

    Args:
        config: The settings.
        replicas: The replicas and their simulator.
        estimator: Turns windows into samples of the observables, and samples into gradients.
        margin: Finds frames near failures, and estimates gradients on them; None if the objective is ``boltzmann``.
        name: Name of the system in records, where several are trained on.

    Attributes:
        windows: Records of the windows simulated so far.
        learning_rates: Learning rates of the optimizer steps so far.
        buffer: Frames near failures of all windows so far.
        on_progress: Called every few steps of a simulation; may raise to interrupt it.
    """

    def __init__(
        self,
        config: StABlEConfig,
        replicas: ReplicaPool,
        estimator: WindowEstimator,
        margin: FailureMargin | None = None,
        name: str = "",
    ) -> None:
        self.config = config
        self.name = name
        self.replicas = replicas
        self.estimator = estimator
        self.margin = margin
        self.buffer = FrameBuffer()
        self.tracker = PhaseTracker(config.schedule)
        self.lr_scale = LearningRateScale(config.max_lr_scale, config.steps_per_window, config.min_ess_fraction)
        self.plan = StepPlan(config.steps_per_window)
        self.windows: list[WindowRecord] = []
        self.learning_rates: list[float] = []
        self.on_progress: Callable[[Progress], None] = lambda progress: None
        # Every how many recorded frames the observables see one.
        self._stride = config.record_steps // config.recorded_steps
        self._data: WindowData | None = None
        self._steps: int | None = None
        self._latest: Estimate | None = None

    @property
    def potential(self) -> Potential:
        """The potential in training."""
        return self.simulator.potential

    @property
    def simulator(self) -> Simulator:
        """The simulator of the replicas."""
        return self.replicas.simulator

    @property
    def phase(self) -> Phase:
        """The present phase: ``probe``, ``learn``, ``verify`` or ``done``."""
        return self.tracker.phase

    @property
    def context(self) -> DistributedContext:
        """Processes that train together."""
        return self.replicas.context

    @property
    def unstable_fraction(self) -> float | None:
        """Fraction of unstable replicas in the latest probe; None before its end."""
        return next((each.unstable_fraction for each in reversed(self.windows) if each.phase == "probe"), None)

    @property
    def is_new_window(self) -> bool:
        """Whether the latest gradient is the first one from its window."""
        return self._steps == 1

    def energy_zero(self) -> EnergyZero:
        """Return what holds the zero of energy on the start frames."""
        frames, cell = self.replicas.start_frames
        return EnergyZero([self.potential], [frames], [cell], self.replicas.model_calls)

    def verifications(self, *, outdated: bool = False) -> list[Verification]:
        """Return what is known of the failure rate with the present weights, in a list of one.

        Args:
            outdated: Whether the weights have changed since the last window.
        """
        tracker, replicas = self.tracker, self.replicas.n_replicas * self.context.size
        known = not outdated and tracker.phase in ("verify", "done") and tracker.exposure_ps > 0.0
        is_verified = tracker.is_verified and known
        verification = Verification(
            is_verified=is_verified,
            max_failures_per_ns=self.config.schedule.max_failures_per_ns,
            bound_per_ns=tracker.bound_per_ns if known else None,
            confidence=1.0 - tracker.error,
            failures=tracker.failures if known else 0,
            exposure_ps=tracker.exposure_ps if known else 0.0,
            remaining_ps=0.0 if is_verified else tracker.remaining_ps / replicas,
            reason="" if is_verified else _reason(tracker.phase, outdated),
            system=self.name,
        )
        return [verification]

    def probe_again(self) -> None:
        """Begin with a probe, because the weights have changed since the last verification."""
        self.tracker.probe_again()

    @property
    def md_steps(self) -> int:
        """Timesteps simulated so far, summed over the replicas of all processes."""
        return len(self.windows) * self.config.window_steps * self.replicas.n_replicas * self.replicas.context.size

    @property
    def simulated_ps(self) -> float:
        """Time simulated so far per replica, in ps."""
        return len(self.windows) * self.config.window_steps * self.config.integrator.timestep_fs / 1000.0

    @property
    def lr_factor(self) -> float:
        """Factor of the next step's learning rate: cuts of the schedule, step size, and the fall in each cycle of steps."""
        planned = 1.0 if self.margin is None else self.plan.lr_factor
        return self.tracker.lr_factor * self.lr_scale.factor * planned

    def gradient(self, users_loss: float | None = None) -> Estimates | None:
        """Return the gradient of each objective for the next step, or None when training is done; simulate when needed.

        Args:
            users_loss: The user's loss at the present weights, averaged over the processes; None if it is not known.
        """
        estimates = self._estimates() if self._steps is not None and self._take_step(users_loss) else {}
        if not estimates:
            self._steps = self._data = None
            self.tracker.after_learning_steps()
            while self._steps is None and self.phase != "done":
                if self.phase == "learn":
                    self._learning_window()
                else:
                    self.simulation_phase()
            if self._steps is None:
                return None
            self._take_step(users_loss)
            estimates = self._estimates()
        assert self._steps is not None
        self._steps += 1
        latest = self.windows[-1]
        latest.steps = self._steps
        if "observables" in estimates:
            latest.ess_fraction = estimates["observables"].ess_fraction
        if "margin" in estimates:
            latest.margin_loss = estimates["margin"].loss
        return estimates

    def simulation_phase(self) -> None:
        """Probe, and verify if the probe is passed, until it is time to learn or training is done."""
        while self._steps is None and (self.phase == "probe" or self.phase == "verify"):
            if self.phase == "probe":
                self._probe()
            else:
                self._verification_window()

    def _probe(self) -> None:
        """Simulate one window from the start states of probes; observables are not learned from it."""
        with self.replicas.rollback_on_interrupt():
            self.replicas.begin_probe()
            window, wall_s = self._simulate("probe", self.replicas.state)
        failures, exposure_ps = self.replicas.failures(window)
        cuts = self.tracker.lr_cuts
        fraction = failures / (self.replicas.n_replicas * self.context.size)
        loss = self._observed_loss(window)
        phase = self.tracker.after_probe(failures, exposure_ps, fraction, loss)
        self._record("probe", window, wall_s, loss)
        self._remember(window)
        if phase == "learn" and self.margin is not None:
            self._learn_from(window)
        elif phase == "learn":
            self.replicas.begin_learning_phase(None)
        elif phase == "verify":
            self._log_verification()
            self.replicas.advance(window)
        if phase == "learn" and self.tracker.lr_cuts < cuts:
            self._warn("the learning rate was at its minimum, and returns to its first value")
        elif phase == "done":
            self._warn("max_windows is reached")

    def _verification_window(self) -> None:
        """Simulate one window in which stable replicas continue; if there are too many failures, learn from it."""
        window, wall_s = self._simulate("verify", self.replicas.state)
        phase = self.tracker.after_verification_window(*self.replicas.failures(window))
        self._record("verify", window, wall_s, self._observed_loss(window))
        self._remember(window)
        if phase == "learn":
            # This window was simulated under the present weights: it is the first one to learn from.
            self._learn_from(window)
        self.replicas.advance(window)

    def _learning_window(self) -> None:
        """Simulate one window from the learning phase's start states, and learn from it."""
        window, wall_s = self._simulate("learn", self.replicas.refreshed_learning_start())
        # Few failures in a learning window say nothing about observables.
        is_early = self.margin is not None and self.config.schedule.max_observable_loss is None
        self.tracker.after_learning_window(*(self.replicas.failures(window) if is_early else ()))
        is_heated = self.config.heating > 1.0
        self._record("learn", window, wall_s, None if is_heated else self._observed_loss(window))
        self._remember(window)
        self._learn_from(window)

    def _remember(self, window: Window) -> None:
        """Keep the frames of a window that are near failures."""
        if self.margin is not None:
            heating = self.windows[-1].temperature_K / self.config.integrator.temperature_K
            with self.replicas.model_calls():
                frames = self.margin.near_failures(window.positions, window.valid, self._stride, window.cell, heating)
            self.buffer.add(frames, self.replicas.streams.choices)

    def _learn_from(self, window: Window) -> None:
        """Take the next optimizer steps after this window."""
        self.replicas.begin_learning_phase(window, continues=self.margin is not None)
        if self.config.heating > 1.0 and self.windows[-1].phase != "learn":
            self.replicas.heat_learning_start()
        self._steps = 0
        self.lr_scale.begin_window()
        self.plan.begin_window()
        if self.config.uses_observables:
            self._data = self._collect(window.every(self._stride))

    def _log_verification(self) -> None:
        replica_ps = self.tracker.remaining_ps / (self.replicas.n_replicas * self.context.size)
        log.info(
            "%sverification: %.3g ps per replica (%d windows) without failures show less than %g failures per ns",
            f"{self.name}: " if self.name else "",
            replica_ps,
            ceil(replica_ps / self.config.window_ps * (1 - 1e-9)),
            self.config.schedule.max_failures_per_ns,
        )

    def _warn(self, reason: str) -> None:
        log.warning(
            "%s%.0f %% of the replicas are unstable in the latest probe: %s. %s",
            f"{self.name}: " if self.name else "",
            100.0 * self.windows[-1].unstable_fraction,
            reason,
            REMEDY,
        )

    def _take_step(self, users_loss: float | None) -> bool:
        """Count a step after the latest window, if one is due, and return whether it is."""
        if self.phase != "learn":
            return False
        if self.margin is None:
            return (self._steps or 0) < self.config.steps_per_window
        return self.plan.take_step(users_loss, self.windows[-1].margin_loss, settle=self.tracker.is_probe_due)

    def _estimates(self) -> Estimates:
        estimates: Estimates = {}
        # As long as the learning rate is zero, the estimate stays the same.
        if self.lr_factor != 0.0 or self._latest is None:
            self._latest = self._reweighted_estimate() if self._steps else self._first_estimate()
        if self._latest is not None:
            estimates["observables"] = self._latest
        if self.margin is not None:
            estimates["margin"] = self._margin_estimate(self.margin)
        return estimates

    def _margin_estimate(self, margin: FailureMargin) -> Estimate:
        choices = self.replicas.streams.choices
        frames = self.buffer.draw(self.config.margin_frames, choices)
        with self.replicas.model_calls():
            estimate, shortfall = margin.estimate(frames, choices)
        if frames is not None:
            self.buffer.update(shortfall)
        return estimate

    def _first_estimate(self) -> Estimate | None:
        if self._data is None:
            return None
        with self.replicas.model_calls():
            return self.estimator.estimate(self._data)

    def _reweighted_estimate(self) -> Estimate | None:
        """Return an estimate from the frames at hand, reweighted to the present parameters; None if they are used up."""
        if self._data is None:
            return None
        with self.replicas.model_calls():
            weights, fraction = self.estimator.reweight(self._data)
        self.lr_scale.update(fraction)
        if not fraction >= self.config.min_ess_fraction:  # also if it is NaN
            self._data = None
            return None
        with self.replicas.model_calls():
            return self.estimator.estimate(self._data, weights)

    def _collect(self, window: Window) -> WindowData:
        with self.replicas.model_calls():
            return self.estimator.collect(
                window.frames(), self.replicas.n_replicas, self.replicas.streams.choices, window.frame_cells()
            )

    def _simulate(self, phase: Phase, start: State) -> tuple[Window, float]:
        began = time.perf_counter()
        latest = self.windows[-1] if self.windows else None

        def show(steps: int) -> None:
            done_ps = steps * self.config.integrator.timestep_fs / 1000.0
            self.on_progress(
                Progress(phase, done_ps, self.simulated_ps + done_ps, latest, self.unstable_fraction, self.name)
            )

        return self.replicas.simulate(start, show, learning=phase == "learn"), time.perf_counter() - began

    def _record(self, phase: Phase, window: Window, wall_s: float, observable_loss: float | None) -> None:
        failures, exposure_ps = self.replicas.failures(window)
        replicas = self.replicas.n_replicas * self.context.size
        low, high = binomial_limits(failures, replicas)
        bound = self.tracker.bound_per_ns
        simulator = self.replicas.learning_simulator if phase == "learn" else self.simulator
        self.windows.append(
            WindowRecord(
                window=len(self.windows) + 1,
                phase=phase,
                simulated_ps=self.simulated_ps + window.duration_ps,
                unstable_fraction=failures / replicas,
                unstable_low=low,
                unstable_high=high,
                failures=failures,
                exposure_ps=exposure_ps,
                bound_per_ns=None if phase == "learn" or not isfinite(bound) else bound,
                temperature_K=simulator.integrator.temperature_K,
                observable_loss=observable_loss,
                wall_s=wall_s,
                system=self.name,
            )
        )
        self.replicas.streams.window = len(self.windows)

    def _observed_loss(self, window: Window) -> float:
        seen = window.every(self._stride)
        return self.estimator.observed_loss(seen.frames(), seen.frame_cells())

    def state_dict(self) -> dict[str, Any]:
        """Return everything that this process needs to continue as if it had not been interrupted."""
        return {
            "tracker": self.tracker.state_dict(),
            "windows": [asdict(record) for record in self.windows],
            "replicas": self.replicas.state_dict(),
            "steps": self._steps,
            "data": None if self._data is None else self._data.state_dict(),
            "buffer": self.buffer.state_dict(),
            "lr_scale": self.lr_scale.state_dict(),
            "plan": self.plan.state_dict(),
            "learning_rates": list(self.learning_rates),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Args:
            state: The state of this process.

        Raises:
            ValueError: If the state is of several systems.
        """
        if "loops" in state:
            raise ValueError(
                f"the checkpoint is of the systems {sorted(state['loops'])}, this run has one: resume with the same systems, or "
                "the same max_systems."
            )
        self.replicas.load_state_dict(state["replicas"])
        self.tracker.load_state_dict(state["tracker"])
        self.windows = [WindowRecord(**record) for record in state["windows"]]
        self._steps, data = state["steps"], state["data"]
        self.buffer.load_state_dict(state["buffer"])
        self._data = None if data is None else WindowData.from_state_dict(data, self.potential.device)
        self.lr_scale.load_state_dict(state["lr_scale"])
        self.plan.load_state_dict(state["plan"])
        self.learning_rates = list(state["learning_rates"])


def _reason(phase: Phase, outdated: bool) -> str:
    """Return why a potential is not verified."""
    if outdated:
        return "the weights have changed since the system was verified"
    if phase == "done":
        return "max_windows is reached"
    return f"training ended {'within a verification' if phase == 'verify' else 'before the next verification'}"
