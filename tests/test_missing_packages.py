"""Imports without Lightning or a family of models, and errors that name what to install."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import importlib, json, pkgutil, sys, warnings

warnings.simplefilter("ignore")
missing = set(sys.argv[1].split(","))


class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Missing())
import stable_plugin

found = {}
for module in pkgutil.walk_packages(stable_plugin.__path__, "stable_plugin.", onerror=lambda name: None):
    try:
        importlib.import_module(module.name)
        found[module.name] = None
    except ImportError as error:
        found[module.name] = str(error)
print(json.dumps(found))
"""
FAMILIES = {
    "mace": "mace",
    "fairchem": "fairchem,torchtnt",
    "sevennet": "sevenn",
    "nequip": "nequip",
    "schnet": "schnetpack",
}
TRAINERS = "pytorch_lightning,lightning,lightning_fabric"
RECIPES_AND_REPORTS = "hydra,omegaconf,pydantic,jinja2"
"""Dependencies of the package that the core does not import."""

ADAPTERS = (
    "integrations.lightning",
    "integrations.fairchem",
    "integrations.recipes",
    "evaluation",
    "models.fine_tuning",
    "models.lightning_module",
    "models.training_threads",
    *(f"models.{family}.{file}" for family in FAMILIES for file in ("potential", "files", "lightning_module")),
)


def imported(missing):
    """Return every module of the package, with the error of its import or None, while some packages are missing."""
    command = [sys.executable, "-c", SCRIPT, missing]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_core_needs_neither_trainer_nor_family():
    found = imported(",".join([TRAINERS, RECIPES_AND_REPORTS, "e3nn", *FAMILIES.values()]))
    core = {
        name: error
        for name, error in found.items()
        if not any(f"{name}.".startswith(f"stable_plugin.{adapter}.") for adapter in ADAPTERS)
    }
    assert {
        "stable_plugin.algorithm.training_loop",
        "stable_plugin.algorithm.estimator",
        "stable_plugin.integrations.session",
    } <= set(core)
    assert {name: error for name, error in core.items() if error} == {}
    assert found["stable_plugin.integrations.lightning"] is not None, "the packages are hidden"


@pytest.mark.parametrize(("family", "packages"), FAMILIES.items())
def test_missing_family_names_the_extra(family, packages):
    found = {name: error for name, error in imported(packages).items() if error}
    # Another family may not be installed either, and has its own error.
    others = tuple(f"stable_plugin.models.{other}." for other in FAMILIES if other != family)
    errors = {name: error for name, error in found.items() if not name.startswith(others)}
    expected = {f"stable_plugin.models.{family}.potential", f"stable_plugin.models.{family}.files"}
    if family in ("mace", "fairchem"):
        expected.add(f"stable_plugin.models.{family}.lightning_module")
    if family == "fairchem":
        expected.add("stable_plugin.integrations.fairchem")
    assert expected <= set(errors)
    assert {name: error for name, error in errors.items() if f"'stable-plugin[{family}]'" not in error} == {}
    assert all(family in name for name in errors), "no other module needs this family"
