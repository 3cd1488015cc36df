"""Validation of the values in a recipe against the signatures of what it names."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from stable_plugin import BondDeviation, BondLengths, Observable, Schedule
from stable_plugin.integrations.recipes.instantiate import instantiate_arguments
from stable_plugin.integrations.recipes.load import load_recipe
from stable_plugin.integrations.recipes.validation import validate_arguments

LENGTHS = {"_target_": "stable_plugin.BondLengths"}
PRESSURE = {"_target_": "stable_plugin.Pressure", "target_Gpa": 1.0}
STRESS = {"_target_": "stable_plugin.Stress", "target_GPa": 1.0}
SCHEDULE = {"_target_": "stable_plugin.Schedule"}
SGD = {"_target_": "torch.optim.SGD"}


def takes(
    count: int = 0,
    rate: float | None = None,
    flag: bool = False,
    choice: Literal["auto"] | float = "auto",
    text: str = "",
    path: Path = Path(),
    pair: tuple[str, str] = ("O", "H"),
    bonds: Sequence[tuple[int, int]] | None = None,
    sizes: Sequence[float] = (),
    table: Mapping[str, int] | None = None,
    schedule: Schedule | None = None,
    observables: Observable | Sequence[Observable] | None = None,
    optimizer: Callable[..., Any] | None = None,
    anything: Any = None,
) -> None: ...


def validated(**arguments):
    validate_arguments(takes, arguments, "at", "some.takes")


@pytest.mark.parametrize(
    "arguments",
    [
        {"count": 10**30},
        {"rate": 1},
        {"rate": None},
        {"choice": "auto"},
        {"choice": 0.5},
        {"path": "a.xyz"},
        {"pair": ["O", "O"]},
        {"bonds": [[0, 1], [1, 2]]},
        {"sizes": [1, 2.5]},
        {"table": {"a": 1}},
        {"schedule": SCHEDULE},
        {"observables": LENGTHS},
        {"observables": [LENGTHS]},
        {"optimizer": {**SGD, "_partial_": True}},
        {"anything": [{"a": SCHEDULE}]},
        # The result of a function is not known before it is called.
        {"schedule": {"_target_": "torch.manual_seed", "seed": 1}},
        {"observables": [{"_target_": "torch.manual_seed", "seed": 1}]},
    ],
)
def test_validate_accepts_what_hints_allow(arguments):
    validated(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": "abc"}, r"at\.count='abc' is not a valid integer: pass one"),
        ({"count": 1.0}, r"at\.count=1\.0 is not a valid integer"),
        ({"count": True}, r"at\.count=True is not a valid integer"),
        ({"rate": "1.0"}, r"at\.rate='1\.0' is not a valid number"),
        ({"rate": float("nan")}, r"at\.rate=nan is not a finite number: pass one, or leave it out"),
        ({"sizes": [1.0, float("inf")]}, r"at\.sizes\[1\]=inf is not a finite number"),
        ({"flag": 1}, r"at\.flag=1 is not a valid boolean"),
        ({"choice": "some"}, r"at\.choice='some' is not 'auto' or a valid number"),
        ({"text": None}, r"at\.text=None is not a valid string"),
        ({"path": 3}, r"at\.path=3 is not a valid string or an instance of Path"),
        ({"pair": ["O", "H", "O"]}, r"at\.pair=\['O', 'H', 'O'\] is not valid .*at most 2 items"),
        ({"bonds": [[0, 1], [1, "2"]]}, r"at\.bonds\[1\]\[1\]='2' is not a valid integer"),
        ({"sizes": "abc"}, r"at\.sizes='abc' is not a valid list"),
        ({"table": {"a": "b"}}, r"at\.table\.a='b' is not a valid integer"),
        ({"schedule": {"max_windows": 3}}, r"at\.schedule=.* is not an instance of Schedule: pass one, by its _target_"),
        ({"schedule": LENGTHS}, r"at\.schedule=.*BondLengths.* is not an instance of Schedule: set _target_ to"),
        ({"observables": [LENGTHS, SCHEDULE]}, r"at\.observables\[1\]=.*Schedule.* is not an instance of Observable"),
        ({"optimizer": SGD}, r"at\.optimizer=.* is not callable: .* or set _partial_: true"),
        ({"anything": {**SGD, "_partial_": "yes"}}, r"at\.anything\._partial_='yes' is not a valid boolean: pass true"),
        ({"observables": [PRESSURE]}, r"at\.observables\[0\]\.target_GPa is missing.* did you mean it by target_Gpa\?"),
        ({"observables": [STRESS]}, r"at\.observables\[0\]\.target_GPa=1\.0 is not a valid list: pass one"),
        ({"anything": SGD}, r"at\.anything\.params is missing, and torch\.optim\.SGD requires it: pass a value"),
        ({"anything": [{**SCHEDULE, "max_window": 1}]}, r"at\.anything\[0\]\.max_window=1 is not an argument of .*mean max_windows"),
        ({"anything": {**SCHEDULE, "max_failures_per_ns": "1"}}, r"at\.anything\.max_failures_per_ns='1' is not a valid number"),
        ({"xyz": 1}, r"at\.xyz=1 is not an argument of some\.takes: pass count, rate,"),
    ],
)  # fmt: skip
def test_validate_names_path_value_and_remedy(arguments, message):
    with pytest.raises(ValueError, match=message):
        validated(**arguments)


def test_instantiate_makes_parts_in_signature_order():
    made = []

    def runner(first, second, third=None): ...

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("toys.tiny_mace", lambda **arguments: made.append(arguments["name"]))
        part = {"_target_": "toys.tiny_mace"}
        instantiate_arguments(runner, {"second": {**part, "name": 2}, "third": [{**part, "name": 3}], "first": 1})
    assert made == [2, 3]


def test_instantiate_returns_objects():
    threshold = {"_target_": "stable_plugin.BondDeviation", "threshold": 0.3}
    result = instantiate_arguments(takes, {"observables": [LENGTHS], "anything": {"a": threshold}, "text": "b"})
    assert isinstance(result["observables"][0], BondLengths)
    assert isinstance(result["anything"]["a"], BondDeviation) and result["anything"]["a"].threshold == 0.3
    assert result["text"] == "b"


RECIPE = """
frames: data
sizes: {quick: {n: 2}}
size: quick
job: {device_type: CPU, run_dir: runs}
runner:
  _target_: stable_plugin.StABlERunner
  n: ${sizes.${size}.n}
  train: ${frames}/a.xyz
