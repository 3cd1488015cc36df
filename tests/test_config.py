"""The settings: one definition of each field, its checks, and every place that takes it."""

import ast
import inspect
import re
import typing
from dataclasses import MISSING, dataclass, fields, replace
from typing import Annotated

import ase.io
import pytest
from ase.build import molecule
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from stable_plugin import (
    BondAmplitudes,
    BondDeviation,
    BondLengths,
    Execution,
    Langevin,
    Molecules,
    Schedule,
    StABlECallback,
    StABlEConfig,
    StABlEMixin,
    config,
)
from stable_plugin.config import StABlEArguments, SystemConfig, takes
from stable_plugin.runtime.checks import Number

NAMES = [field.name for field in fields(StABlEConfig)]


def waters(n_frames=3):
    """Return structures of water with small displacements."""
    frames = [molecule("H2O") for _ in range(n_frames)]
    for seed, frame in enumerate(frames):
        frame.rattle(0.01, seed=seed)
    return frames


def docstrings():
    """Return the docstring below each annotated field of the configuration's classes, by name."""
    found = {}
    for node in ast.parse(inspect.getsource(config)).body:
        if isinstance(node, ast.ClassDef) and node.name in {SystemConfig.__name__, StABlEConfig.__name__}:
            for field, after in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(field, ast.AnnAssign):
                    is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                    found[field.target.id] = after.value.value if is_text else None
    return found


def assert_takes_all_fields(method):
    """Assert that a signature has the configuration's fields, with the same defaults and types."""
    parameters = inspect.signature(method).parameters
    hints = typing.get_type_hints(StABlEConfig)
    for field in fields(StABlEConfig):
        parameter = parameters[field.name]
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert parameter.annotation == hints[field.name]
        if field.default is not MISSING:
            assert parameter.default is field.default
        else:
            # dataclasses show a marker in place of the default of a factory, the same in both signatures.
            assert parameter.default is inspect.signature(StABlEConfig).parameters[field.name].default
    return set(parameters) - set(NAMES)


def test_every_field_has_a_docstring():
    found = docstrings()
    assert set(found) == set(NAMES)
    for name, text in found.items():
        assert isinstance(text, str) and text[0].isupper() and text.rstrip().endswith("."), name


def test_callback_takes_all_fields():
    assert assert_takes_all_fields(StABlECallback) == {"config"}
    assert repr(StABlECallback().config) == repr(StABlEConfig())


def test_configure_stable_takes_all_fields():
    assert assert_takes_all_fields(StABlEMixin.configure_stable) == {"self", "config"}


def test_fairchem_callback_takes_all_fields():
    pytest.importorskip("fairchem")
    from stable_plugin.integrations.fairchem import StABlECallback as FairchemCallback

    own = {"task_name", "conservative", "charge", "spin"}
    assert assert_takes_all_fields(FairchemCallback) == {"config", *own}
    by_config = FairchemCallback(config=StABlEConfig(n_replicas=4), task_name="omol")
    by_fields = FairchemCallback(n_replicas=4, task_name="omol")
    assert repr(by_config) == repr(by_fields) == "StABlECallback(n_replicas=4, task_name='omol')"
    assert type(by_config.config) is StABlEConfig


CHANGES = {
    "structures": waters(),
    "integrator": Langevin(400.0),
    "observables": [BondLengths()],
    "detector": BondDeviation(0.3),
    "objective": "both",
    "n_replicas": 4,
    "window_ps": 0.2,
    "schedule": Schedule(max_failures_per_ns=50.0),
    "observable_weight": 2.0,
}


def test_callback_config_equals_its_fields():
    whole = StABlEConfig(**CHANGES)
    by_config, by_fields = StABlECallback(config=whole).config, StABlECallback(**CHANGES).config
    assert type(by_config) is type(by_fields) is StABlEConfig
    for name in set(NAMES) - set(CHANGES):
        assert repr(getattr(by_config, name)) == repr(getattr(by_fields, name)), name
    for name, value in CHANGES.items():
        assert getattr(by_config, name) == getattr(by_fields, name) == value, name
    assert by_config == whole


