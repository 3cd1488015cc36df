"""Evaluation of a potential: stability in molecular dynamics, observables, and errors on labeled frames."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

import torch
from ase import Atoms
from ase.calculators.calculator import Calculator
from torch import nn

from stable_plugin.algorithm.replica_pool import UnusablePotentialError
from stable_plugin.config import StABlEConfig, SystemConfig, as_systems, named_systems
from stable_plugin.defaults import default_detector, evaluated_observables, find_detector
from stable_plugin.detectors import Detector, Published
from stable_plugin.evaluation.conditions import failures_under, other_conditions
from stable_plugin.evaluation.distributions import DistributionTest
from stable_plugin.evaluation.energies import energy_limits, stop_at_energy_failures
from stable_plugin.evaluation.label_errors import mean_absolute_errors
from stable_plugin.evaluation.preflight import check_potential
from stable_plugin.evaluation.simulated_splitting import check_splitting, estimate_by_splitting
from stable_plugin.evaluation.simulation import ReplicaTrajectories, SimulationSettings, simulate_replicas
from stable_plugin.evaluation.summaries import Evaluation, ObservableComparison, curves, summarize
from stable_plugin.evaluation.trajectories import (
    failure_descriptions,
    offending_atom_labels,
    write_to_label,
    write_trajectories,
)
from stable_plugin.evaluation.verdict import MAX_FAILURES_PER_NS, Method, judge_by_splitting
from stable_plugin.md import Execution, Integrator, Langevin
from stable_plugin.md.cells import optional, stack_cells
from stable_plugin.md.compositions import frames_by_name, split_by_composition
from stable_plugin.md.frames import Frames, read_frames, warn_temperature
from stable_plugin.md.labels import ENERGY_KEY, FORCES_KEY, read_labeled
from stable_plugin.md.system import System, stack_positions
from stable_plugin.models import NoInteraction, Potential, find_potential
from stable_plugin.observables import Observable, PotentialObservable, TimeCorrelation, trajectory_from_atoms
from stable_plugin.runtime import checks

log = logging.getLogger(__name__)


class Evaluator:
    """Simulate replicas with a potential, count failures, and compare observables with a reference.

    A replica has failed once the detector flags it, and is stopped then. Observables are averaged over the frames
    before the failure.

    Args:
        starts: Start frames, as a file or ASE structures, that the potential was not trained on. None with ``systems``.
        reference: Frames for reference bond lengths and observables; ``starts`` if None.
        labeled: Frames with energies and forces, for the errors on them; no errors are reported if None.
        detector: Detector that decides when a replica has failed, or the name of a published criterion (``"mdsim"``,
            ``"stable"``, ``"mlipaudit"``, ``"spice"``); limits from the reference if None.
        observables: Observables to compare; if None, bond lengths, h(r) and bond angles of molecules, and those that
            training takes for other systems.
        dynamics: Observables of trajectories to compare. ``reference`` must then be one trajectory, contiguous in
            time, with frames ``record_every_fs`` apart.
        integrator: Thermostat, temperature and timestep; Langevin at 300 K with 0.5 fs if None.
        n_replicas: Number of replicas, spread evenly over the start frames.
        horizons_ps: Times in ps up to which failures are counted; the first one is the headline of the report.
        record_every_fs: Time between two frames that the observables see, in fs.
        check_every_fs: Time between two checks of the detector, in fs.
        max_failures_per_ns: Failure rate in 1/ns up to which the verdict is that the potential holds.
        equilibration_fraction: Fraction of the simulated time that is left out, at its beginning, where distributions are
            compared with the reference.
        other_conditions: Whether to count failures also at 0.7 and 1.4 times the temperature, and at timesteps of 0.5, 1 and
            2 fs, up to the first horizon.
        method: How the failure rate is estimated: ``"direct"`` counts failures of the replicas; ``"splitting"`` also estimates
            rates far below one per simulated time, from copies of replicas that came near a failure, see
            ``stable_plugin.evaluation.splitting``. The verdict up to the longest horizon is then by it.
        preflight: Whether to scan the potential for holes and faults before the simulation, see
            :func:`~stable_plugin.evaluation.check_potential`.
        execution: How the simulator runs its steps; chosen automatically if None.
        bonds: Pairs of bonded atoms; if None, those that hold in nearly all reference frames.
        energy_key: Key of the total energy in ``labeled``.
        forces_key: Key of the forces in ``labeled``.
        max_systems: Number of systems in the start frames that are evaluated, the most frequent ones.
        seed: Seed of velocities and noise. With equal seeds, two potentials can be compared replica by replica.
        systems: Several systems or state points, in the place of ``starts`` and what belongs to one system: each with a name,
            start frames as ``structures``, ``reference``, ``integrator``, ``observables``, ``detector`` and ``bonds``. One
            report has all of them.

    Attributes:
        others: Evaluators of the other systems by name, where the start frames have several. This one is of the most
            frequent that can be evaluated; the errors are on labeled frames of all systems.
        name: Name of the system: its chemical formula, with what tells it from others of this formula.
        not_evaluated: Systems in the start frames that are not evaluated, with the reason.
        failed: Names of those in ``not_evaluated`` that lack something; the others are beyond ``max_systems``, or isolated atoms.

    Raises:
        ValueError: If a setting is out of range, or frames and settings do not match. Where the start frames have several
            systems, only if that holds for all of them.
        FileNotFoundError: If a file of frames does not exist.
    """

    def __init__(
        self,
        starts: Frames | None = None,
        reference: Frames | None = None,
        labeled: Frames | None = None,
        *,
        detector: Detector | Published | None = None,
        observables: Sequence[Observable] | None = None,
        dynamics: Sequence[TimeCorrelation] = (),
        integrator: Integrator | None = None,
        n_replicas: int = StABlEConfig.n_replicas,
        horizons_ps: Sequence[float] = (1.0,),
        record_every_fs: float = 50.0,
        check_every_fs: float = StABlEConfig.check_every_fs,
        max_failures_per_ns: float = MAX_FAILURES_PER_NS,
        equilibration_fraction: float = SimulationSettings.equilibration_fraction,
        other_conditions: bool = False,
        method: Method = "direct",
        preflight: bool = False,
        execution: Execution | None = None,
        bonds: Sequence[tuple[int, int]] | None = None,
        energy_key: str = ENERGY_KEY,
        forces_key: str = FORCES_KEY,
        max_systems: int = StABlEConfig.max_systems,
        seed: int = StABlEConfig.seed,
        systems: Sequence[SystemConfig | Mapping[str, Any]] | None = None,
    ) -> None:
        further: list[SystemConfig] = []
        if systems is not None:
            _refuse_beside_systems(
                starts=starts,
                reference=reference,
                detector=detector,
                observables=observables,
                dynamics=dynamics or None,
                integrator=integrator,
                bonds=bonds,
            )
            first, *further = named_systems(as_systems(systems))
            starts, reference, bonds, integrator = first.structures, first.reference, first.bonds, first.integrator
            detector, observables = first.detector, _observables(first)
        if starts is None:
            raise ValueError("starts=None: pass start frames, or systems=.")
        shared: dict[str, Any] = {
            "integrator": integrator or Langevin(),
            "n_replicas": n_replicas,
            "horizons_ps": horizons_ps,
            "record_every_fs": record_every_fs,
            "check_every_fs": check_every_fs,
            "max_failures_per_ns": max_failures_per_ns,
            "equilibration_fraction": equilibration_fraction,
            "execution": execution or Execution(),
            "seed": seed,
        }
        self.settings = SimulationSettings(**shared)
        self.other_conditions = checks.flag("other_conditions", other_conditions)
        self.preflight = checks.flag("preflight", preflight)
        if method not in get_args(Method):
            raise ValueError(f"method={method!r} is not a method: pass 'direct' or 'splitting'.")
        self.method = method
        inherited = {**shared, "other_conditions": other_conditions, "method": method, "preflight": preflight}
        checks.count("max_systems", max_systems, at_least=1)
        all_starts = split_by_composition(read_frames(starts, "starts"))
        all_reference = None if reference is None else read_frames(reference, "reference")
        references = all_starts if all_reference is None else frames_by_name(all_starts, all_reference)
        names, self.not_evaluated, self.failed = _simulated(all_starts, references, max_systems)
        if len(names) > 1 and (bonds is not None or dynamics):
            raise ValueError(
                f"bonds= and dynamics= belong to one system, but starts have several ({', '.join(names)}): "
                "pass the frames of one of them."
            )
        if systems is not None:
            _refuse_several("systems[0]", names)
        self.labeled = None if labeled is None else read_labeled(labeled, "labeled", energy_key, forces_key)
        self.name, self.others = "", dict[str, Evaluator]()
        errors: dict[str, ValueError] = {}
        for name in names:
            # Frames of another system alone are named below.
            own_reference = references.get(name) or all_reference or []
            try:
                if self.name:
                    self.others[name] = Evaluator(
                        all_starts[name],
                        own_reference,
                        detector=copy.deepcopy(detector),
                        observables=copy.deepcopy(observables),
                        **inherited,
                    )
                    continue
                if reference is not None:
                    warn_temperature(own_reference, self.settings.integrator.temperature_K, "reference")
                first_detector = detector if len(names) == 1 else copy.deepcopy(detector)
                self._set_up(all_starts[name], own_reference, bonds, first_detector, observables, dynamics)
                self.name = name
            except ValueError as error:
                errors[name] = error
        if not self.name:
            raise errors[names[0]]
        for name in errors:
            log.warning("%s is not evaluated, the other systems are: %s", name, errors[name])
        self.not_evaluated |= {name: str(error) for name, error in errors.items()}
        self.failed += errors
        if systems is not None:
            self.name = first.name
            for number, each in enumerate(further, start=1):
                self.others[each.name] = self._of_system(each, f"systems[{number}]", inherited)

    def _of_system(self, system: SystemConfig, path: str, settings: dict[str, Any]) -> Evaluator:
        """Return the evaluator of a further system."""
        assert system.structures is not None
        try:
            evaluator = Evaluator(
                system.structures,
                system.reference,
                detector=system.detector,
                observables=_observables(system),
                bonds=system.bonds,
                **{**settings, "integrator": system.integrator},
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        _refuse_several(path, [evaluator.name, *evaluator.others])
        return evaluator

    def _set_up(
        self,
        starts: Sequence[Atoms],
        reference: Sequence[Atoms],
        bonds: Sequence[tuple[int, int]] | None,
        detector: Detector | Published | None,
        observables: Sequence[Observable] | None,
        dynamics: Sequence[TimeCorrelation],
    ) -> None:
        """Set what belongs to one system, and check it; the arguments are those of the class, of this system alone."""
        system = System.from_frames(reference, bonds).with_fixed(starts, reference)
        self.starts = stack_positions(starts, system, "starts")
        self.reference = stack_positions(reference, system, "reference")
        self._start_cells, self._reference_cells = stack_cells(starts, system), stack_cells(reference, system)
        self.system = system.with_cells(self._start_cells, self._reference_cells)
        if self.settings.integrator.barostat is not None:
            self.settings.integrator.barostat.check(self.system)
        self.detector = find_detector(
            detector, self.system, self.reference, self.settings.integrator, self._reference_cells
        )
        self._watches_energies = detector is None
        self.comparison = ObservableComparison(
            observables or evaluated_observables(self.system, self.settings.integrator), dynamics
        )
        self._trajectory = trajectory_from_atoms(reference) if dynamics else None
        self.distributions = DistributionTest(
            self.system,
            self.reference,
            self._reference_cells,
            self._trajectory,
            self.settings.equilibration_fraction,
        )
        self.validate()

    def __repr__(self) -> str:
        labeled = None if self.labeled is None else f"<{len(self.labeled)} frames>"
        return (
            f"{type(self).__name__}(starts=<{len(self.starts)} frames>, reference=<{len(self.reference)} frames>, "
            f"labeled={labeled}, detector={self.detector!r}, observables={self.comparison.observables}, "
            f"dynamics={self.comparison.correlations}, settings={self.settings})"
        )

    def validate(self) -> None:
        """Check that frames, detector, observables and settings match, without simulating.

        The constructor calls it: an evaluation may be the last stage of a run of hours.

        Raises:
            ValueError: If they do not match.
        """
        for correlation in self.comparison.correlations:
            if correlation.interval_fs != self.settings.record_every_fs:
                raise ValueError(
                    f"interval_fs={correlation.interval_fs:g} of {correlation.name} differs from "
                    f"record_every_fs={self.settings.record_every_fs:g}: frames are compared as they are recorded, so "
                    "set both to the same time."
                )
        longest_fs = 1000.0 * max(self.settings.horizons_ps)
        if longest_fs < self.detector.averaging_fs:
            raise ValueError(
                f"horizons_ps={self.settings.horizons_ps} are shorter than the {self.detector.averaging_fs / 1000.0:g} ps that the "
                f"detector ({self.detector}) averages over, so no failure could be found: set a longer time, or pass another "
                "detector."
            )
        cell = self._reference_cells
        self.detector.bind(self.system, self.reference, *optional(cell))
        self.detector.check_reference(self.reference, "reference", *optional(cell))
        self.detector.check_reference(self.starts, "starts", *optional(self._start_cells))
        if self.method == "splitting":
            check_splitting(self.settings.integrator, self.detector, self.settings.n_replicas)
        # The evaluated module may be on another device, so its execution settings are not checked here.
        settings = replace(self.settings, execution=Execution())
        simulator = settings.simulator(find_potential(NoInteraction(), self.system), self.detector)
        simulator.check_record_every(self.settings.record_every)
        for observable in self.comparison.observables:
            observable.bind(self.system, self.reference[:1], *optional(None if cell is None else cell[:1]))
        self._bind_correlations()

    def evaluate(
        self, module: nn.Module | Calculator, trajectories: Path | None = None, n_trajectories: int = 3
    ) -> Evaluation:
        """Simulate with a potential and measure its stability and errors, for each system in the start frames.

        A system that cannot be evaluated is left out and named in the result, unless it is the only one.

        Args:
            module: Module that holds the potential, an ASE calculator, or a model of torch-sim.
            trajectories: Folder for a few failed and a few stable trajectories as extxyz, and for ``to_label.extxyz``: the last
                frames before the failures and the first ones after, for new labels. Those of further systems are in
                subfolders of their names. None are written if None.
            n_trajectories: Maximum number of failed and of stable trajectories.

        Returns:
            Numbers and curves for the report, of the first system; :attr:`Evaluation.systems` has those of all.

        Raises:
            UnusablePotentialError: If no replica survives the first step, in any system.
        """
        # Before the simulation, which can take hours; models that draw random numbers draw the same ones in it.
        with torch.random.fork_rng(devices=[]):
            errors: Mapping[str, Any] = mean_absolute_errors(module, self.labeled)
        found: dict[str, Evaluation] = {}
        failures: dict[str, ValueError | UnusablePotentialError] = {}
        for name, each in {self.name: self, **self.others}.items():
            folder = trajectories if trajectories is None or each is self else trajectories / name
            try:
                found[name] = each._evaluate_alone(module, {} if found else errors, folder, n_trajectories)
            except (ValueError, UnusablePotentialError) as error:
                failures[name] = error
                if self.others:
                    log.warning("%s is not evaluated, the other systems are: %s", name, error)
        if not found:
            raise failures[self.name]
        first, *rest = found
        return replace(
            found[first],
            others={name: found[name] for name in rest},
            not_evaluated={**self.not_evaluated, **{name: str(error) for name, error in failures.items()}},
            failed=[*self.failed, *failures],
        )

    def _evaluate_alone(
        self, module: nn.Module | Calculator, errors: Mapping[str, Any], trajectories: Path | None, n_trajectories: int
    ) -> Evaluation:
        """Return the result of this system alone, with errors on labeled frames."""
        potential = find_potential(module, self.system)
        reference = self.reference.to(potential.system.masses)
        cell = None if self._reference_cells is None else self._reference_cells.to(reference)
        self.detector.bind(potential.system, reference, *optional(cell))
        for observable in self.comparison.observables:
            observable.bind(potential.system, reference, *optional(cell))
            if isinstance(observable, PotentialObservable):
                observable.attach(potential, self.settings.integrator.temperature_K, self.settings.n_replicas)
        self._bind_correlations()
        replicas = simulate_replicas(potential, self.detector, self.starts, self.settings, self._start_cells)
        self._raise_if_unusable(replicas, potential.system)
        energetic: dict[int, str] = {}
        limits = None
        if self._watches_energies:
            limits = energy_limits(
                potential, reference, self.settings.integrator.temperature_K, cell, self.settings.n_replicas
            )
            replicas, energetic = stop_at_energy_failures(replicas, potential, limits)
        atom_labels = offending_atom_labels(replicas, self.detector, potential.system)
        descriptions = failure_descriptions(replicas, self.detector, potential.system) | energetic
        if trajectories is not None:
            write_trajectories(replicas, potential.system, atom_labels, trajectories, n_trajectories)
            write_to_label(replicas, potential.system, atom_labels, descriptions, trajectories / "to_label.extxyz")
        horizons_ps = self.settings.horizons_ps
        summaries = [
            summarize(
                replicas,
                horizon,
                self.detector,
                self.comparison,
                errors,
                atom_labels,
                descriptions,
                self.settings.max_failures_per_ns,
            )
            | {
                "observables_w1": self.distributions.compare(
                    replicas, horizon, self.comparison.observables, self.comparison.correlations
                )
            }
            for horizon in horizons_ps
        ]
        if self.method == "splitting":
            found = estimate_by_splitting(
                potential, self.detector, self.starts, self.settings, self._start_cells, limits
            )
            longest = horizons_ps.index(max(horizons_ps))
            verdict = judge_by_splitting(summaries[longest]["verdict"], found.failures_per_ns, found.interval)
            summaries[longest] |= {"splitting": found.as_dict(), "verdict": verdict}
        if self.preflight:
            summaries[0]["preflight"] = self._check_before(module)
        if self.other_conditions:
            summaries[0]["other_conditions"] = self._under_other_conditions(potential)
        return Evaluation(
            summaries, curves(replicas, horizons_ps, self.comparison), self.comparison.axes(), name=self.name
        )

    def _check_before(self, module: nn.Module | Calculator) -> dict[str, Any]:
        """Return the findings of the static checks on the reference frames."""
        cells = self._reference_cells
        frames = [
            self.system.atoms(positions, cell=None if cells is None else cells[number])
            for number, positions in enumerate(self.reference)
        ]
        bonds = [(int(first), int(second)) for first, second in self.system.bonds]
        temperature_K = self.settings.integrator.temperature_K
        return check_potential(module, frames, temperature_K, bonds=bonds, seed=self.settings.seed).to_json()

    def _under_other_conditions(self, potential: Potential) -> list[dict[str, Any]]:
        reference = self.reference.to(potential.system.masses)
        cell = None if self._reference_cells is None else self._reference_cells.to(reference)
        integrator = self.settings.integrator

        def detector_at(temperature_K: float) -> Detector:
            changed = integrator.changed(temperature_K=temperature_K)
            detector = (
                default_detector(potential.system, reference, changed, cell, integrator.temperature_K)
                if self._watches_energies
                else copy.deepcopy(self.detector)
            )
            detector.bind(potential.system, reference, *optional(cell))
            return detector

        conditions = other_conditions(self.settings)
        return failures_under(conditions, potential, self.starts, self._start_cells, detector_at)

    def _bind_correlations(self) -> None:
        for correlation in self.comparison.correlations:
            assert self._trajectory is not None
            correlation.bind(self.system, *self._trajectory)

    def _raise_if_unusable(self, replicas: ReplicaTrajectories, system: System) -> None:
        if (replicas.failed_ps > 0.0).any():
            return
        raise UnusablePotentialError(
            f"all {self.settings.n_replicas} replicas have failed in their start frames ({self.detector}), so nothing "
            "can be measured: the potential returns no finite forces there. Train it again with a lower learning rate, "
            "or check its units.",
            system.atoms(replicas.last_positions[0].to(system.masses), cell=replicas.last_cell_of(0)),
        )


def _refuse_beside_systems(**arguments: Any) -> None:
    """Raise an error if an argument that each system has for itself is passed beside ``systems``."""
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"systems= and {name}= were both passed: describe each system in systems=.")


def _refuse_several(path: str, names: Sequence[str]) -> None:
    """Raise an error if an entry of ``systems`` has frames of several systems."""
    if len(names) > 1:
        raise ValueError(
            f"{path}.structures have several systems ({', '.join(names)}): make each an entry of systems= of its own."
        )


def _simulated(
    starts: Mapping[str, Sequence[Atoms]], references: Mapping[str, Sequence[Atoms]], max_systems: int
) -> tuple[list[str], dict[str, str], list[str]]:
    """Return the names of the systems that are simulated, the reasons for the others, and which of these lack something."""
    if len(starts) == 1:
        return list(starts), {}, []
    lacking = {name: reason for name in starts if (reason := _lack(starts[name][0], len(references.get(name, ()))))}
    usable = [name for name in starts if name not in lacking]
    if not usable:
        raise ValueError(
            f"starts have {len(starts)} compositions ({', '.join(list(starts)[:10])}), none with two reference frames: pass "
            "reference= with frames of the systems to simulate."
        )
    beyond = f"beyond the first {max_systems} systems: raise max_systems"
    left_out = lacking | dict.fromkeys(usable[max_systems:], beyond)
    log.info("starts have %d systems; simulated: %s", len(starts), ", ".join(usable[:max_systems]))
    for name, reason in left_out.items():
        log.warning("%s is not evaluated: %s", name, reason)
    return usable[:max_systems], left_out, [name for name in lacking if not _is_isolated_atom(starts[name][0])]


def _observables(system: SystemConfig) -> Sequence[Observable] | None:
    return cast("Sequence[Observable] | None", system.observables)  # one alone is made a list on construction


def _lack(atoms: Atoms, n_references: int) -> str:
    """Return why a system cannot be evaluated beside others, or an empty text."""
    if _is_isolated_atom(atoms):
        return "isolated atom, which feels no force"
    if len(atoms) == 1:
        return "one atom per cell, on which no force acts: repeat the cell, atoms.repeat((3, 3, 3))"
    if n_references < 2:
        return f"{n_references or 'no'} reference frame{'' if n_references else 's'}, two are needed: pass more in reference="
    return ""


def _is_isolated_atom(atoms: Atoms) -> bool:
    return len(atoms) == 1 and not atoms.pbc.any()


def evaluate(
    module: nn.Module | Calculator, starts: Frames, reference: Frames | None = None, **arguments: Any
) -> Evaluation:
    """Evaluate a potential in one call.

    Args:
        module: Module that holds the potential, for instance from :func:`stable_plugin.models.mace.potential.load_mace`.
        starts: Start frames that the potential was not trained on.
        reference: Frames for reference bond lengths and observables; ``starts`` if None.
        **arguments: Further arguments of :class:`Evaluator`.

    Returns:
        Numbers and curves for the report, of the first system; :attr:`Evaluation.systems` has those of all, where the start
        frames have several.
    """
    return Evaluator(starts, reference, **arguments).evaluate(module)
