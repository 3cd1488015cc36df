"""Molecular dynamics of evaluated replicas: settings, recorded trajectories, and the simulation itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor

from stable_plugin.config import StABlEConfig
from stable_plugin.detectors import Detector
from stable_plugin.evaluation.verdict import MAX_FAILURES_PER_NS
from stable_plugin.md import Execution, Integrator, Langevin, Simulator
from stable_plugin.md.state import State
from stable_plugin.md.window import NEVER
from stable_plugin.models import Potential
from stable_plugin.runtime import checks
from stable_plugin.runtime.checks import Count, Number, Seed

SEGMENT_PS = 0.5
"""Simulated time between two checks whether any replica is still stable."""


@dataclass(frozen=True)
class SimulationSettings:
    """How the replicas of an evaluation are simulated; defaults are those of training where it has the same setting.

    Attributes:
        integrator: Thermostat, temperature and timestep.
        n_replicas: Number of replicas.
        horizons_ps: Times in ps up to which failures are counted.
        record_every_fs: Time between two recorded frames in fs.
        check_every_fs: Time between two checks of the detector in fs.
        max_failures_per_ns: Failure rate in 1/ns that the potential may have.
        equilibration_fraction: Fraction of the simulated time that is left out where distributions are compared.
        execution: How the simulator runs its steps.
        seed: Seed of velocities and noise.

    Raises:
        ValueError: If a value is out of range or not a multiple of the timestep.
    """

    integrator: Integrator = field(default_factory=Langevin)
    n_replicas: Annotated[int, Count(at_most=checks.MAX_REPLICAS)] = StABlEConfig.n_replicas
    horizons_ps: Sequence[float] = (1.0,)
    record_every_fs: Annotated[float, Number(above=0)] = 50.0
    check_every_fs: Annotated[float, Number(above=0)] = StABlEConfig.check_every_fs
    max_failures_per_ns: Annotated[float, Number(above=0)] = MAX_FAILURES_PER_NS
    equilibration_fraction: Annotated[float, Number(at_least=0, at_most=0.9)] = 0.1
    execution: Execution = field(default_factory=Execution)
    seed: Annotated[int, Seed()] = StABlEConfig.seed

    def __post_init__(self) -> None:
        checks.check_fields(self)
        if not self.horizons_ps:
            raise ValueError(f"horizons_ps={self.horizons_ps} is empty: pass at least one time in ps.")
        for horizon in self.horizons_ps:
            checks.number("horizons_ps", horizon, above=0)
            checks.steps("horizons_ps", horizon * 1000.0, self.integrator.timestep_fs)
        checks.steps("record_every_fs", self.record_every_fs, self.integrator.timestep_fs)

    @property
    def record_every(self) -> int:
        """Timesteps between two recorded frames."""
        return checks.steps("record_every_fs", self.record_every_fs, self.integrator.timestep_fs)

    @property
    def n_steps(self) -> int:
        """Timesteps up to the longest horizon."""
        return checks.steps("horizons_ps", max(self.horizons_ps) * 1000.0, self.integrator.timestep_fs)

    @property
    def segment_steps(self) -> int:
        """Timesteps between two checks whether any replica is still stable."""
        return max(1, round(SEGMENT_PS * 1000.0 / self.record_every_fs)) * self.record_every

    def simulator(self, potential: Potential, detector: Detector) -> Simulator:
        """Return a simulator for a potential and a detector."""
        return Simulator(
            potential, self.integrator, detector, check_every_fs=self.check_every_fs, execution=self.execution
        )


@dataclass(frozen=True)
class ReplicaTrajectories:
    """Recorded frames of all replicas, and when each replica failed.

    Attributes:
        positions: (n_frames, n_replicas, n_atoms, 3) in Å.
        velocities: (n_frames, n_replicas, n_atoms, 3) in Å per ASE time.
        valid: Frames recorded before the replica failed, (n_frames, n_replicas).
        times_ps: Time of each frame, (n_frames,) in ps.
        failed_ps: Time at which each replica failed, (n_replicas,) in ps; inf if it did not.
        last_positions: Positions at the end or at the failure, (n_replicas, n_atoms, 3) in Å.
        last_velocities: Velocities then, (n_replicas, n_atoms, 3) in Å per ASE time.
        cell: Cells of the frames, (n_frames, n_replicas, 3, 3) in Å; None if all are that of the system.
        last_cell: Cells at the end or at the failure, (n_replicas, 3, 3) in Å; None likewise.
    """

    positions: Tensor
    velocities: Tensor
    valid: Tensor
    times_ps: Tensor
    failed_ps: Tensor
    last_positions: Tensor
    last_velocities: Tensor
    cell: Tensor | None = None
    last_cell: Tensor | None = None

    def cells(self, frames: Tensor, replicas: Tensor | int) -> Tensor | None:
        """Return the cells of some frames, (n_chosen, 3, 3) in Å, or None if all are that of the system.

        Args:
            frames: Index of the frames, or a mask.
            replicas: Replica of each, or of all of them.
        """
        return None if self.cell is None else self.cell[frames, replicas]

    def last_cell_of(self, replica: int) -> Tensor | None:
        """Return the cell of a replica at the end, (3, 3) in Å, or None if it is that of the system."""
        return None if self.last_cell is None else self.last_cell[replica]


def start_state(
    simulator: Simulator,
    starts: Tensor,
    settings: SimulationSettings,
    generator: torch.Generator,
    cell: Tensor | None = None,
) -> State:
    """Return replicas in start frames, spread evenly over them, with thermal velocities.

    Args:
        simulator: Simulator of the replicas.
        starts: Start frames, (n_starts, n_atoms, 3) in Å.
        settings: How many replicas.
        generator: Source of the velocities.
        cell: Cells of the start frames, (n_starts, 3, 3) in Å; that of the system if None.
    """
    chosen = _spread(starts, settings)
    return simulator.prepare(starts[chosen], generator, cell=None if cell is None else cell[chosen])


def _spread(starts: Tensor, settings: SimulationSettings) -> Tensor:
    return torch.linspace(0, len(starts) - 1, settings.n_replicas).round().long()


def simulate_replicas(
    potential: Potential,
    detector: Detector,
    starts: Tensor,
    settings: SimulationSettings,
    cell: Tensor | None = None,
) -> ReplicaTrajectories:
    """Simulate replicas up to the longest horizon, or until all of them have failed.

    Args:
        potential: Potential to simulate with.
        detector: Detector that stops a replica, bound to the system.
        starts: Start frames over which the replicas are spread evenly, (n_starts, n_atoms, 3) in Å.
        settings: How to simulate.
        cell: Cells of the start frames, (n_starts, 3, 3) in Å; that of the system if None.

    Returns:
        The recorded frames on the CPU.
    """
    simulator = settings.simulator(potential, detector)
    generator = torch.Generator(potential.device).manual_seed(settings.seed)
    state = start_state(simulator, starts, settings, generator, cell)
    simulator.forces.expected_steps = settings.n_steps
    record_every, step_ps = settings.record_every, settings.integrator.timestep_fs / 1000.0
    active = torch.ones(settings.n_replicas, dtype=torch.bool, device=potential.device)
    failed_ps = torch.full((settings.n_replicas,), torch.inf, dtype=torch.float64)
    positions, velocities, cells, valid, times = [], [], [], [], []
    for done in range(0, settings.n_steps, settings.segment_steps):
        n_steps = min(settings.segment_steps, settings.n_steps - done)
        window = simulator.run(
            state, n_steps, record_every, generator, active=active, stop_unstable=True, continues=done > 0
        )
        flagged = (window.unstable_step != NEVER).cpu()
        failed_ps = torch.where(flagged, (done + window.unstable_step.cpu().double()) * step_ps, failed_ps)
        positions.append(window.positions.cpu())
        velocities.append(window.velocities.cpu())
        cells.append(None if window.cell is None else window.cell.cpu())
        valid.append(window.valid.cpu())
        frame_numbers = torch.arange(1.0, len(window.positions) + 1, dtype=torch.float64)
        times.append((done + record_every * frame_numbers) * step_ps)
        state, active = window.end, active & ~window.stopped
        if not active.any():
            break
    return ReplicaTrajectories(
        positions=torch.cat(positions),
        velocities=torch.cat(velocities),
        valid=torch.cat(valid),
        times_ps=torch.cat(times),
        failed_ps=failed_ps,
        last_positions=state.positions.cpu(),
        last_velocities=state.velocities.cpu(),
        cell=None if cells[0] is None else torch.cat([each for each in cells if each is not None]),
        last_cell=None if cells[0] is None else state.cell.cpu(),
    )