@pytest.mark.parametrize(
    "changes", [{"n_replicas": 8}, {"integrator": Langevin(10.0), "schedule": Schedule(lr_cut=0.5)}]
)
def test_config_with_a_field_is_refused(changes):
    names = " ".join(rf"{name}=,?" for name in changes)
    with pytest.raises(ValueError, match=rf"^config= and {names} were both passed: .*dataclasses\.replace\(config"):
        StABlECallback(config=StABlEConfig(n_replicas=4), **changes)


def test_config_of_another_type_is_named():
    with pytest.raises(
        ValueError, match=r"^config=\{'n_replicas': 4\} is of type dict: pass an instance of StABlEConfig\.$"
    ):
        StABlECallback(config={"n_replicas": 4})


OUT_OF_RANGE = {
    "n_replicas": (0, 2.5, True, 1_000_001),
    "window_ps": (0.0, -1.0, float("nan"), "1"),
    "record_every_fs": (0.0, float("inf")),
    "check_every_fs": (0.0, -5.0),
    "learning_rate": (0.0, -1e-3, "auto"),
    "observable_weight": (-1.0, "Auto", None),
    "gradient_ratio": (0.0, None),
    "margin_frames": (0, 1.5),
    "margin_weight": (-1.0, "Auto", None),
    "learning_temperature_ratio": (0.9, 3.1, "Auto", None),
    "steps_per_window": (0, 1.5),
    "min_ess_fraction": (0.0, 1.1),
    "max_lr_scale": (0.9, None),
    "start_epoch": (-1, 0.5),
    "chunk": (0, None, "Auto"),
    "seed": (-1, 2**63 - 1, None),
    "weight": (0.0, -1.0, None),
    "max_systems": (0, 1.5, None),
}
OTHER_KIND = {
    "even_sampling": ((100, "is not a pair of integers: pass"), ((1, 2, 3), "is not a pair of integers: pass")),
    "local": (("molecule", r"is not a neighborhood: pass Molecules\(\)"), (3, "is not a neighborhood: pass")),
    "integrator": ((300.0, "pass an instance of Integrator"), (None, "pass an instance of Integrator")),
    "detector": (
        ("bonds", "is not a published criterion: pass one of mdsim, stable"),
        (3, "pass an instance of Detector or None"),
    ),
    "potential": (("gap", "is not a family: use one of"), (3, "is not a function: pass one of")),
    "observables": (
        ("lengths", "pass an instance of Observable"),
        (3, "pass an instance of Observable"),
        ([], "is empty: pass at least one observable"),
    ),
    "name": ((3, "pass an instance of str"), (None, "pass an instance of str")),
    "systems": (([], "is not a list of systems: pass instances of SystemConfig"), (3, "is not a list of systems")),
    "schedule": (({"max_failures_per_ns": 1.0}, "pass an instance of Schedule"),),
    "execution": ((None, "pass an instance of Execution"),),
    "objective": (("margins", "is not known: use one of margin, boltzmann, both"), (None, "use one of")),
    "loss": ((2.0, r"is not a function: pass one of \(mean, target\)"),),
    "structures": (([], "pass at least one"), (5, r"pass a list of ase\.Atoms"), (molecule("H2O"), "pass a list of")),
    "reference": (([], "pass at least one"), ([1, 2], r"pass a list of ase\.Atoms")),
}
REMEDIES = [
    *((name, value, "is out of range: pass a") for name, values in OUT_OF_RANGE.items() for value in values),
    *((name, *case) for name, cases in OTHER_KIND.items() for case in cases),
]


@pytest.mark.parametrize(("name", "value", "remedy"), REMEDIES, ids=[f"{case[0]}-{case[1]}" for case in REMEDIES])
def test_config_names_an_invalid_value(name, value, remedy):
    with pytest.raises(ValueError, match=rf"^{name}={re.escape(repr(value))} .*{remedy}"):
        StABlEConfig(**{name: value})


def test_every_field_has_an_invalid_value():
    # Bonds are compared with a structure, which is not known on construction.
    assert {*OUT_OF_RANGE, *OTHER_KIND} == set(NAMES) - {"bonds"}


@pytest.mark.parametrize("pair", [(0, 5), (100, 0), (100, 2.5)])
def test_even_sampling_rejects_invalid_counts(pair):
    with pytest.raises(ValueError, match=r"^even_sampling=(0|2\.5) is out of range: pass an integer >= 1"):
        StABlEConfig(even_sampling=pair)


