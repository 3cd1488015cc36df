"""The batched simulator: all replicas in one model call, in blocks of steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stable_plugin.md.backends.cuda_graph import BlockGraphs, CapturedBlock
from stable_plugin.md.backends.forces import Forces
from stable_plugin.md.execution import Execution
from stable_plugin.md.integrators import Integrator
from stable_plugin.md.neighbors import Edges, NeighborList
from stable_plugin.md.state import State
from stable_plugin.md.window import NEVER, Window, stack_frames
from stable_plugin.runtime import checks
from stable_plugin.runtime.allocator import keep_freed_memory
from stable_plugin.runtime.threads import on_threads

if TYPE_CHECKING:
    from stable_plugin.detectors.base import Detector
    from stable_plugin.models.base import Potential

log = logging.getLogger(__name__)


@dataclass
class _Progress:
    """Flags that stay on the device during a block."""

    unstable_step: Tensor
    moving: Tensor


@dataclass(frozen=True)
class _Plan:
    """What does not change from block to block of a window."""

    generator: torch.Generator
    stop_unstable: bool


class Simulator:
    """Runs replicas of one system with one potential.

    Args:
        potential: What moves the atoms.
        integrator: How.
        detector: Which replicas are broken.
        check_every_fs: Time between two looks of the detector.
        block_steps: Steps between two host synchronisations.
        skin_A: Extra reach in Å of the pairs that a periodic system's neighbours are chosen from. Too small a skin costs
            repeated blocks, never accuracy.
        execution: How steps are run; the fastest way that works if not given.

    Raises:
        ValueError: If an argument is out of range, or capture is asked for on a device that has none.
    """

    def __init__(
        self,
        potential: Potential,
        integrator: Integrator,
        detector: Detector,
        *,
        check_every_fs: float = 5.0,
        block_steps: int = 5,
        skin_A: float = 1.0,
        execution: Execution | None = None,
    ) -> None:
        self.potential = potential
        self.integrator = integrator
        self.detector = detector
        self.check_every = checks.steps("check_every_fs", check_every_fs, integrator.timestep_fs)
        # Checks come at the end of a block.
        self.block_steps = _largest_divisor(self.check_every, checks.count("block_steps", block_steps))
        # Reading the host costs nothing on a CPU, and a fixed number of edges costs what is padded.
        self.neighbors = NeighborList(
            potential.cutoff,
            checks.number("skin_A", skin_A, at_least=0),
            potential.system,
            fixed=potential.device.type != "cpu",
        )
        execution = execution or Execution()
        if execution.capture is True and potential.device.type != "cuda":
            raise ValueError(
                f"capture=True needs a model on a CUDA device, this one is on {potential.device}: move it there, or set "
                "capture='auto'."
            )
        self.execution = execution
        self.forces = Forces(potential, execution)
        self.graphs = BlockGraphs()
        self.capturing = execution.capture is not False and potential.device.type == "cuda"
        self.repeated_blocks = 0
        self._reserve = 0.0

    def prepare(self, positions: Tensor, generator: torch.Generator, velocities: Tensor | None = None) -> State:
        """A state to start from; the arguments are those of :meth:`place`."""
        return self.refresh(self.place(positions, generator, velocities))

    def place(self, positions: Tensor, generator: torch.Generator, velocities: Tensor | None = None) -> State:
        """Positions and velocities, with forces and energies still zero: the potential is not asked.

        Args:
            positions: (n_replicas, n_atoms, 3) in Å.
            generator: Source of the velocities.
            velocities: In Å per ASE time; drawn from the Maxwell-Boltzmann distribution if not given.
        """
        system = self.potential.system
        positions = positions.to(self.potential.device, self.potential.dtype)
        if velocities is None:
            velocities = self.integrator.initial_velocities(positions.shape, system.masses, generator)
        return State(
            positions,
            velocities.to(positions),
            torch.zeros_like(positions),
            torch.zeros(len(positions), dtype=torch.float64, device=positions.device),
            self.integrator.initial_chain(positions),
        )

    def _thermal_reach(self) -> float:
        """How far one of the lightest atoms hardly ever goes in a block: four standard deviations, in Å."""
        speed = (self.integrator.kT / self.potential.system.masses.min()).sqrt().item()
        return 4.0 * speed * self.block_steps * self.integrator.timestep

    def check_record_every(self, record_every: int) -> None:
        """Refuse to record frames that the detector does not look at.

        Raises:
            ValueError: If ``record_every`` steps is not a multiple of the steps between two checks.
        """
        if record_every % self.check_every:
            timestep_fs = self.integrator.timestep_fs
            raise ValueError(
                f"record_every={record_every} steps is not a multiple of the {self.check_every} steps between two "
                f"checks: a recorded frame must have been checked. Change record_every_fs={record_every * timestep_fs:g} or "
                f"check_every_fs={self.check_every * timestep_fs:g}."
            )

    def refresh(self, state: State) -> State:
        """The same positions and velocities under the weights that the potential has now."""
        with self.potential.frozen():
            energies, forces = self.forces.plain(state.positions, self.potential.edges(state.positions))
        return state.with_(energies=energies, forces=forces)

    @torch.no_grad()
    def run(
        self,
        start: State,
        n_steps: int,
        record_every: int,
        generator: torch.Generator,
        on_block: Callable[[int], None] | None = None,
        active: Tensor | None = None,
        stop_unstable: bool = False,
        goes_on: bool = False,
    ) -> Window:
        """Simulate a window.

        Args:
            start: Where the replicas begin, with the forces of the present weights.
            n_steps: Steps to simulate.
            record_every: Steps between two recorded frames, a multiple of the steps between two checks.
            generator: Source of the random numbers.
            on_block: Called with the steps done so far, after each block.
            active: Replicas that move, (n_replicas,); all of them if not given. The others rest and record nothing.
            stop_unstable: Stop a replica as soon as it is unstable, as if it were beyond the discard limit. Those that rest
                leave the batch in which the model is called, where that is not compiled; as a smaller batch is rounded
                differently, the others then go other ways than beside one that moves on.
            goes_on: Whether the window continues the one before, as far as detectors that look back are concerned.
        """
        checks.count("n_steps", n_steps)
        if self.potential.device.type == "cpu":
            keep_freed_memory()
        self.check_record_every(record_every)
        self.neighbors.invalidate()
        self._reserve = self._thermal_reach()
        if not goes_on:
            self.detector.reset(start.n_replicas)
        finite = start.finite()
        active = torch.ones_like(finite) if active is None else active
        unstable_step = torch.where(active & ~finite, 0, NEVER)
        progress = _Progress(unstable_step, moving=active & finite)
        plan = _Plan(generator, stop_unstable)
        state = start
        frames: list[tuple[Tensor, Tensor, Tensor]] = []
        with self.potential.simulating(), on_threads(self.forces.choose_threads(start.positions)):
            self.forces.settle(start.positions)
            for first in range(0, n_steps, self.block_steps):
                last = min(first + self.block_steps, n_steps)
                state, progress = self._exact_block(state, progress, range(first, last), plan)
                if last % record_every == 0:
                    frames.append((state.positions, state.velocities, progress.moving))
                if on_block is not None:
                    on_block(last)
        positions, velocities, valid = stack_frames(frames, start)
        return Window(
            positions=positions,
            velocities=velocities,
            valid=valid,
            unstable_step=progress.unstable_step,
            stopped=~progress.moving,
            start=start,
            end=state,
            n_steps=n_steps,
            timestep_fs=self.integrator.timestep_fs,
        )

    def _exact_block(self, state: State, progress: _Progress, block: range, plan: _Plan) -> tuple[State, _Progress]:
        """Run a block, and again if some edge turns out to have been missing in it.

        That happens when atoms are faster than expected, as those of a replica that bursts: the block is repeated with a
        search at every step, and pairs are looked for earlier from then on.
        """
        noise, memory = plan.generator.get_state(), self.detector.state_dict()
        done = torch.tensor(block.start, device=state.positions.device)
        inputs = [*state.tensors(), progress.unstable_step, progress.moving, self._batch(progress, plan), done]
        searching = False
        while True:
            self.neighbors.update(state.positions, progress.moving, self._reserve)
            *end, unstable_step, moving, missed = self._run_block(inputs, block, plan, searching)
            if not missed.any().item():
                return State(*end), _Progress(unstable_step, moving)
            self.repeated_blocks += 1
            plan.generator.set_state(noise)
            self.detector.load_state_dict(memory)
            if not self.neighbors.reallocate():
                searching = True
                self._reserve = min(1.5 * self._reserve, self.neighbors.half_skin)

    def _run_block(self, inputs: Sequence[Tensor], block: range, plan: _Plan, searching: bool) -> list[Tensor]:
        """The block as a CUDA graph where there is one, and otherwise as it is."""
        look = block.stop % self.check_every == 0
        if not self.capturing or searching or len(block) != self.block_steps:
            return self._block(inputs, len(block), look, plan, searching)
        noise = plan.generator.get_state()
        inside = look and self.detector.capturable
        try:
            graph = self._graph(inputs, inside, plan)
        except Exception as error:  # a model that reads the host, or allocates by value, fails in ways of its own
            name = type(self.potential.module).__name__
            reason = f"{name} cannot be captured in a CUDA graph ({type(error).__name__}: {error})"
            if self.execution.capture is True:
                raise RuntimeError(f"capture=True: {reason}. Set capture='auto' to go on without.") from error
            log.warning("%s; the simulation goes on step by step.", reason)
            self.capturing = False
            plan.generator.set_state(noise)
            return self._block(inputs, len(block), look, plan, searching)
        outputs = graph(inputs)
        return self._looked_at(outputs, inputs[-1] + len(block), plan) if look and not inside else outputs

    def _graph(self, inputs: Sequence[Tensor], look: bool, plan: _Plan) -> CapturedBlock:
        module = self.potential.simulated_module
        addresses = tuple(tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers()))
        made_from = (self.neighbors.generation, addresses, id(plan.generator), plan.stop_unstable)

        def steps(*tensors: Tensor) -> list[Tensor]:
            return self._block(tensors, self.block_steps, look, plan, searching=False)

        return self.graphs.get(look, made_from, steps, inputs, plan.generator)

    def _block(self, inputs: Sequence[Tensor], n_steps: int, look: bool, plan: _Plan, searching: bool) -> list[Tensor]:
        """Steps without a host synchronisation, unless ``searching`` for the neighbours at every one.

        Args:
            inputs: The tensors of a :class:`State`, first unstable steps, which replicas move, those that the model is
                called with, steps done before.
            n_steps: How many.
            look: Whether the detector looks at the end.
            plan: What the steps are part of.
            searching: See above.

        Returns:
            The tensors of a :class:`State`, first unstable steps, which replicas move, where an edge was missing.
        """
        *parts, unstable_step, moving, batch, done = inputs
        state, masses = State(*parts), self.potential.system.masses
        missed = torch.zeros_like(moving)

        def force(positions: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal missed
            if searching:
                return self.forces(positions, self.potential.edges(positions))
            edges = self.neighbors.edges(positions, moving)
            missed = missed | (self.neighbors.did_overflow(positions) & moving)
            return (
                self.forces(positions, edges) if len(batch) == len(moving) else self._forces_of(batch, positions, edges)
            )

        for step in range(1, n_steps + 1):
            proposal = self.integrator.step(state, masses, force, plan.generator)
            finite = proposal.finite()
            unstable_step = torch.where(moving & ~finite & (unstable_step == NEVER), done + step, unstable_step)
            moving = moving & finite
            state = proposal.select(moving, state)
        outputs = [*state.tensors(), unstable_step, moving, missed]
        return self._looked_at(outputs, done + n_steps, plan) if look else outputs

    def _batch(self, progress: _Progress, plan: _Plan) -> Tensor:
        """Replicas that the model is called with, (n_batch,): all that move, and as many others as fill a usual size."""
        n_replicas = len(progress.moving)
        everyone = torch.arange(n_replicas, device=progress.moving.device)
        if not plan.stop_unstable or self.forces.compiled:  # another size would have to be compiled anew
            return everyone
        n_moving = max(int(progress.moving.sum()), 1)
        size = min(size for size in _ladder(n_replicas) if size >= n_moving)
        return everyone if size == n_replicas else (~progress.moving).argsort(stable=True)[:size].sort().values

    def _forces_of(self, batch: Tensor, positions: Tensor, edges: Edges) -> tuple[Tensor, Tensor]:
        """Energies and forces of some replicas, and zero for the others, which have no edges."""
        slot = torch.zeros_like(positions[:, 0, 0], dtype=torch.long)
        slot = slot.index_copy(0, batch, torch.arange(len(batch), device=batch.device))
        edges = edges.renumbered(slot, positions.shape[1])
        energies, forces = self.forces(positions.index_select(0, batch), edges)
        return (
            energies.new_zeros(len(positions)).index_copy(0, batch, energies),
            torch.zeros_like(positions).index_copy(0, batch, forces),
        )

    def _looked_at(self, outputs: Sequence[Tensor], step: Tensor, plan: _Plan) -> list[Tensor]:
        """The outputs of a block with the detector's verdict at its end."""
        *parts, unstable_step, moving, missed = outputs
        state = State(*parts)
        broken, discarded = self.detector.classify(state.positions, state.velocities)
        unstable_step = torch.where(moving & broken & (unstable_step == NEVER), step, unstable_step)
        moving = moving & ~(broken if plan.stop_unstable else discarded)
        return [*parts, unstable_step, moving, missed]


def _ladder(n_replicas: int) -> list[int]:
    """Sizes of the batch, each half the one before: few, as each is captured anew."""
    sizes = [n_replicas]
    while sizes[-1] > 1:
        sizes.append((sizes[-1] + 1) // 2)
    return sizes


def _largest_divisor(number: int, most: int) -> int:
    return next(divisor for divisor in range(min(number, most), 0, -1) if number % divisor == 0)
