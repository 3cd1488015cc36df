"""Settings of StABlE training, each written once: type, meaning, unit, default, and the bounds that are checked.

Callback, mixin, native fairchem callback, recipes and the reference page take them from here. To add a setting, add a
field with its docstring and use ``config.<field>`` where it matters.
"""

from __future__ import annotations

import functools
import inspect
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from math import ceil
from typing import Annotated, Any, Concatenate, Literal, ParamSpec, TypeVar, get_args

from torch import Tensor

from stable_plugin.detectors import Detector, Published
from stable_plugin.detectors.published import check_name
from stable_plugin.md.execution import Execution
from stable_plugin.md.frames import Frames, read_frames
from stable_plugin.md.integrators import Integrator, Langevin
from stable_plugin.md.neighborhoods import Neighborhoods
from stable_plugin.models import PotentialMaker, potential_maker
from stable_plugin.observables.base import Observable
from stable_plugin.observables.series import TimeCorrelation
from stable_plugin.runtime import checks
from stable_plugin.runtime.checks import Count, Number, Seed
from stable_plugin.runtime.intervals import error_share, sequential_limit

Loss = Callable[[Tensor, Tensor], Tensor]
"""A differentiable scalar of the mean observable and its target, both (n_values,)."""

Local = Neighborhoods | Literal["auto"] | None

Objective = Literal["margin", "boltzmann", "both"]

P = ParamSpec("P")
S = TypeVar("S")
A = TypeVar("A")

_NAMED = re.compile(r"\w+=")
"""Beginning of an error that names an argument."""

MIN_FRAMES = 2
"""A covariance needs two frames."""

TYPICAL_LEARNING_WINDOWS = 10
"""Learning windows of a typical repair."""

HEATING = 1.5
"""Temperature of learning windows of the margin over that of the integrator, if the user does not choose it."""

MAX_FORCE_MAE_GROWTH = 0.10
"""Relative growth of the force error above which a report or the callback warns."""

MAX_ENERGY_MAE_RATIO = 2.0
"""Ratio of the energy errors, after to before, above which a report or the callback warns."""


def mean_squared_error(mean: Tensor, target: Tensor) -> Tensor:
    """Return the mean over the values of (mean - target)².

    Args:
        mean: Mean of an observable, (n_values,).
        target: Its target, (n_values,).
    """
    return (mean - target).square().mean()