def test_observables_accept_a_single_one():
    lengths = BondLengths()
    assert StABlEConfig(objective="both", observables=lengths).observables == [lengths]


@pytest.mark.parametrize(
    ("changes", "suggested"),
    [
        ({"window_ps": 0.4003}, "window_ps=0.4003 ps .* of 0.5 fs: .*instance 0.4005 ps"),
        ({"record_every_fs": 25.2}, "record_every_fs=25.2 fs .* of 0.5 fs: .*instance 25 fs"),
        ({"check_every_fs": 0.7}, "check_every_fs=0.7 fs .* of 0.5 fs: .*instance 0.5 fs"),
        ({"integrator": Langevin(300.0, 0.3)}, "window_ps=0.4 ps .* of 0.3 fs: .*instance 0.3999 ps"),
    ],
)
def test_durations_are_multiples_of_the_timestep(changes, suggested):
    with pytest.raises(ValueError, match=rf"^{suggested}\.$"):
        StABlEConfig(**changes)


def test_steps_are_durations_over_the_timestep():
    settings = StABlEConfig(window_ps=0.3, record_every_fs=10.0, integrator=Langevin(300.0, 0.25))
    assert (settings.window_steps, settings.record_steps) == (1200, 40)


def test_config_needs_two_frames_per_window():
    shorter = {"window_ps": 0.05, "record_every_fs": 50.0}
    assert StABlEConfig(n_replicas=2, **shorter).n_replicas == 2
    with pytest.raises(ValueError, match=r"^record_every_fs=50 .*window_ps=0\.05: lower it, or use more replicas"):
        StABlEConfig(n_replicas=1, **shorter)


def test_repr_shows_what_is_not_default():
    assert repr(StABlEConfig()) == "StABlEConfig()"
    assert repr(StABlEConfig(n_replicas=32, integrator=Langevin(), schedule=Schedule())) == "StABlEConfig()"
    shown = repr(
        StABlECallback(n_replicas=64, detector=BondDeviation(0.3), objective="both", execution=Execution(threads=2))
    )
    assert shown == (
        "StABlECallback(detector=BondDeviation(threshold=0.3, discard=3.0), n_replicas=64, objective='both', "
        "execution=Execution(capture='auto', compile='auto', threads=2))"
    )


def test_repr_hides_long_lists():
    observables = [BondLengths(), BondAmplitudes(), BondLengths()]
    shown = repr(StABlEConfig(structures=waters(50), bonds=((0, 1),) * 30, observables=observables, objective="both"))
    assert shown == (
        "StABlEConfig(structures=<50 items>, bonds=<30 items>, "
        "observables=[BondLengths(), BondAmplitudes(), BondLengths()], objective='both')"
    )


@pytest.mark.parametrize("name", ["structures", "reference"])
def test_files_are_read_on_construction(name, tmp_path):
    path = tmp_path / "water.extxyz"
    ase.io.write(path, waters(4))
    settings = StABlEConfig(**{name: str(path)})
    path.unlink()
    assert len(getattr(StABlECallback(config=settings).config, name)) == 4
    with pytest.raises(FileNotFoundError, match=rf"^{name}='.*water\.extxyz' is not a file: pass the path"):
        StABlEConfig(**{name: path})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("observables", BondLengths()),
        ("local", None),
        ("even_sampling", (10, 2)),
        ("loss", lambda mean, target: (mean - target).abs().sum()),
    ],
)
def test_objective_margin_refuses_what_it_does_not_use(name, value):
    with pytest.raises(ValueError, match=rf"^{name}=.* is not used by objective='margin', .*: set objective='both' or"):
        StABlEConfig(**{name: value})


def test_objective_margin_has_no_loss_of_observables():
    schedule = Schedule(max_observable_loss=0.5)
    with pytest.raises(
        ValueError, match=r"^max_observable_loss=0.5 is not used by objective='margin'.*: set objective="
    ):
        StABlEConfig(schedule=schedule)
    assert StABlEConfig(objective="both", schedule=schedule).schedule is schedule


def test_replace_changes_one_field():
    settings = StABlEConfig(objective="both", structures=waters(), local=Molecules())
    changed = replace(settings, n_replicas=5)
    assert (settings.n_replicas, changed.n_replicas) == (32, 5)
    assert replace(changed, n_replicas=32) == settings
    with pytest.raises(ValueError, match=r"^n_replicas=0 is out of range"):
        replace(settings, n_replicas=0)


