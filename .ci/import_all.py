"""Import every module of the package, from where it was installed: ``python -I import_all.py FOLDER``."""

import importlib
import pkgutil
import sys
from importlib.metadata import distribution
from pathlib import Path

import stable_plugin

folder = Path(sys.argv[1]).resolve()
here = Path(stable_plugin.__file__)
assert here.is_relative_to(folder), f"stable_plugin was imported from {here}, not {folder}"
assert (here.parent / "py.typed").is_file(), "py.typed is missing"
assert {each.name for each in here.parent.glob("recipes/*")} >= {"aspirin_mace.yaml", "data"}, "recipes are missing"
installed = distribution("stable-plugin")
assert Path(str(installed.locate_file(""))).resolve().is_relative_to(folder), (
    "the metadata are those of another install"
)
assert installed.metadata["License"] or installed.metadata["License-Expression"], "the wheel has no licence"
modules = [each.name for each in pkgutil.walk_packages(stable_plugin.__path__, "stable_plugin.")]
missing = []
for name in modules:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        # The folder of a family that is not installed here says which extra it needs.
        assert "stable-plugin[" in str(error), f"{name}: {error}"
        missing.append(name)
        continue
    assert Path(str(module.__file__)).is_relative_to(folder), f"{name} was imported from {module.__file__}"
assert all(hasattr(stable_plugin, name) for name in stable_plugin.__all__)
print(
    f"{len(modules) - len(missing)} modules of the wheel imported, {len(missing)} need a family that is not installed"
)
