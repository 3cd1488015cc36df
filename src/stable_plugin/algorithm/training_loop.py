"""StABlE training without a trainer: simulate windows, judge them, and hand out gradients of the observables."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

import torch
from ase import Atoms
from torch import Tensor

from stable_plugin.algorithm.estimator import BoltzmannEstimator, Estimate, Loss, mean_squared_error
from stable_plugin.algorithm.neighborhoods import Neighborhoods
from stable_plugin.algorithm.schedule import PhaseTracker, Schedule
from stable_plugin.algorithm.step_size import LearningRateScale
from stable_plugin.algorithm.window_data import WindowData, WindowEstimator
from stable_plugin.detectors.base import Detector
from stable_plugin.md.execution import Execution
from stable_plugin.md.integrators import Integrator
from stable_plugin.md.simulator import Simulator
from stable_plugin.md.state import State
from stable_plugin.md.window import Window
from stable_plugin.models.base import Potential
from stable_plugin.observables.base import Observable
from stable_plugin.runtime import checks
from stable_plugin.runtime.distributed import DistributedContext

log = logging.getLogger(__name__)

MINIMUM_FRAMES = 2
"""A covariance needs two frames."""

USUAL_LEARNING_WINDOWS = 10
"""About as many as a repair takes; what compiling the model is weighed against."""


class UnusablePotentialError(RuntimeError):
    """Every replica broke down before a frame could be recorded.

    Args:
        message: What happened.
        frame: The replica that is furthest gone, as last seen finite.
    """

    def __init__(self, message: str, frame: Atoms) -> None:
        super().__init__(message)
        self.frame = frame


@dataclass
class WindowRecord:
    """One simulated window and what was learned from it.

    Attributes:
        round: Number of the window, from one.
        phase: ``simulate`` or ``learn``.
        simulated_ps: Simulated time per replica, all windows so far.
        unstable_fraction: Share of unstable replicas: in this window when learning, since the phase began otherwise.
        observable_loss: Loss of the observables over the window as simulated.
        ess: Effective share of the sample at the last optimizer step on it.
        steps: Optimizer steps taken on it.
        learning_rate: Of the last of these steps.
        wall_s: Time the simulation took.
    """

    round: int
    phase: str
    simulated_ps: float
    unstable_fraction: float
    observable_loss: float | None
    ess: float | None
    steps: int
    learning_rate: float | None
    wall_s: float


@dataclass(frozen=True)
class Progress:
    """What a progress bar shows while a window is simulated."""

    phase: str
    window_ps: float
    simulated_ps: float
    unstable_fraction: float | None
    observable_loss: float | None
    ess: float | None


class TrainingLoop:
    """Simulates with a potential in training and estimates how the observables pull at its parameters.

    The caller owns the optimizer: it asks for :meth:`gradient`, applies it, and asks again.

    Args:
        potential: What is trained.
        structures: Start frames, (n_frames, n_atoms, 3) in Å; replicas take them in turn.
        reference: Frames that bonds and targets come from, (n_frames, n_atoms, 3) in Å.
        integrator: Thermostat, temperature and timestep.
        observables: What should be reproduced.
        detector: When a replica is unstable.
        n_replicas: Replicas simulated at once.
        window_ps: Length of a window in ps.
        record_every_fs: Time between frames that the estimator sees.
        schedule: When to learn and when to stop.
        loss: Of an observable's mean and its target.
        steps_per_window: Optimizer steps on one window at most.
        min_ess_fraction: A window is used up when its effective share falls below this.
        max_lr_scale: See :class:`~stable_plugin.algorithm.step_size.LearningRateScale`.
        rewind_fraction: Share of stable replicas that start a simulation phase from an earlier checkpoint.
        local: See :class:`~stable_plugin.algorithm.window_data.WindowEstimator`.
        even_sampling: Likewise.
        check_every_fs: Time between two looks of the detector.
        chunk: Frames per model call of the estimator.
        execution: How the simulator runs its steps.
        seed: Seeds all random streams.
        processes: Those that train together, each with ``n_replicas`` of its own and the same settings; this one alone if
            not given. They decide on common numbers, and get the same gradients.
    """

    def __init__(
        self,
        potential: Potential,
        structures: Tensor,
        reference: Tensor,
        *,
        integrator: Integrator,
        observables: Sequence[Observable],
        detector: Detector,
        n_replicas: int = 32,
        window_ps: float = 0.4,
        record_every_fs: float = 25.0,
        schedule: Schedule | None = None,
        loss: Loss = mean_squared_error,
        steps_per_window: int = 6,
        min_ess_fraction: float = 0.3,
        max_lr_scale: float = 1.0,
        rewind_fraction: float = 0.1,
        local: Neighborhoods | None = None,
        even_sampling: Sequence[int] | None = None,
        check_every_fs: float = 5.0,
        chunk: int = 64,
        execution: Execution | None = None,
        seed: int = 0,
        processes: DistributedContext | None = None,
    ) -> None:
        checks.count("n_replicas", n_replicas)
        checks.count("steps_per_window", steps_per_window)
        checks.number("min_ess_fraction", min_ess_fraction, above=0, most=1)
        checks.number("rewind_fraction", rewind_fraction, least=0, most=1)
        checks.count("chunk", chunk)
        if not observables:
            raise ValueError("observables=[] is empty: give at least one observable.")
        if len(reference) < MINIMUM_FRAMES:
            raise ValueError(
                f"reference holds {len(reference)} frame(s): targets and reference bond lengths need at least "
                f"{MINIMUM_FRAMES}."
            )
        self.n_steps = checks.steps("window_ps", window_ps * 1000.0, integrator.timestep_fs)
        self.record_every = checks.steps("record_every_fs", record_every_fs, integrator.timestep_fs)
        if n_replicas * (self.n_steps // self.record_every) < MINIMUM_FRAMES:
            raise ValueError(
                f"record_every_fs={record_every_fs:g} gives fewer than two frames per window of {window_ps:g} ps: "
                "lower it, or use more replicas."
            )
        self.potential = potential
        reference = reference.to(potential.system.masses)
        detector.bind(potential.system, reference)
        detector.check_reference(reference)
        detector.check_reference(structures.to(reference), "structures")
        for observable in observables:
            observable.bind(potential.system, reference)
        self.observables = list(observables)
        self.simulator = Simulator(potential, integrator, detector, check_every_fs=check_every_fs, execution=execution)
        self.simulator.check_record_every(self.record_every)
        self.processes = processes or DistributedContext()
        estimator = BoltzmannEstimator(potential, integrator.temperature_K, chunk, self.processes)
        self.sampler = WindowEstimator(estimator, observables, loss=loss, local=local, even_sampling=even_sampling)
        self.phases = PhaseTracker(schedule or Schedule())
        self.simulator.forces.expected_steps = self.n_steps * self._likely_windows(window_ps)
        self.steps_per_window = steps_per_window
        self.step_size = LearningRateScale(max_lr_scale, steps_per_window, min_ess_fraction)
        self.min_ess_fraction = min_ess_fraction
        self.rewind_fraction = rewind_fraction
        self.windows: list[WindowRecord] = []
        self.on_progress: Callable[[Progress], None] = lambda progress: None

        seed = self._seed = self.processes.seed(seed)
        self._noise = torch.Generator(potential.device).manual_seed(seed)
        self._choices = torch.Generator().manual_seed(seed + 1)
        self._structures = structures
        taken = (self.processes.rank * n_replicas + torch.arange(n_replicas)) % len(structures)
        # The potential is not asked before the first window: training may have long to go until then.
        self._state = self.simulator.place(structures[taken], self._noise)
        # An interrupted window is simulated again: what is saved is the stream as the last whole window left it.
        self._noise_at_rest = self._noise.get_state()
        self._forces_at_rest = self.simulator.forces.state_dict()
        self._learning_start = self._state
        self._history: deque[State] = deque(maxlen=10)
        self._unstable = torch.zeros(n_replicas, dtype=torch.bool, device=potential.device)
        self._sample: WindowData | None = None

    @property
    def md_steps(self) -> int:
        """Steps simulated so far, summed over the replicas of all processes."""
        return len(self.windows) * self.n_steps * self._state.n_replicas * self.processes.size

    @property
    def simulated_ps(self) -> float:
        """Time simulated so far per replica, in ps."""
        return len(self.windows) * self.n_steps * self.simulator.integrator.timestep_fs / 1000.0

    @property
    def lr_factor(self) -> float:
        """What the next step's learning rate is multiplied with: cuts of the schedule, and the step size."""
        return self.phases.lr_factor * self.step_size.factor

    def _likely_windows(self, window_ps: float) -> int:
        schedule = self.phases.schedule
        learning = min(USUAL_LEARNING_WINDOWS, schedule.max_windows or USUAL_LEARNING_WINDOWS)
        return ceil(schedule.stable_ps / window_ps) + learning

    def simulation_phase(self) -> None:
        """Simulate window after window until it is time to learn or the replicas were stable long enough."""
        while self.phases.name == "simulate":
            with self._undone_if_interrupted():
                if self.phases.stable_ps == 0.0:
                    with self._own_random():
                        self._begin_simulation_phase()
                window = self._simulate("simulate", self._state)
            self._unstable = self._unstable | window.unstable
            share = self._share(self._unstable)
            self._note("simulate", share, window)
            if self.phases.after_simulation_window(share, window.duration_ps) == "learn":
                # The window that failed was simulated under the present weights: it is the first one to learn from.
                self._learning_start = self._restart_replicas(window.unstable, window.start)
                self._sample = self._sampled(window)
            self._go_on_from(window)

    def gradient(self) -> Estimate | None:
        """Gradient of the observables' loss under the present parameters; simulates when it has to.

        Returns:
            The estimate, or None when training is done.
        """
        estimate = self._reuse_sample()
        if estimate is None:
            sample = self._new_sample()
            if sample is None:
                return None
            with self._own_random():
                estimate = self.sampler.estimate(sample)
            self.step_size.begin_window()
        assert self._sample is not None
        self._sample.steps += 1
        latest = self.windows[-1]
        latest.steps, latest.ess = self._sample.steps, estimate.ess_fraction
        return estimate

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on as if nothing had happened, for this process."""
        return {
            "phases": self.phases.state_dict(),
            "windows": [asdict(entry) for entry in self.windows],
            "state": self._state.state_dict(),
            "learning_start": self._learning_start.state_dict(),
            "history": [state.state_dict() for state in self._history],
            "unstable": self._unstable,
            "sample": None if self._sample is None else self._sample.state_dict(),
            "step_size": self.step_size.state_dict(),
            "forces": self._forces_at_rest,
            "noise": self._noise_at_rest,
            "choices": self._choices.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave.

        Raises:
            ValueError: If the state is of another number of replicas or atoms.
        """
        device = self.potential.device
        shape = tuple(state["state"]["positions"].shape)
        if shape != tuple(self._state.positions.shape):
            raise ValueError(
                f"the checkpoint holds replicas of shape {shape}, this run has {tuple(self._state.positions.shape)}: "
                "resume with the same structures and n_replicas."
            )
        self.phases.load_state_dict(state["phases"])
        self.windows = [WindowRecord(**entry) for entry in state["windows"]]
        self._state = State.from_state_dict(state["state"], device)
        self._learning_start = State.from_state_dict(state["learning_start"], device)
        self._history = deque(
            (State.from_state_dict(earlier, device) for earlier in state["history"]), maxlen=self._history.maxlen
        )
        self._unstable = state["unstable"].to(device)
        self._sample = None if state["sample"] is None else WindowData.from_state(state["sample"], device)
        self.step_size.load_state_dict(state["step_size"])
        self.simulator.forces.load_state_dict(state["forces"])
        self._forces_at_rest = state["forces"]
        self._noise.set_state(state["noise"].cpu())
        self._noise_at_rest = self._noise.get_state()
        self._choices.set_state(state["choices"].cpu())

    def _reuse_sample(self) -> Estimate | None:
        """The reweighted estimate from the frames at hand, while they last."""
        sample = self._sample
        if sample is None or self.phases.name != "learn" or sample.steps >= self.steps_per_window:
            return None
        with self._own_random():
            weights, share = self.sampler.reweighted(sample)
        self.step_size.follow(share)
        if not share >= self.min_ess_fraction:  # so that NaN is used up
            return None
        with self._own_random():
            return self.sampler.estimate(sample, weights)

    def _new_sample(self) -> WindowData | None:
        """Frames of a new learning window, through as many simulation phases as it takes; None when done."""
        self._sample = None
        while True:
            self.simulation_phase()
            if self.phases.name == "done" or self._sample is not None:
                return self._sample
            with self._own_random():
                start = self.simulator.refresh(self._learning_start)
            window = self._simulate("learn", start)
            share = self._share(window.unstable)
            self._note("learn", share, window)
            self._learning_start = self._restart_replicas(window.unstable, window.start)
            phase = self.phases.after_learning_window(share)
            if phase == "learn":
                break
            if share > self.phases.schedule.min_unstable_fraction:
                log.warning(
                    "learning ended with %.0f %% of the replicas unstable: %s. Raise gradient_ratio or learning_rate, or "
                    "give the schedule more windows or patience.",
                    100.0 * share,
                    "the windows are used up" if phase == "done" else "the learning rate is at its minimum",
                )
            self._go_on_from(window)
        self._sample = self._sampled(window)
        return self._sample

    def _sampled(self, window: Window) -> WindowData:
        with self._own_random():
            return self.sampler.sample(window.frames(), self._state.n_replicas, self._choices)

    def _share(self, unstable: Tensor) -> float:
        """Share of unstable replicas, (n_replicas,), of those of all processes."""
        return self.processes.count(int(unstable.sum()), unstable.device) / (len(unstable) * self.processes.size)

    def _simulate(self, phase: str, start: State) -> Window:
        began = time.perf_counter()
        latest = self.windows[-1] if self.windows else None
        timestep_ps = self.simulator.integrator.timestep_fs / 1000.0

        def show(steps: int) -> None:
            self.on_progress(
                Progress(
                    phase=phase,
                    window_ps=steps * timestep_ps,
                    simulated_ps=self.simulated_ps + steps * timestep_ps,
                    unstable_fraction=None if latest is None else latest.unstable_fraction,
                    observable_loss=None if latest is None else latest.observable_loss,
                    ess=None if latest is None else latest.ess,
                )
            )

        with self._own_random():
            window = self.simulator.run(start, self.n_steps, self.record_every, self._noise, show)
        self._noise_at_rest = self._noise.get_state()
        self._forces_at_rest = self.simulator.forces.state_dict()
        self._refuse_unusable(window)
        self._wall_s = time.perf_counter() - began
        return window

    def _note(self, phase: str, share: float, window: Window) -> None:
        self.windows.append(
            WindowRecord(
                round=len(self.windows) + 1,
                phase=phase,
                simulated_ps=self.simulated_ps + window.duration_ps,
                unstable_fraction=share,
                observable_loss=self.sampler.observed_loss(window.frames()),
                ess=None,
                steps=0,
                learning_rate=None,
                wall_s=self._wall_s,
            )
        )

    def _refuse_unusable(self, window: Window) -> None:
        n_frames = self.processes.count(int(window.valid.sum()), window.valid.device)
        if n_frames >= MINIMUM_FRAMES:
            return
        steps = window.unstable_step
        value = self.simulator.detector.measure(window.end.positions, window.end.velocities)
        worst = int(torch.nan_to_num(value, nan=torch.inf).argmax())
        raise UnusablePotentialError(
            f"all {len(steps) * self.processes.size} replicas broke down within {int(steps.max()) * window.timestep_fs:g} fs "
            f"({self.simulator.detector}), and left {n_frames} usable frame(s): there is nothing to learn from. Train "
            "the potential longer before StABlE training (start_epoch), check its units, or use a shorter timestep.",
            self.potential.system.atoms(window.end.positions[worst], window.end.velocities[worst]),
        )

    @contextmanager
    def _own_random(self) -> Iterator[None]:
        """Global random streams that follow from the number of windows, and afterwards those of the trainer again.

        Some models draw from them, as eSEN does the angle at which it looks along an edge. What a window draws that is
        interrupted, and simulated again, must change nothing for the steps that follow.
        """
        device = self.potential.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self._seed + len(self.windows))
            yield

    @contextmanager
    def _undone_if_interrupted(self) -> Iterator[None]:
        """A window that is interrupted is simulated again, and the phase it begins is begun again: from the same draws."""
        before = self._state, self._unstable, self._choices.get_state()
        try:
            yield
        except BaseException:
            self._state, self._unstable = before[:2]
            self._choices.set_state(before[2])
            raise

    def _begin_simulation_phase(self) -> None:
        """Rewind some replicas, so that not all move on together, and forget who was unstable before."""
        self._unstable = torch.zeros_like(self._unstable)
        state = self.simulator.refresh(self._state)
        if self._history:
            drawn = torch.rand(state.n_replicas, generator=self._choices) < self.rewind_fraction
            earlier = self._history[int(torch.randint(len(self._history), (1,), generator=self._choices))]
            state = self.simulator.refresh(earlier.select(drawn.to(self.potential.device), state))
        self._state = state

    def _go_on_from(self, window: Window) -> None:
        """Stable replicas go on from the end of the window, unstable ones begin afresh."""
        self._history.append(window.start)
        self._state = self._restart_replicas(window.unstable, window.end)

    def _restart_replicas(self, replicas: Tensor, state: State) -> State:
        """The state with some replicas in start frames drawn anew.

        Where a replica failed, it may have come from what it cannot be saved from: a bond on its way to break.
        """
        drawn = torch.randint(len(self._structures), (state.n_replicas,), generator=self._choices)
        with self._own_random():
            fresh = self.simulator.prepare(self._structures[drawn], self._noise)
        self._noise_at_rest = self._noise.get_state()
        return fresh.select(replicas, state)
