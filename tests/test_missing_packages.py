"""Imports without Lightning or without a family of models, and their messages."""

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
FAMILIES = {"mace": "mace", "fairchem": "fairchem,torchtnt"}
TRAINERS = "pytorch_lightning,lightning,lightning_fabric"
ADAPTERS = (
    "integrations.lightning",
    "integrations.fairchem",
    "models.lightning_module",
    "models.mace",
    "models.fairchem",
)
"""Modules that need a trainer or a family."""


def import_errors(missing):
    """Return the import error of each module of the package, or None, in a process without the missing packages."""
    command = [sys.executable, "-c", SCRIPT, missing]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_core_imports_without_trainers_and_families():
    found = import_errors(",".join([TRAINERS, "e3nn", *FAMILIES.values()]))
    core = {
        name: error
        for name, error in found.items()
        if not any(f"{name}.".startswith(f"stable_plugin.{adapter}.") for adapter in ADAPTERS)
    }
    assert {
        "stable_plugin.algorithm.training_loop",
        "stable_plugin.algorithm.estimator",
        "stable_plugin.detectors.condensed",
        "stable_plugin.evaluation.evaluate",
        "stable_plugin.integrations.session",
        "stable_plugin.md.simulator",
    } <= set(core)
    assert {name: error for name, error in core.items() if error} == {}
    assert found["stable_plugin.integrations.lightning"] is not None, "the packages are indeed missing"


@pytest.mark.parametrize(("family", "packages"), FAMILIES.items())
def test_family_import_names_the_extra(family, packages):
    errors = {name: error for name, error in import_errors(packages).items() if error}
    expected = {f"stable_plugin.models.{family}"}
    if family == "fairchem":
        expected |= {"stable_plugin.integrations.fairchem"}
    assert expected <= set(errors)
    assert {name: error for name, error in errors.items() if f"'stable-plugin[{family}]'" not in error} == {}
    assert all(family in name for name in errors), "no other module needs this family"
