"""The loop of StABlE training, without a trainer: simulate windows, classify replicas, return gradients of observables.

Source: Raja, Amin, Pedregosa and Krishnapriyan, TMLR 2025, arXiv:2402.13984, section 3.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from stable_plugin.algorithm.energy_zero import EnergyZero
from stable_plugin.algorithm.estimator import Estimate
from stable_plugin.algorithm.records import Progress, WindowRecord
from stable_plugin.algorithm.replica_pool import ReplicaPool
from stable_plugin.algorithm.schedule import Phase, PhaseTracker
from stable_plugin.algorithm.step_size import LearningRateScale
from stable_plugin.algorithm.window_data import WindowData, WindowEstimator
from stable_plugin.config import StABlEConfig
from stable_plugin.md.simulator import Simulator
from stable_plugin.md.state import State
from stable_plugin.md.window import Window
from stable_plugin.models.base import Potential
from stable_plugin.runtime.distributed import DistributedContext

log = logging.getLogger(__name__)

REMEDY = "Raise gradient_ratio or learning_rate, or allow more windows or patience in the schedule."


class TrainingLoop:
    """Simulates with a potential in training and estimates gradients of the observables' loss.

    The caller owns the optimizer: it asks for :meth:`gradient`, applies it, and asks again.
    :func:`~stable_plugin.algorithm.assembly.assemble` builds a loop from a potential and frames.

    Args:
        config: The settings.
        replicas: The replicas and their simulator.
        estimator: Turns windows into samples, and samples into gradients.
        name: Name of the system in records, where several are trained on.

    Attributes:
        windows: Records of the windows simulated so far.
        on_progress: Called every few steps of a simulation; may raise to interrupt it.
    """

    def __init__(self, config: StABlEConfig, replicas: ReplicaPool, estimator: WindowEstimator, name: str = "") -> None:
        self.config = config
        self.name = name
        self.replicas = replicas
        self.estimator = estimator
        self.tracker = PhaseTracker(config.schedule)
        self.lr_scale = LearningRateScale(config.max_lr_scale, config.steps_per_window, config.min_ess_fraction)
        self.windows: list[WindowRecord] = []
        self.on_progress: Callable[[Progress], None] = lambda progress: None
        self._data: WindowData | None = None

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
        """The present phase: ``simulate``, ``learn`` or ``done``."""
        return self.tracker.phase

    @property
    def context(self) -> DistributedContext:
        """Processes that train together."""
        return self.replicas.context

    @property
    def unstable_fraction(self) -> float:
        """Fraction of unstable replicas in the latest window."""
        return self.windows[-1].unstable_fraction if self.windows else 0.0

    @property
    def is_new_window(self) -> bool:
        """Whether the latest gradient is the first one from its window."""
        return self._data is not None and self._data.steps == 1

    def energy_zero(self) -> EnergyZero:
        """Return what holds the zero of energy on the start frames."""
        frames, cell = self.replicas.start_frames
        return EnergyZero([self.potential], [frames], [cell], self.replicas.model_calls)

    def unverified(self) -> list[WindowRecord]:
        """Return the last window, in a list, unless the replicas were stable for long enough with the present weights."""
        is_verified = self.phase == "done" and self.windows[-1].phase == "simulate"
        return [] if is_verified else self.windows[-1:]

    def record_learning_rate(self, learning_rate: float) -> None:
        """Record the learning rate of a step in the window that it is taken on."""
        self.windows[-1].learning_rate = learning_rate

    def simulate_again(self) -> None:
        """Begin another simulation phase, because the weights have changed since the last one."""
        self.tracker.simulate_again()

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
        """Factor of the next step's learning rate: cuts of the schedule, and the step size."""
        return self.tracker.lr_factor * self.lr_scale.factor

    def gradient(self) -> Estimate | None:
        """Return the gradient of the observables' loss, or None when training is done; simulate when needed."""
        estimate = self._reweighted_estimate()
        if estimate is None:
            self._data = None
            while self._data is None and self.phase != "done":
                if self.phase == "simulate":
                    self.simulation_phase()
                else:
                    self._learning_window()
            if self._data is None:
                return None
            with self.replicas.model_calls():
                estimate = self.estimator.estimate(self._data)
            self.lr_scale.begin_window()
        assert self._data is not None
        self._data.steps += 1
        latest = self.windows[-1]
        latest.steps, latest.ess_fraction = self._data.steps, estimate.ess_fraction
        return estimate

    def simulation_phase(self) -> None:
        """Simulate window after window until it is time to learn, or the replicas were stable long enough."""
        while self.phase == "simulate":
            with self.replicas.rollback_on_interrupt():
                if self.tracker.stable_ps == 0.0:
                    self.replicas.begin_simulation_phase()
                window, wall_s = self._simulate("simulate", self.replicas.state)
            self.replicas.unstable = self.replicas.unstable | window.unstable
            fraction = self.replicas.fraction(self.replicas.unstable)
            self._record("simulate", fraction, window, wall_s)
            if self.tracker.after_simulation_window(fraction, window.duration_ps) == "learn":
                # This window was simulated under the present weights: it is the first one to learn from.
                self.replicas.begin_learning_phase(window)
                self._data = self._collect(window)
            self.replicas.advance(window)

    def _learning_window(self) -> None:
        """Simulate one window from the learning phase's start states, and collect its frames while learning goes on."""
        window, wall_s = self._simulate("learn", self.replicas.refreshed_learning_start())
        fraction = self.replicas.fraction(window.unstable)
        self._record("learn", fraction, window, wall_s)
        self.replicas.begin_learning_phase(window)
        phase = self.tracker.after_learning_window(fraction)
        if phase == "learn":
            self._data = self._collect(window)
            return
        if fraction > self.config.schedule.min_unstable_fraction:
            reason = "max_windows is reached" if phase == "done" else "the learning rate is at its minimum"
            log.warning(
                "learning ended with %.0f %% of the replicas unstable: %s. %s", 100.0 * fraction, reason, REMEDY
            )
        self.replicas.advance(window)

    def _reweighted_estimate(self) -> Estimate | None:
        """Return an estimate from the frames at hand, reweighted to the present parameters; None if they are used up."""
        if self._data is None or self.phase != "learn" or self._data.steps >= self.config.steps_per_window:
            return None
        with self.replicas.model_calls():
            weights, fraction = self.estimator.reweight(self._data)
        self.lr_scale.update(fraction)
        if not fraction >= self.config.min_ess_fraction:  # also if it is NaN
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
            self.on_progress(Progress(phase, done_ps, self.simulated_ps + done_ps, latest, self.name))

        return self.replicas.simulate(start, show), time.perf_counter() - began

    def _record(self, phase: Phase, fraction: float, window: Window, wall_s: float) -> None:
        self.windows.append(
            WindowRecord(
                window=len(self.windows) + 1,
                phase=phase,
                simulated_ps=self.simulated_ps + window.duration_ps,
                unstable_fraction=fraction,
                observable_loss=self.estimator.observed_loss(window.frames(), window.frame_cells()),
                wall_s=wall_s,
                system=self.name,
            )
        )
        self.replicas.streams.window = len(self.windows)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that this process needs to continue as if it had not been interrupted."""
        return {
            "tracker": self.tracker.state_dict(),
            "windows": [asdict(record) for record in self.windows],
            "replicas": self.replicas.state_dict(),
            "data": None if self._data is None else self._data.state_dict(),
            "lr_scale": self.lr_scale.state_dict(),
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
        data = state["data"]
        self._data = None if data is None else WindowData.from_state_dict(data, self.potential.device)
        self.lr_scale.load_state_dict(state["lr_scale"])
