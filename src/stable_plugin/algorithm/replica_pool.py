"""The replicas between two windows: where probes start, where they continue, and where they learn from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from ase import Atoms
from torch import Tensor

from stable_plugin.config import MIN_FRAMES, StABlEConfig
from stable_plugin.md.cells import optional
from stable_plugin.md.simulator import Simulator
from stable_plugin.md.state import State
from stable_plugin.md.window import Window
from stable_plugin.runtime.distributed import DistributedContext
from stable_plugin.runtime.random_state import RandomStreams
from stable_plugin.runtime.threads import on_threads


class UnusablePotentialError(RuntimeError):
    """Every replica failed before a frame could be recorded.

    Args:
        message: What happened.
        frame: The replica with the largest detector value, as last seen finite.
    """

    def __init__(self, message: str, frame: Atoms) -> None:
        super().__init__(message)
        self.frame = frame


class ReplicaPool:
    """States of all replicas of this process, and how they restart.

    Args:
        simulator: Simulates windows.
        structures: Start frames, (n_frames, n_atoms, 3) in Å; replicas take them in turn.
        config: Number of replicas, and length of a window.
        streams: Random streams.
        context: Processes that train together.
        cell: Cells of the start frames, (n_frames, 3, 3) in Å; that of the system if None.
        learning_simulator: Simulates learning windows, if these are hotter.

    Attributes:
        probe_start: State that all probes start from, drawn once.
        state: State that the simulation continues from.
        learning_start: State that learning windows start from.
    """

    def __init__(
        self,
        simulator: Simulator,
        structures: Tensor,
        config: StABlEConfig,
        streams: RandomStreams,
        context: DistributedContext,
        cell: Tensor | None = None,
        learning_simulator: Simulator | None = None,
    ) -> None:
        self.simulator = simulator
        self.learning_simulator = learning_simulator or simulator
        self.streams = streams
        self.context = context
        self._structures, self._cell = structures, cell
        self._n_steps, self._record_every = config.window_steps, config.recorded_steps
        taken = (context.rank * config.n_replicas + torch.arange(config.n_replicas)) % len(structures)
        # No forces yet: ordinary training may have long to go until the first window.
        self.probe_start = simulator.place(structures[taken], streams.noise, cell=None if cell is None else cell[taken])
        streams.mark()
        self._forces = simulator.forces.state_dict()
        self.state = self.learning_start = self.probe_start

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(n_replicas={self.n_replicas}, n_structures={len(self._structures)}, "
            f"window_steps={self._n_steps}, record_every={self._record_every})"
        )

    @property
    def start_frames(self) -> tuple[Tensor, Tensor | None]:
        """Start frames, (n_frames, n_atoms, 3) in Å, and their cells; None if all are that of the system."""
        return self._structures, self._cell

    @property
    def n_replicas(self) -> int:
        """Number of replicas of this process."""
        return self.state.n_replicas

    def simulate(self, start: State, on_block: Callable[[int], None], *, learning: bool = False) -> Window:
        """Simulate a window.

        Args:
            start: State to start from, with the forces of the present weights.
            on_block: Called with the steps done so far; may raise to interrupt the window.
            learning: Whether this is a learning window.

        Returns:
            The window.

        Raises:
            UnusablePotentialError: If all replicas of all processes together leave fewer than two usable frames.
        """
        with self.streams.isolated():
            simulator = self.learning_simulator if learning else self.simulator
            window = simulator.run(start, self._n_steps, self._record_every, self.streams.noise, on_block)
        self.streams.mark()
        self._forces = self.simulator.forces.state_dict()
        self._refuse_unusable(window)
        return window

    def begin_probe(self) -> None:
        """Return to the start states of probes, with the forces of the present weights."""
        with self.model_calls():
            self.state = self.simulator.refresh(self.probe_start)

    def begin_learning_phase(self, window: Window | None, *, continues: bool = False) -> None:
        """Set where learning windows start.

        Args:
            window: Window to learn from: its start states, but those of unstable replicas are replaced. If None, all are
                drawn anew, so that nothing is learned from the start states of probes.
            continues: Whether stable replicas continue from the end of the window instead.
        """
        simulator = self.learning_simulator
        if window is None:
            everyone = torch.ones(self.n_replicas, dtype=torch.bool, device=self.state.positions.device)
            self.learning_start = self._restart(everyone, self.state, simulator)
        else:
            self.learning_start = self._restart(window.unstable, window.end if continues else window.start, simulator)

    def heat_learning_start(self) -> None:
        """Draw the velocities of the next learning window anew, at its temperature."""
        velocities = self.learning_simulator.place(self.learning_start.positions, self.streams.noise).velocities
        self.streams.mark()
        self.learning_start = self.learning_start.replace(velocities=velocities)

    def refreshed_learning_start(self) -> State:
        """Return the start of a learning window, with the forces of the present weights."""
        with self.model_calls():
            return self.learning_simulator.refresh(self.learning_start)

    def advance(self, window: Window) -> None:
        """Let stable replicas continue from the end of a window; unstable ones restart."""
        self.state = self._restart(window.unstable, window.end, self.simulator)

    @contextmanager
    def model_calls(self) -> Iterator[None]:
        """Prepare for calls of the model outside of a window: isolated random streams, and the simulator's threads."""
        with self.streams.isolated(), on_threads(self.simulator.forces.threads):
            yield

    def failures(self, window: Window) -> tuple[int, float]:
        """Return the failures in a window, and the time at risk in ps, both summed over the replicas of all processes."""
        steps = torch.where(window.unstable, window.unstable_step, window.n_steps).sum()
        device = steps.device
        n_steps = self.context.count(int(steps), device)
        return self.context.count(int(window.unstable.sum()), device), n_steps * window.timestep_fs / 1000.0

    @contextmanager
    def rollback_on_interrupt(self) -> Iterator[None]:
        """Restore the replicas if the window is interrupted, so that it is simulated again identically."""
        state = self.state
        try:
            yield
        except BaseException:
            self.state = state
            raise

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {
            "probe_start": self.probe_start.state_dict(),
            "state": self.state.state_dict(),
            "learning_start": self.learning_start.state_dict(),
            "forces": self._forces,
            "streams": self.streams.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Args:
            state: The state of this process.

        Raises:
            ValueError: If the state is of another number of replicas or atoms.
        """
        device = self.simulator.potential.device
        saved = State.from_state_dict(state["state"], device)
        if saved.positions.shape != self.state.positions.shape:
            raise ValueError(
                f"the checkpoint holds replicas of shape {tuple(saved.positions.shape)}, this run has "
                f"{tuple(self.state.positions.shape)}: resume with the same structures and n_replicas."
            )
        self.state, self.learning_start = saved, State.from_state_dict(state["learning_start"], device)
        self.probe_start = State.from_state_dict(state["probe_start"], device)
        self.simulator.forces.load_state_dict(state["forces"])
        self._forces = state["forces"]
        self.streams.load_state_dict(state["streams"])

    def _restart(self, replicas: Tensor, state: State, simulator: Simulator) -> State:
        """Return the state with the flagged replicas in start frames drawn at random.

        The state before a failure may already be doomed (a bond that is about to break), so restart from a fresh frame.
        """
        drawn = torch.randint(len(self._structures), (state.n_replicas,), generator=self.streams.choices)
        with self.model_calls():
            cell = None if self._cell is None else self._cell[drawn]
            fresh = simulator.prepare(self._structures[drawn], self.streams.noise, cell=cell)
        self.streams.mark()
        return fresh.select(replicas, state)

    def _refuse_unusable(self, window: Window) -> None:
        n_frames = self.context.count(int(window.valid.sum()), window.valid.device)
        if n_frames >= MIN_FRAMES:
            return
        steps = window.unstable_step
        end, cell = window.end, None if window.cell is None else window.end.cell
        value = self.simulator.detector.measure(end.positions, end.velocities, *optional(cell))
        worst = int(torch.nan_to_num(value, nan=torch.inf).argmax())
        raise UnusablePotentialError(
            f"all {len(steps) * self.context.size} replicas failed within {int(steps.max()) * window.timestep_fs:g} fs "
            f"({self.simulator.detector}), and left {n_frames} usable frame(s): there is nothing to learn from. Train the "
            "potential longer before StABlE training (start_epoch), check its units, or use a shorter timestep.",
            self.simulator.potential.system.atoms(
                end.positions[worst], end.velocities[worst], None if cell is None else cell[worst]
            ),
        )