def wasserstein(mean: Tensor, target: Tensor) -> Tensor:
    """Return the Wasserstein-1 distance of two curves in bins: the mean absolute difference of their sums up to each bin.

    It also pulls on peaks that do not overlap, for which the squared error has no gradient, and where they do, its gradient is
    less noisy: by 5 to 45 % for a peak that is 0.1 to 1.3 of its widths off. It means something for curves, such as
    RadialDistribution, and for single numbers, but not for lists of bond lengths. In a recipe:
    ``loss: {_target_: stable_plugin.config.wasserstein, _partial_: true}``.

    Args:
        mean: Mean of an observable, (n_values,).
        target: Its target, (n_values,).
    """
    return (mean - target).cumsum(dim=0).abs().mean()


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When training probes the potential, when it learns, and when it stops.

    Source: the loop of Raja et al., TMLR 2025, arXiv:2402.13984, section 3, with other conditions. There, learning begins at
    an unstable fraction of 0.75 and ends at 0, in windows that are also learned from.
    """

    max_failures_per_ns: Annotated[float, Number(above=0)] = 100.0
    """Training ends when the failure rate is below this many failures per ns of a replica, at 95 % confidence. It takes
    about 3.8 divided by it in ns, summed over the replicas, of simulation without failures: 38 ps for 100 per ns."""

    max_observable_loss: Annotated[float, Number(above=0)] | None = None
    """Training also goes on while the loss of the observables in a probe is larger than this, as for a stable potential that is
    to reproduce a measured pressure. A loss of 1 is a deviation by the ``scale`` of an observable. Only failures count if None."""

    probe_every: Annotated[int, Count()] = 3
    """Learning windows between two probes. A probe is one window from start states that are always the same, and that are
    not learned from: its unstable fraction decides whether to go on learning."""

    lr_patience: Annotated[int, Count()] = 10
    """Learning windows without a smaller unstable fraction in a probe before the learning rate is cut."""

    lr_cut: Annotated[float, Number(above=0, at_most=1)] = 0.2
    """Factor of a cut of the learning rate."""

    max_lr_cuts: Annotated[int, Count(at_least=0)] = 2
    """Cuts in one learning phase; instead of one more, the learning rate returns to its first value."""

    min_windows: Annotated[int, Count(at_least=0)] = 0
    """Learning windows before the first verification, also where probes show no failure. They are hotter than probes, and find
    failures that come less than once in the time of a probe: use some for a small ``max_failures_per_ns``."""

    max_windows: Annotated[int, Count()] | None = None
    """Learning windows after which training ends, with a last probe and, if that is passed, a last verification; no limit if
    None."""

    def __post_init__(self) -> None:
        checks.check_fields(self)
        if self.max_windows is not None and self.min_windows > self.max_windows:
            raise ValueError(
                f"min_windows={self.min_windows} is more than max_windows={self.max_windows}: raise max_windows, or lower "
                "min_windows."
            )

    def verification_ps(self, verification: int = 1, failures: int = 0) -> float:
        """Return the time, summed over the replicas, that shows a rate below ``max_failures_per_ns``, in ps.

        Args:
            verification: Number of the verification; the 5 % of error are spent over all of them.
            failures: Failures within that time.
        """
        return 1000.0 * sequential_limit(failures, error_share(verification)) / self.max_failures_per_ns

    def expected_windows(self, window_ps: float, n_replicas: int) -> int:
        """Return roughly how many windows a repair takes; the cost of compiling the model is compared with them.

        Args:
            window_ps: Length of a window in ps.
            n_replicas: Number of replicas.
        """
        learning = min(TYPICAL_LEARNING_WINDOWS, self.max_windows or TYPICAL_LEARNING_WINDOWS)
        probes = 1 + ceil(learning / self.probe_every)
        return learning + probes + ceil(self.verification_ps() / (window_ps * n_replicas))


@dataclass(kw_only=True, repr=False)
class SystemConfig:
    """What is simulated, and what it should reproduce: one system at one state point."""

    name: str = ""
    """Name in logs and reports, where there are several systems; the chemical formula if empty."""

    weight: Annotated[float, Number(above=0)] = 1.0
    """Weight of the system's gradient relative to that of other systems."""

    structures: Frames | None = None
    """Start frames of the replicas: a file, or ASE structures. The training data's structures if None."""

    reference: Frames | None = None
    """Frames that bonds, mean bond lengths and the observables' targets are computed from: a file, or ASE structures
    sampled at the temperature of ``integrator``. ``structures`` if None. A longer trajectory gives sharper targets."""

    bonds: Sequence[tuple[int, int]] | None = None
    """Pairs of bonded atoms; if None, those that hold in nearly all reference frames."""

    integrator: Integrator = field(default_factory=Langevin)
    """Thermostat, temperature and timestep."""

    observables: Observable | Sequence[Observable] | None = None
    """What should be reproduced. If None: lengths and amplitudes of bonds; the same by molecule, and contacts, where there
    are several molecules; radial distributions of all pairs of elements in liquids and solids."""

    detector: Detector | Published | None = None
    """When a replica is unstable: a detector, or the name of a published criterion (``"mdsim"``, ``"stable"``,
    ``"mlipaudit"``, ``"spice"``). If None: bonds, angles, planes, configurations, rings, contacts, sites, temperature and
    momentum within limits from the reference."""

    local: Local = "auto"
    """What counts as one sample of the local estimator, which sees one broken molecule among hundreds: ``Molecules()``,
    ``NearestMolecules(n)``, ``AtomsWithin(radius_A)``, or None for whole frames. ``auto`` takes molecules if there are
    several and an observable is local."""

    even_sampling: Sequence[int] | None = None
    """For the local estimator: number of bins of deviation to draw samples from evenly, and samples drawn per bin and
    replica. All samples if None. The published values are (100, 5)."""

    def __post_init__(self) -> None:
        for name in ("structures", "reference"):
            source = getattr(self, name)
            if source is not None:
                setattr(self, name, read_frames(source, name))
        # Wrap a single observable; another value is wrapped too, and refused below by its type.
        if isinstance(self.observables, str) or not isinstance(self.observables, Sequence | None):
            self.observables = [self.observables]
        if self.observables is not None and not self.observables:
            raise ValueError("observables=[] is empty: pass at least one observable, or None for the defaults.")
        _check_type("name", self.name, str)
        _check_type("integrator", self.integrator, Integrator)
        if isinstance(self.detector, str):
            check_name(self.detector)
        else:
            _check_type("detector", self.detector, Detector, type(None))
        for each in self.observables or ():
            if isinstance(each, TimeCorrelation):
                raise ValueError(
                    f"observables={each!r} are of motion, which is not learned from: evaluate them, as `dynamics` of Evaluator."
                )
            _check_type("observables", each, Observable)
        if self.local != "auto" and not isinstance(self.local, Neighborhoods | None):
            raise ValueError(
                f"local={self.local!r} is not a neighborhood: pass Molecules(), NearestMolecules(n), AtomsWithin(radius_A), "
                "None or 'auto'."
            )
        if self.even_sampling is not None:
            if not isinstance(self.even_sampling, Sequence) or len(self.even_sampling) != 2:
                raise ValueError(
                    f"even_sampling={self.even_sampling!r} is not a pair of integers: pass (bins, samples per bin and "
                    "replica)."
                )
            for number in self.even_sampling:
                checks.count("even_sampling", number)
        checks.check_fields(self)

    def __repr__(self) -> str:
        shown = [
            f"{each.name}={_shown(getattr(self, each.name))}"
            for each in fields(self)
            if not _is_default(each, getattr(self, each.name))
        ]
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclass(kw_only=True, repr=False)
class StABlEConfig(SystemConfig):
    """All settings of StABlE training.

    The settings of :class:`SystemConfig` describe the system that is simulated; the others describe the run. Files are
    read and values are checked on construction.

    Source of the method: Raja, Amin, Pedregosa and Krishnapriyan, TMLR 2025, arXiv:2402.13984.

    Raises:
        ValueError: If a value is out of range, or values do not fit together.
        FileNotFoundError: If ``structures`` or ``reference`` is a path without a file.

    Example:
        >>> from stable_plugin import StABlEConfig
        >>> StABlEConfig(n_replicas=64, window_ps=0.2)
        StABlEConfig(n_replicas=64, window_ps=0.2)
    """

    potential: str | PotentialMaker | None = None
    """What makes the potential of a module that has no method ``stable_potential`` and holds no model of a known family: a
    function ``(module, system)`` that returns a ``stable_plugin.models.Potential``, the full name of one, or the name of the
    family to use. Found in the module if None."""

    systems: Sequence[SystemConfig | Mapping[str, Any]] | None = None
    """Several systems that the potential is trained on, instead of the one that the fields of :class:`SystemConfig`
    describe; also as mappings of these fields, as in YAML. If None: one system for each composition, charge, spin, head and set of fixed atoms in the structures."""

    max_systems: Annotated[int, Count()] = 8
    """Most systems that are made of the structures if ``systems`` is None; the most frequent ones are taken."""

    n_replicas: Annotated[int, Count(at_most=checks.MAX_REPLICAS)] = 32
    """Replicas simulated at once, in each process if training runs in several. The published value is 128."""

    window_ps: Annotated[float, Number(above=0)] = 0.4
    """Length of a window in ps, a multiple of the timestep. The published value is 1 ps."""

    record_every_fs: Annotated[float, Number(above=0)] = 25.0
    """Time in fs between two frames that the estimator sees, a multiple of ``check_every_fs``."""

    check_every_fs: Annotated[float, Number(above=0)] = 5.0
    """Time in fs between two calls of the detector, a multiple of the timestep."""

    schedule: Schedule = field(default_factory=Schedule)
    """When to simulate, learn and stop."""

    objective: Objective = "margin"
    """What is learned from the windows: ``margin``, that frames near failures have energies well above those of the reference;
    ``boltzmann``, that observables have their means in the reference, as published; or ``both``."""

    margin_weight: Annotated[float, Number(at_least=0, hint="Or 'auto'.")] | Literal["auto"] = "auto"
    """Factor of the margin's gradient. ``auto`` takes 0.3 times the user's loss, averaged over the steps so far: the
    margin's loss is in kT, and that much of the user's is worth one unit of it."""

    margin_frames: Annotated[int, Count()] = 128
    """Frames near failures in each optimizer step; a quarter as many of the reference are compared with."""

    learning_temperature_ratio: Annotated[float, Number(at_least=1, at_most=3, hint="Or 'auto'.")] | Literal["auto"] = (
        "auto"
    )
    """Temperature of learning windows over that of ``integrator``, at which probes and verifications are always: hotter
    replicas fail in the same ways, and sooner. ``auto`` takes 1.5, or 1 where observables are learned from, whose means
    belong to one temperature."""

    loss: Loss = mean_squared_error
    """Loss of an observable's mean and its target."""

    learning_rate: Annotated[float, Number(above=0)] | None = None
    """Learning rate of the steps that the observable takes part in; the optimizer's own if None."""

    observable_weight: Annotated[float, Number(at_least=0, hint="Or 'auto'.")] | Literal["auto"] = "auto"
    """Factor of the observable's gradient. ``auto`` makes it ``gradient_ratio`` times as long as that of the user's loss."""

    gradient_ratio: Annotated[float, Number(above=0)] = 15.0
    """Length of the observable's gradient relative to that of the user's loss, for ``observable_weight="auto"``."""

    steps_per_window: Annotated[int, Count()] = 100
    """Optimizer steps after a window. The margin takes all of them, with a learning rate that falls to 1/20, and repeats them
    before a probe until your own loss is back at its level before the repair and the margin's loss has settled; the Boltzmann
    estimator reweights the frames after its first step, and ends when they are used up."""

    min_ess_fraction: Annotated[float, Number(above=0, at_most=1)] = 0.3
    """A new window is simulated when reweighting leaves a smaller effective fraction of the sample. DiffTRe (Thaler and
    Zavadlav, Nat. Commun. 12, 6884, 2021) uses 0.9."""

    max_lr_scale: Annotated[float, Number(at_least=1)] = 1.0
    """The learning rate is multiplied or divided by up to this factor, so that the steps on a window together use up its
    effective sample size; 1 leaves it as it is."""

    start_epoch: Annotated[int, Count(at_least=0)] = 0
    """Epochs of ordinary training that come first."""

    chunk: Annotated[int, Count(hint="Or 'auto'.")] | Literal["auto"] = "auto"
    """Frames per model call of the estimator; bounds its memory. Automatic: as many as have about 1,300 atoms together on a
    CPU, and 20,000 on another device."""

    execution: Execution = field(default_factory=Execution)
    """How the simulator runs its steps: captured in CUDA graphs, compiled, on how many threads."""

    seed: Annotated[int, Seed()] = 0
    """Seed of all random streams of the simulation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_type("schedule", self.schedule, Schedule)
        _check_type("execution", self.execution, Execution)
        if self.objective not in get_args(Objective):
            raise ValueError(f"objective={self.objective!r} is not known: use one of {', '.join(get_args(Objective))}.")
        if self.potential is not None:
            potential_maker(self.potential)
        if not callable(self.loss):
            raise ValueError(f"loss={self.loss!r} is not a function: pass one of (mean, target) that returns a scalar.")
        for each in fields(self) if not self.uses_observables else ():
            value = getattr(self, each.name)
            if each.name in ("observables", "local", "even_sampling", "loss") and not _is_default(each, value):
                raise ValueError(
                    f"{each.name}={_shown(value)} is not used by objective='margin', which needs no observables: set "
                    f"objective='both' or 'boltzmann', or leave {each.name} out."
                )
        if self.schedule.max_observable_loss is not None and not self.uses_observables:
            raise ValueError(
                f"max_observable_loss={self.schedule.max_observable_loss:g} is not used by objective='margin', which needs no "
                "observables: set objective='both' or 'boltzmann', or leave max_observable_loss out."
            )
        if self.uses_observables and self.heating > 1.0:
            raise ValueError(
                f"learning_temperature_ratio={self.learning_temperature_ratio!r} with objective={self.objective!r}: means of "
                "observables belong to one temperature. Set it to 1 or 'auto', or objective='margin'."
            )
        if self.n_replicas * (self.window_steps // self.record_steps) < MIN_FRAMES:
            raise ValueError(
                f"record_every_fs={self.record_every_fs:g} gives fewer than two frames per window of "
                f"window_ps={self.window_ps:g}: lower it, or use more replicas."
            )
        checks.steps("check_every_fs", self.check_every_fs, self.integrator.timestep_fs)
        if self.systems is not None:
            self._set_systems(self.systems)

    def _set_systems(self, systems: Sequence[SystemConfig | Mapping[str, Any]]) -> None:
        own = [each.name for each in fields(SystemConfig) if not _is_default(each, getattr(self, each.name))]
        if own:
            raise ValueError(
                f"systems= and {', '.join(f'{name}=' for name in own)} were both passed: set {own[0]} in each of the systems."
            )
        self.systems = as_systems(systems, self.for_system)

    def for_system(self, system: SystemConfig) -> StABlEConfig:
        """Return the settings with a system in the place of the list of systems.

        Args:
            system: One of the systems.

        Raises:
            ValueError: If the system does not fit to the settings of the run, as its timestep to ``window_ps``.
        """
        own = {each.name: getattr(system, each.name) for each in fields(SystemConfig)}
        return replace(self, systems=None, **own)

    @property
    def window_steps(self) -> int:
        """Timesteps of a window."""
        return checks.steps("window_ps", self.window_ps * 1000.0, self.integrator.timestep_fs)

    @property
    def record_steps(self) -> int:
        """Timesteps between two frames that the estimator sees."""
        return checks.steps("record_every_fs", self.record_every_fs, self.integrator.timestep_fs)

    @property
    def check_steps(self) -> int:
        """Timesteps between two calls of the detector."""
        return checks.steps("check_every_fs", self.check_every_fs, self.integrator.timestep_fs)

    @property
    def heating(self) -> float:
        """Temperature of learning windows over that of the integrator."""
        if self.learning_temperature_ratio == "auto":
            return 1.0 if self.uses_observables else HEATING
        return self.learning_temperature_ratio

    @property
    def recorded_steps(self) -> int:
        """Timesteps between two recorded frames: the margin learns from the few frames in which a bond breaks."""
        return self.check_steps if self.uses_margin else self.record_steps

    @property
    def uses_margin(self) -> bool:
        """Whether the objective contains the failure margin."""
        return self.objective != "boltzmann"

    @property
    def uses_observables(self) -> bool:
        """Whether the objective contains the observables."""
        return self.objective != "margin"


@dataclass(kw_only=True, repr=False)
class StABlEArguments(StABlEConfig):
    """What callbacks and mixin take: the fields of a configuration, or a configuration as ``config``."""

    config: StABlEConfig | None = None
    """A whole configuration, instead of its fields."""

    def __post_init__(self) -> None:
        if self.config is None:
            super().__post_init__()
            return
        _check_type("config", self.config, StABlEConfig)
        own = {each.name for each in fields(StABlEConfig)}
        both = [e.name for e in fields(self) if e.name in own and not _is_default(e, getattr(self, e.name))]
        if both:
            raise ValueError(
                f"config= and {', '.join(f'{name}=' for name in both)} were both passed: change the configuration with "
                "dataclasses.replace(config, ...) and pass config= alone."
            )
        for name in own:
            setattr(self, name, getattr(self.config, name))
        self.config = None

    def to_config(self) -> StABlEConfig:
        """Return the settings as a plain configuration."""
        return StABlEConfig(**{each.name: getattr(self, each.name) for each in fields(StABlEConfig)})


def takes(arguments: Callable[P, A]) -> Callable[[Callable[[S, A], None]], Callable[Concatenate[S, P], None]]:
    """Let a method that takes an instance of a dataclass be called with the fields of that dataclass.

    Type checkers and editors see the fields with their types, and so does :func:`inspect.signature`.

    Args:
        arguments: The dataclass.

    Returns:
        The decorator.
    """
    signature = inspect.signature(arguments)

    def decorate(method: Callable[[S, A], None]) -> Callable[Concatenate[S, P], None]:
        def wrapper(self: S, /, *args: P.args, **kwargs: P.kwargs) -> None:
            for name in kwargs.keys() - signature.parameters.keys():
                remedy = _closest(name, signature.parameters)
                raise TypeError(f"{type(self).__name__} has no argument {name}={kwargs[name]!r}: {remedy}")
            method(self, arguments(*args, **kwargs))

        functools.update_wrapper(wrapper, method)
        hints = typing.get_type_hints(arguments)
        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        shown = [each.replace(annotation=hints[name]) for name, each in signature.parameters.items()]
        wrapper.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[own, *shown], return_annotation=None
        )
        wrapper.__annotations__ = {**{name: hints[name] for name in signature.parameters}, "return": None}
        return wrapper

    return decorate


def as_systems(
    systems: Sequence[SystemConfig | Mapping[str, Any]], check: Callable[[SystemConfig], Any] = lambda system: None
) -> list[SystemConfig]:
    """Return systems, also of mappings of their fields.

    Args:
        systems: Value of the setting.
        check: Raises an error for a system that does not fit to the other settings.

    Raises:
        ValueError: If a system is invalid; the message begins with its place in the list.
    """
    if not isinstance(systems, Sequence) or isinstance(systems, str) or not systems:
        raise ValueError(f"systems={systems!r} is not a list of systems: pass instances of SystemConfig, or None.")
    return [_as_system(system, f"systems[{number}]", check) for number, system in enumerate(systems)]


def named_systems(systems: Sequence[SystemConfig]) -> list[SystemConfig]:
    """Return systems of which each has a name of its own, the chemical formula where none is set.

    Args:
        systems: Systems with structures.

    Raises:
        ValueError: If two have the same name.
    """
    named = []
    for system in systems:
        assert system.structures is not None
        named.append(replace(system, name=system.name or read_frames(system.structures)[0].get_chemical_formula()))
    names = [system.name for system in named]
    if len(set(names)) < len(names):
        raise ValueError(f"systems have the names {names}: set a different name for each.")
    return named


def _as_system(
    system: SystemConfig | Mapping[str, Any], path: str, check: Callable[[SystemConfig], Any]
) -> SystemConfig:
    _check_type(path, system, SystemConfig, Mapping)
    own = [each.name for each in fields(SystemConfig)]
    try:
        if isinstance(system, Mapping):
            for name in system.keys() - own:
                raise ValueError(f"{name}={system[name]!r} is not a setting of a system: {_closest(name, own)}")
            system = SystemConfig(**system)
        if system.structures is None:
            raise ValueError("structures=None: pass start frames for each of the systems.")
        check(system)
    except (ValueError, FileNotFoundError) as error:
        # Settings of the run, as window_ps, are not below the path of a system.
        is_own = str(error).partition("=")[0] not in {each.name for each in fields(StABlEConfig)} - set(own)
        raise type(error)(f"{path}{'.' if is_own and _NAMED.match(str(error)) else ': '}{error}") from error
    return system


def _closest(name: str, known: Iterable[str]) -> str:
    """Return the remedy for a name that is not known."""
    known = list(known)
    close = checks.closest(name, known)
    return f"did you mean {close}?" if close else f"use one of {', '.join(known)}."


def _check_type(name: str, value: Any, *kinds: type) -> None:
    if not isinstance(value, kinds):
        wanted = " or ".join("None" if kind is type(None) else f"an instance of {kind.__name__}" for kind in kinds)
        raise ValueError(f"{name}={value!r} is of type {type(value).__name__}: pass {wanted}.")


def _is_default(each: Field[Any], value: Any) -> bool:
    if each.default is not MISSING:
        return value is each.default or (type(value) is type(each.default) and bool(value == each.default))
    assert each.default_factory is not MISSING
    default = each.default_factory()
    # Integrators and the like have no equality: compare what they consist of.
    return type(value) is type(default) and vars(value) == vars(default)


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple) and len(value) > MIN_FRAMES and not isinstance(value[0], Observable):
        return f"<{len(value)} items>"
    return getattr(value, "__name__", repr(value))
