"""The batched simulator: all replicas in one model call, in blocks of steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stable_plugin.md.backends.cuda_graph import BlockGraphs, CapturedBlock
from stable_plugin.md.backends.forces import Forces
from stable_plugin.md.barostat import VolumeMoves
from stable_plugin.md.cells import optional
from stable_plugin.md.execution import Execution
from stable_plugin.md.integrators import Integrator
from stable_plugin.md.neighbors import Edges, NeighborList
from stable_plugin.md.state import State
from stable_plugin.md.window import NEVER, Recorded, Window, stack_frames
from stable_plugin.runtime import checks
from stable_plugin.runtime.allocator import keep_freed_memory
from stable_plugin.runtime.threads import on_threads

if TYPE_CHECKING:
    from stable_plugin.detectors.base import Detector
    from stable_plugin.models.base import Potential

log = logging.getLogger(__name__)

SKIN_CPU_A, SKIN_A = 1.0, 2.0
"""Default skins in Å, on a CPU and on other devices."""


@dataclass(frozen=True)
class _Progress:
    """Where a window is: all of it stays on the device.

    Attributes:
        state: State after the steps so far.
        unstable_step: First step at which each replica was flagged, (n_replicas,); ``NEVER`` if it was not.
        moving: Replicas that are still simulated, (n_replicas,).
    """

    state: State
    unstable_step: Tensor
    moving: Tensor

    def tensors(self) -> list[Tensor]:
        """Return the tensors as a block of steps takes and returns them."""
        return [*self.state.tensors(), self.unstable_step, self.moving]

    @classmethod
    def from_tensors(cls, tensors: Iterable[Tensor]) -> _Progress:
        """Return the progress whose :meth:`tensors` these are."""
        *state, unstable_step, moving = tensors
        return cls(State.from_tensors(state), unstable_step, moving)


@dataclass(frozen=True)
class _Plan:
    """Arguments of :meth:`Simulator.run` that every block needs."""

    generator: torch.Generator
    stop_unstable: bool


class Simulator:
    """Simulates replicas of one system with one potential.

    The steps run in blocks, which read the host only at their end. Within a block, the neighbor list may turn out to
    have missed an edge; the block is then repeated, so that trajectories are exact.

    Args:
        potential: Potential that the atoms move in.
        integrator: Integrator, with temperature and timestep.
        detector: Decides which replicas are unstable.
        check_every_fs: Time between two checks by the detector, in fs.
        block_steps: Maximum number of steps between two host synchronizations.
        skin_A: Skin of the neighbor list of a periodic or large system, in Å; by default 1 Å on a CPU and 2 Å on other
            devices. One that is too small costs repeated blocks, not accuracy.
        execution: How steps are executed; the fastest way that works by default.

    Attributes:
        neighbors: The neighbor list.
        forces: Energies and forces as executed.
        graphs: Blocks captured as CUDA graphs.
        capturing: Whether blocks are captured.
        repeated_blocks: Number of blocks that were repeated so far.

    Raises:
        ValueError: If an argument is out of range, or ``capture=True`` and the model is not on a CUDA device.
    """

    def __init__(
        self,
        potential: Potential,
        integrator: Integrator,
        detector: Detector,
        *,
        check_every_fs: float = 5.0,
        block_steps: int = 5,
        skin_A: float | None = None,
        execution: Execution | None = None,
    ) -> None:
        self.potential = potential
        self.integrator = integrator.holding(potential.system.n_atoms - potential.system.n_moving)
        self.detector = detector
        self.check_every = checks.steps("check_every_fs", check_every_fs, integrator.timestep_fs)
        # Checks come at the end of a block.
        self.block_steps = _largest_divisor(self.check_every, checks.count("block_steps", block_steps))
        on_cpu = potential.device.type == "cpu"
        # The search runs on the CPU: other devices wait for it, and are quick to select from more candidates.
        default_skin_A = SKIN_CPU_A if on_cpu else SKIN_A
        skin_A = default_skin_A if skin_A is None else checks.number("skin_A", skin_A, at_least=0)
        # On a CPU reading the host is free, and padding a fixed number of edges is not.
        self.neighbors = NeighborList(potential.cutoff, skin_A, potential.system, fixed=not on_cpu)
        execution = execution or Execution()
        if execution.capture is True and potential.device.type != "cuda":
            raise ValueError(
                f"capture=True needs a model on a CUDA device, this one is on {potential.device}: move it there, or "
                "set capture='auto'."
            )
        self.execution = execution
        self.forces = Forces(potential, execution)
        self.graphs = BlockGraphs()
        self.capturing = execution.capture is not False and potential.device.type == "cuda"
        self.repeated_blocks = 0
        self._volume_moves: VolumeMoves | None = None
        if integrator.barostat is not None:
            block_fs = self.block_steps * integrator.timestep_fs
            self._volume_moves = VolumeMoves(integrator.barostat, potential.system, integrator.kT, block_fs)
        self._margin = 0.0
        self._cells_differ = False
        self._inertia = potential.system.inertia

    def __repr__(self) -> str:
        return (
            f"Simulator(potential={self.potential!r}, integrator={self.integrator!r}, detector={self.detector!r}, "
            f"check_every_fs={self.check_every * self.integrator.timestep_fs:g}, block_steps={self.block_steps}, "
            f"skin_A={self.neighbors.skin}, execution={self.execution!r})"
        )

    def changed(self, integrator: Integrator, detector: Detector) -> Simulator:
        """Return a simulator with the same potential, compiled once for both.

        Args:
            integrator: Integrator with the same timestep.
            detector: Decides which replicas are unstable.
        """
        other = Simulator(
            self.potential,
            integrator,
            detector,
            check_every_fs=self.check_every * integrator.timestep_fs,
            block_steps=self.block_steps,
            skin_A=self.neighbors.skin,
            execution=self.execution,
        )
        other.forces = self.forces
        return other

    def prepare(
        self,
        positions: Tensor,
        generator: torch.Generator,
        velocities: Tensor | None = None,
        cell: Tensor | None = None,
    ) -> State:
        """Return a state to start from, with forces and energies; arguments as of :meth:`place`."""
        return self.refresh(self.place(positions, generator, velocities, cell))

    def place(
        self,
        positions: Tensor,
        generator: torch.Generator,
        velocities: Tensor | None = None,
        cell: Tensor | None = None,
    ) -> State:
        """Return a state with forces and energies still zero, without a call of the model.

        Args:
            positions: (n_replicas, n_atoms, 3) in Å.
            generator: Source of the velocities.
            velocities: In Å per ASE time; drawn from the Maxwell-Boltzmann distribution by default.
            cell: Cell of each replica, (n_replicas, 3, 3) in Å; that of the system by default.
        """
        system = self.potential.system
        positions = positions.to(self.potential.device, self.potential.dtype)
        if velocities is None:
            velocities = self.integrator.initial_velocities(positions.shape, system.inertia, generator)
        own = system.cell if system.periodic else torch.zeros_like(system.cell)
        cell = own.repeat(len(positions), 1, 1) if cell is None else cell
        return State(
            positions=positions,
            velocities=velocities.to(positions),
            forces=torch.zeros_like(positions),
            energies=torch.zeros(len(positions), dtype=torch.float64, device=positions.device),
            chain=self.integrator.initial_chain(positions),
            cell=cell.to(positions),
        )

    def refresh(self, state: State) -> State:
        """Return the state with forces and energies of the present weights."""
        with self.potential.frozen():
            edges = self.potential.edges(state.positions, self.different_cells(state))
            energies, forces = self.forces.plain(state.positions, edges)
        return state.replace(energies=energies, forces=forces)

    def different_cells(self, state: State) -> Tensor | None:
        """Return the cells of the replicas, (n_replicas, 3, 3), or None if all have that of the system."""
        system = self.potential.system
        return None if not system.periodic or bool((state.cell == system.cell).all()) else state.cell

    def check_record_every(self, record_every: int) -> None:
        """Raise an error if frames would be recorded that the detector has not checked.

        Args:
            record_every: Steps between two recorded frames.

        Raises:
            ValueError: If ``record_every`` steps is not a multiple of the steps between two checks.
        """
        if record_every % self.check_every:
            timestep_fs = self.integrator.timestep_fs
            raise ValueError(
                f"record_every={record_every} steps is not a multiple of the {self.check_every} steps between two "
                "checks: a recorded frame must have been checked. "
                f"Change record_every_fs={record_every * timestep_fs:g} or "
                f"check_every_fs={self.check_every * timestep_fs:g}."
            )

    @torch.no_grad()
    def run(
        self,
        start: State,
        n_steps: int,
        record_every: int,
        generator: torch.Generator,
        on_block_end: Callable[[int], None] | None = None,
        active: Tensor | None = None,
        stop_unstable: bool = False,
        continues: bool = False,
    ) -> Window:
        """Simulate a window.

        Args:
            start: Initial state, with the forces of the present weights.
            n_steps: Number of steps.
            record_every: Steps between two recorded frames, a multiple of the steps between two checks.
            generator: Source of the random numbers.
            on_block_end: Called after each block with the number of steps done.
            active: Replicas that move, (n_replicas,); all by default. The others stay and record nothing.
            stop_unstable: Stop a replica as soon as it is unstable, as if it had passed the discard limit. Stopped
                replicas leave the batch of the model call, unless the model is compiled; a smaller batch is rounded
                differently, so the trajectories of the others depend on it in their last digits.
            continues: Whether the window continues the previous one, for detectors that look back in time.

        Returns:
            The window.

        Raises:
            ValueError: If ``n_steps`` or ``record_every`` is invalid.
        """
        checks.count("n_steps", n_steps)
        self.check_record_every(record_every)
        self._begin_window(start, continues)
        plan = _Plan(generator, stop_unstable)
        finite = start.finite()
        active = torch.ones_like(finite) if active is None else active
        progress = _Progress(start, torch.where(active & ~finite, 0, NEVER), active & finite)
        frames: list[Recorded] = []
        with self.potential.simulating():
            with on_threads(self.forces.choose_threads(start.positions)):
                self.forces.settle(start.positions)
                for first in range(0, n_steps, self.block_steps):
                    moves = self._volume_moves
                    if moves is not None and first % (moves.every_blocks * self.block_steps) == 0:
                        progress = self._change_volumes(progress, moves, generator)
                    block = range(first, min(first + self.block_steps, n_steps))
                    progress = self._timed_block(progress, block, plan)
                    if block.stop % record_every == 0:
                        state = progress.state
                        frames.append((state.positions, state.velocities, state.cell, progress.moving))
                    if on_block_end is not None:
                        on_block_end(block.stop)
            # Another number of threads changes the last digits, so it may change between windows only.
            self.forces.review_threads(progress.state.positions)
        positions, velocities, cell, valid = stack_frames(frames, start)
        return Window(
            positions=positions,
            velocities=velocities,
            cell=cell if self._cells_differ else None,
            valid=valid,
            unstable_step=progress.unstable_step,
            stopped=~progress.moving,
            start=start,
            end=progress.state,
            n_steps=n_steps,
            timestep_fs=self.integrator.timestep_fs,
        )

    def _begin_window(self, start: State, continues: bool) -> None:
        if self.potential.device.type == "cpu":
            keep_freed_memory()
        self.neighbors.invalidate()
        self._cells_differ = self._volume_moves is not None or self.different_cells(start) is not None
        self._margin = self._thermal_displacement()
        self.detector.set_degrees_of_freedom(self.integrator.degrees_of_freedom(self.potential.system.n_atoms))
        self.detector.set_check_interval(self.check_every * self.integrator.timestep_fs)
        if not continues:
            self.detector.reset(start.n_replicas)

    def _thermal_displacement(self) -> float:
        """Return the distance in Å that the lightest atom rarely exceeds in a block: four standard deviations."""
        speed = (self.integrator.kT / self.potential.system.masses.min()).sqrt().item()
        return 4.0 * speed * self.block_steps * self.integrator.timestep

    def _change_volumes(self, progress: _Progress, moves: VolumeMoves, generator: torch.Generator) -> _Progress:
        """Return the progress after each replica that moves has attempted to change its volume."""
        state, moving = progress.state, progress.moving
        proposed, log_volume = moves.propose(state, moving, generator)
        self.neighbors.invalidate()
        self.neighbors.update(proposed.positions, moving, self._margin, proposed.cell)
        edges = self.neighbors.edges(proposed.positions, moving, proposed.cell)
        energies, forces = self.forces(proposed.positions, edges)
        proposed = proposed.replace(energies=energies, forces=forces)
        accepted = moves.accepts(log_volume, proposed.energies - state.energies, generator)
        # The list of neighbors is that of the proposal, also where it was rejected.
        self.neighbors.invalidate()
        return replace(progress, state=proposed.select(moving & accepted & proposed.finite(), state))

    def _timed_block(self, progress: _Progress, block: range, plan: _Plan) -> _Progress:
        began = time.perf_counter()
        progress = self._exact_block(progress, block, plan)
        self.forces.record_step((time.perf_counter() - began) / len(block))
        return progress

    def _exact_block(self, progress: _Progress, block: range, plan: _Plan) -> _Progress:
        """Run a block, and repeat it if its neighbor list overflowed.

        Atoms that are faster than expected, as in a replica that explodes, may meet others that are not in the list.
        The block is then repeated with a search at every step, and later blocks search earlier.
        """
        noise, memory = plan.generator.get_state(), self.detector.state_dict()
        positions, moving = progress.state.positions, progress.moving
        done = torch.tensor(block.start, device=positions.device)
        inputs = [*progress.tensors(), self._batch(moving, plan), done]
        search = False
        while True:
            self.neighbors.update(positions, moving, self._margin, self._cell(progress.state))
            *outputs, overflow = self._run_block(inputs, block, plan, search)
            if not overflow.any().item():
                return _Progress.from_tensors(outputs)
            self.repeated_blocks += 1
            plan.generator.set_state(noise)
            self.detector.load_state_dict(memory)
            if not self.neighbors.reallocate():
                search = True
                self._margin = min(1.5 * self._margin, self.neighbors.half_skin)

    def _run_block(self, inputs: Sequence[Tensor], block: range, plan: _Plan, search: bool) -> list[Tensor]:
        """Run a block as a CUDA graph if that is possible, and eagerly otherwise; see :meth:`_block`."""
        check = block.stop % self.check_every == 0
        if not self.capturing or search or len(block) != self.block_steps:
            return self._block(inputs, len(block), check, plan, search)
        noise = plan.generator.get_state()
        check_inside = check and self.detector.capturable
        try:
            graph = self._captured_block(inputs, check_inside, plan)
        except Exception as error:  # models that cannot be captured raise many kinds of errors
            name = type(self.potential.module).__name__
            reason = f"{name} cannot be captured in a CUDA graph ({type(error).__name__}: {error})"
            if self.execution.capture is True:
                raise RuntimeError(f"capture=True: {reason}. Set capture='auto' to continue without.") from error
            log.warning("%s; the simulation continues step by step.", reason)
            self.capturing = False
            plan.generator.set_state(noise)
            return self._block(inputs, len(block), check, plan, search)
        outputs = graph(inputs)
        return self._checked(outputs, inputs[-1] + len(block), plan) if check and not check_inside else outputs

    def _captured_block(self, inputs: Sequence[Tensor], check: bool, plan: _Plan) -> CapturedBlock:
        module = self.potential.simulated_module
        addresses = tuple(tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers()))
        depends_on = (self.neighbors.generation, addresses, id(plan.generator), plan.stop_unstable, self._cells_differ)

        def steps(*tensors: Tensor) -> list[Tensor]:
            return self._block(tensors, self.block_steps, check, plan, search=False)

        return self.graphs.get(check, depends_on, steps, inputs, plan.generator)

    def _block(self, inputs: Sequence[Tensor], n_steps: int, check: bool, plan: _Plan, search: bool) -> list[Tensor]:
        """Run steps eagerly, without reading the host unless ``search`` is true.

        Args:
            inputs: The tensors of the progress, the replicas in the batch of the model call, and the number of steps
                done.
            n_steps: Number of steps.
            check: Whether the detector checks the last state.
            plan: Arguments of the window.
            search: Whether to search for neighbors at every step instead of using the neighbor list.

        Returns:
            The tensors of the progress, and which replicas had an edge missing, (n_replicas,).
        """
        *tensors, batch, done = inputs
        progress = _Progress.from_tensors(tensors)
        state, unstable_step, moving = progress.state, progress.unstable_step, progress.moving
        masses = self._inertia
        overflow = torch.zeros_like(moving)

        def force(positions: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal overflow
            if search:
                return self.forces(positions, self.potential.edges(positions, self._cell(state)))
            edges = self.neighbors.edges(positions, moving, self._cell(state))
            overflow = overflow | (self.neighbors.did_overflow(positions) & moving)
            if len(batch) == len(moving):
                return self.forces(positions, edges)
            return self._forces_of_batch(batch, positions, edges)

        for step in range(1, n_steps + 1):
            proposal = self.integrator.step(state, masses, force, plan.generator)
            finite = proposal.finite()
            unstable_step = torch.where(moving & ~finite & (unstable_step == NEVER), done + step, unstable_step)
            moving = moving & finite
            # A replica that is not finite stays where it was finite last.
            state = proposal.select(moving, state)
        outputs = [*_Progress(state, unstable_step, moving).tensors(), overflow]
        return self._checked(outputs, done + n_steps, plan) if check else outputs

    def _checked(self, outputs: Sequence[Tensor], step: Tensor, plan: _Plan) -> list[Tensor]:
        """Return the outputs of a block after the detector has checked its last state."""
        *tensors, overflow = outputs
        progress = _Progress.from_tensors(tensors)
        state, unstable_step, moving = progress.state, progress.unstable_step, progress.moving
        unstable, discarded = self.detector.classify(state.positions, state.velocities, *optional(self._cell(state)))
        unstable_step = torch.where(moving & unstable & (unstable_step == NEVER), step, unstable_step)
        moving = moving & ~(unstable if plan.stop_unstable else discarded)
        return [*_Progress(state, unstable_step, moving).tensors(), overflow]

    def _cell(self, state: State) -> Tensor | None:
        return state.cell if self._cells_differ else None

    def _batch(self, moving: Tensor, plan: _Plan) -> Tensor:
        """Return the replicas in the batch of the model call, (n_batch,): those that move, and others as padding."""
        n_replicas = len(moving)
        everyone = torch.arange(n_replicas, device=moving.device)
        if not plan.stop_unstable or self.forces.compiled:  # another size would be compiled again
            return everyone
        n_moving = max(int(moving.sum()), 1)
        size = min(size for size in _batch_sizes(n_replicas) if size >= n_moving)
        return everyone if size == n_replicas else (~moving).argsort(stable=True)[:size].sort().values

    def _forces_of_batch(self, batch: Tensor, positions: Tensor, edges: Edges) -> tuple[Tensor, Tensor]:
        """Return energies and forces of the replicas in the batch, and zero for the others, which have no edges."""
        edges = edges.reindex(batch, *positions.shape[:2])
        energies, forces = self.forces(positions.index_select(0, batch), edges)
        return (
            energies.new_zeros(len(positions)).index_copy(0, batch, energies),
            torch.zeros_like(positions).index_copy(0, batch, forces),
        )


def _batch_sizes(n_replicas: int) -> list[int]:
    """Return the sizes that a batch may have, each half of the previous one: few, as each is captured separately."""
    sizes = [n_replicas]
    while sizes[-1] > 1:
        sizes.append((sizes[-1] + 1) // 2)
    return sizes


def _largest_divisor(number: int, most: int) -> int:
    return next(divisor for divisor in range(min(number, most), 0, -1) if number % divisor == 0)
