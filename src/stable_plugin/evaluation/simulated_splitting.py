"""Splitting of replicas in molecular dynamics."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import torch
from torch import Tensor

from stable_plugin.detectors import Detector
from stable_plugin.detectors.limits import Limits
from stable_plugin.evaluation.simulation import SimulationSettings, start_state
from stable_plugin.evaluation.splitting import SplittingEstimate, estimate, split
from stable_plugin.md import Integrator, Simulator
from stable_plugin.md.cells import optional
from stable_plugin.md.state import State
from stable_plugin.models import Potential

N_RUNS = 4
"""Independent runs, whose spread gives the confidence interval."""

MIN_REPLICAS = 8
"""Fewest replicas: with fewer, all of them soon descend from one."""


class SimulatedReplicas:
    """Replicas in molecular dynamics, with the value of a detector.

    Args:
        simulator: Simulates up to the next check.
        state: State to start from.
        generator: Source of the noise.
        energies: Limits of the energy, which is then part of the value; the detector's threshold must be 1.
    """

    def __init__(
        self, simulator: Simulator, state: State, generator: torch.Generator, energies: Limits | None = None
    ) -> None:
        self.simulator, self.state, self._generator, self._energies = simulator, state, generator, energies

    def advance(self, active: Tensor) -> list[float]:
        every, device = self.simulator.check_every, self.state.positions.device
        window = self.simulator.run(
            self.state, every, every, self._generator, active=active.to(device), stop_unstable=True, continues=True
        )
        self.state = window.end
        return self._values().masked_fill(window.unstable.cpu(), inf).nan_to_num(nan=inf, posinf=inf).tolist()

    def copy(self, rows: Sequence[int]) -> list[list[Tensor]]:
        if not rows:
            return []
        chosen = torch.tensor(rows, device=self.state.positions.device)
        tensors = [tensor.index_select(0, chosen).cpu() for tensor in self.state.tensors()]
        # Of a copy, not of the batch, so that it can be dropped alone.
        return [[tensor[number].clone() for tensor in tensors] for number in range(len(rows))]

    def put(self, rows: Sequence[int], states: Sequence[list[Tensor]]) -> None:
        chosen = torch.tensor(rows, device=self.state.positions.device)
        new = [torch.stack(each) for each in zip(*states, strict=True)]
        self.state = State.from_tensors(
            tensor.index_copy(0, chosen, each.to(tensor))
            for tensor, each in zip(self.state.tensors(), new, strict=True)
        )

    def _values(self) -> Tensor:
        """Return the values of all replicas, (n_replicas,) on the CPU."""
        state = self.state
        cell = self.simulator.different_cells(state)
        values = self.simulator.detector.measure(state.positions, state.velocities, *optional(cell)).double().cpu()
        if self._energies is None:
            return values
        energies = self._energies.relative(state.energies.double().cpu()[:, None]).squeeze(1)
        return torch.maximum(values, energies.where(energies <= 1.0, inf))


def check_splitting(integrator: Integrator, detector: Detector, n_replicas: int) -> None:
    """Raise an error if failure rates cannot be estimated by splitting.

    Args:
        integrator: Integrator of the replicas.
        detector: Detector, bound to the system.
        n_replicas: Number of replicas.

    Raises:
        ValueError: If the integrator draws no noise, the detector looks back in time, or there are too few replicas.
    """
    if not integrator.is_stochastic:
        raise ValueError(
            f"method='splitting' with integrator={integrator!r}: copies of a replica stay equal without noise. Use Langevin with "
            "friction_per_ps above 0, or set method='direct'."
        )
    looking_back = [str(each) for each in detector.parts if each.state_dict() is not None]
    if looking_back:
        raise ValueError(
            f"method='splitting' with detector={' or '.join(looking_back)}: it looks back in time, so a copy of a replica cannot "
            "be continued. Pass a detector that judges single frames, or set method='direct'."
        )
    if n_replicas < MIN_REPLICAS:
        raise ValueError(
            f"n_replicas={n_replicas} is too few for method='splitting': pass at least {MIN_REPLICAS}, 32 or more for a "
            "narrow interval."
        )


def estimate_by_splitting(
    potential: Potential,
    detector: Detector,
    starts: Tensor,
    settings: SimulationSettings,
    cell: Tensor | None = None,
    energies: Limits | None = None,
) -> SplittingEstimate:
    """Return the failure rate up to the longest horizon.

    Args:
        potential: Potential to simulate with.
        detector: Detector of failures, bound to the system; see :func:`check_splitting`.
        starts: Start frames over which the replicas are spread evenly, (n_starts, n_atoms, 3) in Å.
        settings: How to simulate; each of :data:`N_RUNS` runs has its number of replicas.
        cell: Cells of the start frames, (n_starts, 3, 3) in Å; that of the system if None.
        energies: Limits of the energy beyond which a replica has failed, too; none if None.
    """
    simulator = settings.simulator(potential, detector)
    # Not the noise of the replicas that were simulated before.
    generator = torch.Generator(potential.device).manual_seed(settings.seed + 1)
    chooser = torch.Generator().manual_seed(settings.seed)
    n_checks = settings.n_steps // simulator.check_every
    runs = []
    for _ in range(N_RUNS):
        replicas = SimulatedReplicas(
            simulator, start_state(simulator, starts, settings, generator, cell), generator, energies
        )
        runs.append(split(replicas, settings.n_replicas, n_checks, chooser))
    check_ps = simulator.check_every * settings.integrator.timestep_fs / 1000.0
    return estimate(runs, settings.n_replicas, n_checks, check_ps)