@dataclass(kw_only=True, repr=False)
class WiderConfig(StABlEConfig):
    """A configuration with one more field."""

    max_force: Annotated[float, Number(above=0)] = 50.0
    """Largest force in eV/Å."""


class ToyCallback:
    """Takes the fields of the wider configuration."""

    @takes(WiderConfig)
    def __init__(self, settings):
        """Keep the settings."""
        self.settings = settings


def test_a_new_field_needs_one_place():
    parameters = inspect.signature(ToyCallback).parameters
    assert set(parameters) == {*NAMES, "max_force"}
    assert parameters["max_force"].default == 50.0
    assert typing.get_type_hints(ToyCallback.__init__)["max_force"] is float
    toy = ToyCallback(max_force=10.0, n_replicas=4)
    assert repr(toy.settings) == "WiderConfig(n_replicas=4, max_force=10.0)"
    with pytest.raises(ValueError, match=r"^max_force=-1\.0 is out of range: pass a finite number > 0\.$"):
        ToyCallback(max_force=-1.0)


def test_takes_keeps_name_and_docstring():
    assert StABlEMixin.configure_stable.__name__ == "configure_stable"
    assert StABlEMixin.configure_stable.__doc__.startswith("Configure StABlE training.")
    assert ToyCallback.__init__.__doc__ == "Keep the settings."
    with pytest.raises(TypeError, match=r"ToyCallback has no argument n_replica=4: did you mean n_replicas"):
        ToyCallback(n_replica=4)


def test_to_config_returns_the_plain_class():
    arguments = StABlEArguments(n_replicas=4)
    assert type(arguments.to_config()) is StABlEConfig
    assert repr(arguments.to_config()) == "StABlEConfig(n_replicas=4)"


def test_callback_names_unknown_arguments():
    with pytest.raises(TypeError, match=r"StABlECallback has no argument n_replica=3: did you mean n_replicas\?"):
        StABlECallback(n_replica=3)


@pytest.mark.parametrize("convert", [{}, {"_convert_": "partial"}, {"_convert_": "all"}])
def test_systems_of_plain_hydra(convert, tmp_path):
    path = tmp_path / "water.extxyz"
    ase.io.write(path, waters())
    hot = {"_target_": "stable_plugin.Langevin", "temperature_K": 500.0}
    lengths = {"_target_": "stable_plugin.BondLengths"}
    systems = [{"name": "cold", "structures": [str(path)]}, {"structures": str(path), "integrator": hot}]
    systems[1].update(observables=[lengths, lengths], even_sampling=[10, 2], weight=2)
    made = instantiate(
        OmegaConf.create(
            {
                "_target_": "stable_plugin.StABlEConfig",
                "systems": systems,
                "objective": "both",
                "n_replicas": 4,
                **convert,
            }
        )
    )
    cold, warm = made.systems
    assert all(isinstance(each, SystemConfig) for each in made.systems)
    assert (cold.name, len(cold.structures), cold.integrator.temperature_K) == ("cold", 3, 300.0)
    assert (len(warm.observables), warm.weight, warm.integrator.temperature_K) == (2, 2, 500.0)
    assert made.for_system(warm).even_sampling == [10, 2]
    systems[1]["temperature_K"] = 400.0
    with pytest.raises(
        InstantiationException, match=r"systems\[1\]\.temperature_K=400\.0 is not a setting of a system"
    ):
        instantiate(OmegaConf.create({"_target_": "stable_plugin.StABlEConfig", "systems": systems, **convert}))


def test_systems_name_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"systems\[1\]\.structures='.*nothing\.extxyz' is not a file"):
        StABlEConfig(systems=[{"structures": waters()}, {"structures": str(tmp_path / "nothing.extxyz")}])


def test_learning_windows_of_observables_are_not_hotter():
    assert StABlEConfig().heating == 1.5
    assert StABlEConfig(learning_temperature_ratio=1.0).heating == 1.0
    assert StABlEConfig(objective="both").heating == 1.0
    with pytest.raises(ValueError, match=r"learning_temperature_ratio=1.2 with objective='both': means of observables"):
        StABlEConfig(objective="both", learning_temperature_ratio=1.2)