"""


@pytest.mark.parametrize("suffix", ["yaml", "yml"])
def test_load_recipe_applies_overrides(tmp_path, suffix):
    path = tmp_path / f"recipe.{suffix}"
    path.write_text(RECIPE)
    recipe = load_recipe(path, ["sizes.quick.n=3", "+runner.more=[1,2]", "frames=other", "~job.run_dir"])
    assert recipe == {
        "job": {"device_type": "CPU"},
        "runner": {"_target_": "stable_plugin.StABlERunner", "n": 3, "train": "other/a.xyz", "more": [1, 2]},
    }


def test_load_recipe_agrees_with_fairchem():
    cli = pytest.importorskip("fairchem.core._cli")
    from omegaconf import OmegaConf
    from recipe_tools import ROOT

    for name in ("aspirin_mace", "peptide_esen", "water_mace"):
        path, overrides = (
            ROOT / "recipes" / f"{name}.yaml",
            ["runner.control=true", "seed=7", "+runner.stable.start_epoch=1"],
        )
        config = cli.get_hydra_config_from_yaml(str(path), overrides)
        recipe = load_recipe(path, overrides)
        assert recipe["runner"] == OmegaConf.to_container(config.runner)
        assert recipe["job"]["seed"] == config.job.seed == 7


@pytest.mark.parametrize(
    ("change", "overrides", "message"),
    [
        (
            ("frames: data", "frames: data\nextra: 5"),
            [],
            r"extra=5 is not used in the recipe: remove it, or refer to it",
        ),
        (("frames: data", "frames: ???"), [], r"frames=\?\?\? has no value: pass frames=VALUE"),
        (("${frames}", "${frame}"), [], r"Interpolation key 'frame' not found"),
        (("runner:", "runner: ["), [], r"recipe .*recipe\.yaml' cannot be loaded"),
        (("", ""), ["runner.m=3"], r"runner\.m is not in the recipe: to add a key, use \+runner\.m=3"),
        (("", ""), ["runner.trainn=x"], r"did you mean runner\.train\? To add a key, use \+runner\.trainn=x"),
        (("", ""), ["frame=x"], r"frame is not in the recipe: did you mean frames\? To add a key, use \+frame=x"),
        (("", ""), ["runner=3"], r"runner=3 is not a section of a recipe: pass a mapping"),
    ],
)
def test_load_recipe_names_a_mistake(tmp_path, change, overrides, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace(*change))
    with pytest.raises(ValueError, match=message):
        load_recipe(path, overrides)
