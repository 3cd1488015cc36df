"""How stable a potential is in molecular dynamics, and how well it reproduces observables and labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import torch
from ase import Atoms
from torch import Tensor, nn

from stable_plugin.algorithm.training_loop import UnusablePotentialError
from stable_plugin.detectors import BondDeviation, Detector
from stable_plugin.evaluation.survival import failure_rate_per_ns, kaplan_meier, median_stable_ps
from stable_plugin.md import Execution, Integrator, Langevin, Simulator
from stable_plugin.md.frames import ENERGY_KEY, FORCES_KEY, Frames, read_frames, read_labeled
from stable_plugin.md.system import System, stack_positions
from stable_plugin.md.window import NEVER
from stable_plugin.models import NoInteraction, Potential, find_potential
from stable_plugin.observables import (
    AngleDistribution,
    BondLengths,
    DistanceDistribution,
    Observable,
    TimeCorrelation,
    trajectory_of,
)
from stable_plugin.runtime import checks

SEGMENT_PS = 0.5
"""Time between two looks at whether any replica is left."""

MOST_COMMON = 5
"""Kinds of failures that a summary names."""

CHUNK = 64
"""Frames per model call for the errors on labelled frames."""

BLOCK_PS = 1.0
"""Stretches of a replica this long count as independent of each other in the errors of observables."""


@dataclass(frozen=True)
class Evaluation:
    """What one potential did.

    Attributes:
        summaries: One per horizon, the numbers of the report.
        curves: Survival and observables at the first horizon, for the figures.
        axes: How to draw the observables, by name.
    """

    summaries: list[dict[str, Any]]
    curves: dict[str, Any]
    axes: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class _Run:
    """Recorded frames (n_frames, n_replicas, ...) with their times, and when each replica failed (inf if never)."""

    positions: Tensor
    velocities: Tensor
    valid: Tensor
    times_ps: Tensor
    failed_ps: Tensor
    last: Tensor


class Evaluator:
    """Simulates from start frames and measures.

    A replica counts as failed from the moment its detector flags it, and leaves the simulation. Observables are means
    over the frames before that.

    Args:
        starts: Start frames, a file or ASE structures that the potential was not trained on.
        reference: Frames for reference bond lengths and observables; the starts if not given.
        labelled: Frames with energies and forces for the errors; none are reported if not given.
        detector: When a replica has failed; a bond 0.5 Å off its mean length if not given.
        observables: What to compare; bond lengths, h(r) and bond angles if not given.
        dynamics: What to compare of the motion; the reference is then one trajectory, contiguous in time, with frames
            ``record_every_fs`` apart.
        integrator: Thermostat, temperature and timestep; Langevin at 300 K with 0.5 fs if not given.
        n_replicas: Replicas, spread evenly over the start frames.
        horizons_ps: Times that failures are counted up to; the first one is the headline.
        record_every_fs: Time between frames that the observables see, in fs.
        check_every_fs: Time between two looks of the detector, in fs.
        execution: How the simulator runs its steps; the fastest way that works if not given.
        bonds: Pairs of bonded atoms; found from covalent radii if not given.
        energy_key: Key of the total energy in ``labelled``.
        forces_key: Key of the forces in ``labelled``.
        seed: Seeds velocities and noise: equal seeds make runs of two potentials comparable replica by replica.

    Raises:
        ValueError: If frames and settings do not fit together.
    """

    def __init__(
        self,
        starts: Frames,
        reference: Frames | None = None,
        labelled: Frames | None = None,
        *,
        detector: Detector | None = None,
        observables: Sequence[Observable] | None = None,
        dynamics: Sequence[TimeCorrelation] = (),
        integrator: Integrator | None = None,
        n_replicas: int = 32,
        horizons_ps: Sequence[float] = (1.0,),
        record_every_fs: float = 50.0,
        check_every_fs: float = 5.0,
        execution: Execution | None = None,
        bonds: Sequence[tuple[int, int]] | None = None,
        energy_key: str = ENERGY_KEY,
        forces_key: str = FORCES_KEY,
        seed: int = 0,
    ) -> None:
        start_frames = read_frames(starts, "starts")
        reference_frames = start_frames if reference is None else read_frames(reference, "reference")
        self.labelled = None if labelled is None else read_labeled(labelled, "labelled", energy_key, forces_key)
        self.system = System.from_atoms(reference_frames[0], bonds)
        self.starts = stack_positions(start_frames, self.system, "starts")
        self.reference = stack_positions(reference_frames, self.system, "reference")
        if self.labelled is not None:
            stack_positions(self.labelled, self.system, "labelled")
        self.detector = detector or BondDeviation(threshold=0.5)
        self.observables = list(observables or [BondLengths(), DistanceDistribution(), AngleDistribution()])
        self.dynamics = list(dynamics)
        self._trajectory = trajectory_of(reference_frames) if dynamics else None
        for series in self.dynamics:
            if series.interval_fs != record_every_fs:
                raise ValueError(
                    f"interval_fs={series.interval_fs:g} of {series.name} is not record_every_fs={record_every_fs:g}: "
                    "frames are compared as they are recorded, so make them equal."
                )
        self.integrator = integrator or Langevin()
        self.n_replicas = checks.count("n_replicas", n_replicas, most=checks.MOST_REPLICAS)
        if not horizons_ps:
            raise ValueError("horizons_ps=[] is empty: give at least one time in ps.")
        self.horizons_ps = [checks.number("horizons_ps", horizon, above=0) for horizon in horizons_ps]
        self.record_every_fs = checks.number("record_every_fs", record_every_fs, above=0)
        self.check_every_fs = check_every_fs
        self.execution = execution
        self.seed = checks.seed(seed)
        self.detector.bind(self.system, self.reference)
        self.detector.check_reference(self.reference)
        self.detector.check_reference(self.starts, "starts")
        self._validate()

    def _validate(self) -> None:
        """Bring out now what else does not fit together: this may be the last part of a run of hours."""
        potential = find_potential(NoInteraction(), self.system)
        simulator = Simulator(potential, self.integrator, self.detector, check_every_fs=self.check_every_fs)
        simulator.check_record_every(checks.steps("record_every_fs", self.record_every_fs, self.integrator.timestep_fs))
        for horizon in self.horizons_ps:
            checks.steps("horizons_ps", horizon * 1000.0, self.integrator.timestep_fs)
        for observable in self.observables:
            observable.bind(self.system, self.reference[:1])
        for series in self.dynamics:
            assert self._trajectory is not None
            series.bind(self.system, *self._trajectory)

    def evaluate(self, module: nn.Module, trajectories: Path | None = None, n_trajectories: int = 3) -> Evaluation:
        """Simulate and measure.

        Args:
            module: Holds the potential.
            trajectories: Folder for a few failed and a few stable trajectories as extxyz; none are written if not
                given.
            n_trajectories: How many of each.

        Raises:
            UnusablePotentialError: If no replica lives for a single step.
        """
        potential = find_potential(module, self.system)
        reference = self.reference.to(potential.system.masses)
        self.detector.bind(potential.system, reference)
        for observable in self.observables:
            observable.bind(potential.system, reference)
        for series in self.dynamics:
            assert self._trajectory is not None
            series.bind(self.system, *self._trajectory)
        run = self._simulate(potential)
        self._refuse_unusable(run, potential.system)
        broken = self._broken(run, potential.system)
        if trajectories is not None:
            self._write(run, potential.system, trajectories, n_trajectories, broken)
        errors = self._errors(potential)
        summaries = [self._summary(run, horizon, errors, broken) for horizon in self.horizons_ps]
        return Evaluation(summaries, self._curves(run, self.horizons_ps[0]), self._axes())

    def _simulate(self, potential: Potential) -> _Run:
        simulator = Simulator(
            potential,
            self.integrator,
            self.detector,
            check_every_fs=self.check_every_fs,
            execution=self.execution,
        )
        generator = torch.Generator(potential.device).manual_seed(self.seed)
        chosen = torch.linspace(0, len(self.starts) - 1, self.n_replicas).round().long()
        state = simulator.prepare(self.starts[chosen], generator)
        record_every = checks.steps("record_every_fs", self.record_every_fs, self.integrator.timestep_fs)
        total = checks.steps("horizons_ps", max(self.horizons_ps) * 1000.0, self.integrator.timestep_fs)
        simulator.forces.expected_steps = total
        segment = max(1, round(SEGMENT_PS * 1000.0 / self.record_every_fs)) * record_every
        step_ps = self.integrator.timestep_fs / 1000.0
        active = torch.ones(self.n_replicas, dtype=torch.bool, device=potential.device)
        failed_ps = torch.full((self.n_replicas,), torch.inf, dtype=torch.float64)
        positions, velocities, valid, times = [], [], [], []
        for done in range(0, total, segment):
            n_steps = min(segment, total - done)
            window = simulator.run(
                state, n_steps, record_every, generator, active=active, stop_unstable=True, continues=done > 0
            )
            flagged = (window.unstable_step != NEVER).cpu()
            failed_ps = torch.where(flagged, (done + window.unstable_step.cpu().double()) * step_ps, failed_ps)
            positions.append(window.positions.cpu())
            velocities.append(window.velocities.cpu())
            valid.append(window.valid.cpu())
            times.append(
                (done + record_every * torch.arange(1.0, len(window.positions) + 1, dtype=torch.float64)) * step_ps
            )
            state, active = window.end, active & ~window.stopped
            if not active.any():
                break
        return _Run(
            torch.cat(positions), torch.cat(velocities), torch.cat(valid), torch.cat(times), failed_ps,
            state.positions.cpu(),
        )  # fmt: skip

    def _refuse_unusable(self, run: _Run, system: System) -> None:
        if (run.failed_ps > 0.0).any():
            return
        raise UnusablePotentialError(
            f"all {self.n_replicas} replicas have failed in their start frames ({self.detector}): there is nothing to "
            "measure. The potential gives no finite forces there: train it again, at a lower learning rate, or check its units.",
            system.atoms(run.last[0].to(system.masses)),
        )

    def _broken(self, run: _Run, system: System) -> dict[int, str]:
        """Which atoms broke, such as ``C1-H14``, by replica that failed; those where no atom stands out are left out."""
        last = run.last.to(system.masses)
        offending_atoms = self.detector.offending_atoms(last, torch.zeros_like(last))
        return {
            replica: "-".join(f"{system.symbols[atom]}{atom}" for atom in atoms)
            for replica, atoms in enumerate(offending_atoms)
            if atoms and run.failed_ps[replica].isfinite()
        }

    def _summary(
        self, run: _Run, horizon: float, errors: dict[str, float | None], broken: dict[int, str]
    ) -> dict[str, Any]:
        failed = (run.failed_ps <= horizon).numpy()
        followed = np.minimum(run.failed_ps.numpy(), horizon)
        rate = failure_rate_per_ns(int(failed.sum()), float(followed.sum()))
        self._update_observables(run, horizon)
        return {
            "replicas": self.n_replicas,
            "horizon_ps": horizon,
            "threshold": self.detector.threshold,
            "detector": str(self.detector),
            "unstable": int(failed.sum()),
            "median_stable_ps": median_stable_ps(kaplan_meier(followed, failed)),
            "broken_atoms": dict(
                Counter(label for replica, label in broken.items() if failed[replica]).most_common(MOST_COMMON)
            ),
            "failures_per_ns": rate.per_ns,
            "failures_per_ns_interval": [rate.low, rate.high],
            **errors,
            "observables": {each.name: each.mean_absolute_error() if seen else None for each, seen in self._seen()},
            "observables_standard_error": {
                each.name: each.standard_error().mean().item() if seen else None for each, seen in self._seen()
            },
        }

    def _seen(self) -> list[tuple[Observable | TimeCorrelation, bool]]:
        """Everything that is compared, and whether enough was simulated for it."""
        by_frame = [(observable, bool(observable.count > 0)) for observable in self.observables]
        return [*by_frame, *((series, series.complete) for series in self.dynamics)]

    def _curves(self, run: _Run, horizon: float) -> dict[str, Any]:
        longest = max(self.horizons_ps)
        survival = kaplan_meier(np.minimum(run.failed_ps.numpy(), longest), (run.failed_ps <= longest).numpy())
        self._update_observables(run, horizon)
        observables = {
            each.name: {
                "mean": each.compute().reshape(-1).tolist(),
                "target": each.known_target.reshape(-1).tolist(),
                "standard_error": each.standard_error().reshape(-1).tolist(),
            }
            for each, seen in self._seen()
            if seen
        }
        return {
            "survival": {
                name: np.asarray(getattr(survival, name)).tolist() for name in ("time_ps", "probability", "low", "high")
            },
            "observables": observables,
        }

    def _axes(self) -> dict[str, Any]:
        return {each.name: each.axis() for each, _ in self._seen()}

    def _update_observables(self, run: _Run, horizon: float) -> None:
        within = run.valid & (run.times_ps <= horizon * (1 + 1e-9))[:, None]
        stretch = (run.times_ps / BLOCK_PS - 1e-9).long()
        for observable in self.observables:
            observable.reset()
            for number in stretch.unique():
                for replica in range(self.n_replicas):
                    observable.update(run.positions[within[:, replica] & (stretch == number), replica])
        n_frames = int(within.any(dim=1).sum())
        for series in self.dynamics:
            series.reset()
            if n_frames > 0:
                series.update(run.positions[:n_frames], run.velocities[:n_frames], within[:n_frames])

    def _errors(self, potential: Potential) -> dict[str, float | None]:
        """Mean absolute errors on the labelled frames: forces in meV/Å, energies in meV per atom."""
        if self.labelled is None:
            return {"force_mae_mev_per_A": None, "energy_mae_mev_per_atom": None}
        energy_errors, force_errors = errors(potential, self.labelled)
        return {
            "force_mae_mev_per_A": 1000.0 * force_errors.abs().mean().item(),
            "energy_mae_mev_per_atom": 1000.0 * energy_errors.abs().mean().item(),
        }

    def _write(self, run: _Run, system: System, folder: Path, n_trajectories: int, broken: dict[int, str]) -> None:
        """Write the trajectories that failed first, each up to the frame that failed, and the first stable ones."""
        folder.mkdir(parents=True, exist_ok=True)
        order = run.failed_ps.argsort(stable=True).tolist()
        failed = [replica for replica in order if run.failed_ps[replica].isfinite()][:n_trajectories]
        stable = [replica for replica in order if run.failed_ps[replica].isinf()][:n_trajectories]
        for kind, replicas in (("failed", failed), ("stable", stable)):
            for replica in replicas:
                frames = [
                    _stamped(system, run.positions[index, replica], run.times_ps[index].item())
                    for index in run.valid[:, replica].nonzero()[:, 0].tolist()
                ]
                if kind == "failed":
                    frames.append(_stamped(system, run.last[replica], run.failed_ps[replica].item()))
                    frames[-1].info["broken_atoms"] = broken.get(replica, "")
                ase.io.write(folder / f"{kind}_replica{replica:02d}.extxyz", frames)


def errors(potential: Potential, labelled: Sequence[Atoms]) -> tuple[Tensor, Tensor]:
    """Predicted minus labelled.

    Args:
        potential: Of the system that the frames are of.
        labelled: Frames as :func:`stable_plugin.md.frames.read_labeled` gives them.

    Returns:
        Of the energies per atom, (n_frames,) in eV, and of the forces, (n_frames, n_atoms, 3) in eV/Å.
    """
    energies = torch.tensor([frame.info[ENERGY_KEY] for frame in labelled], dtype=torch.float64)
    forces = torch.tensor(np.stack([frame.arrays[FORCES_KEY] for frame in labelled]))
    positions = stack_positions(labelled, potential.system, "labelled").to(potential.device, potential.dtype)
    with potential.frozen():
        predicted = [potential.energies_and_forces(part, potential.edges(part)) for part in positions.split(CHUNK)]
    total = torch.cat([pair[0].double().cpu() for pair in predicted]) + potential.constant_energy
    pull = torch.cat([pair[1].double().cpu() for pair in predicted])
    return (total - energies) / potential.system.n_atoms, pull - forces


def mean_energy_error(potential: Potential, labelled: Sequence[Atoms]) -> float:
    """Mean of the energies' errors in eV per atom; arguments as for :func:`errors`."""
    return float(errors(potential, labelled)[0].mean())


def _stamped(system: System, positions: Tensor, time_ps: float) -> Any:
    frame = system.atoms(positions)
    frame.info["time_ps"] = round(time_ps, 6)
    return frame


def evaluate(module: nn.Module, starts: Frames, reference: Frames | None = None, **arguments: Any) -> Evaluation:
    """Evaluate a potential in one call.

    Args:
        module: Holds the potential, for instance what :func:`stable_plugin.models.mace.potential.load_mace` returns.
        starts: Start frames that the potential was not trained on.
        reference: Frames for reference bond lengths and observables.
        arguments: Further arguments of :class:`Evaluator`.
    """
    return Evaluator(starts, reference, **arguments).evaluate(module)
