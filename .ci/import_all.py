"""Import every module of the package, from where it was installed: ``python import_all.py FOLDER``."""

import importlib
import pkgutil
import sys
from pathlib import Path

import stable_plugin

here = Path(stable_plugin.__file__)
assert here.is_relative_to(Path(sys.argv[1]).resolve()), f"stable_plugin was imported from {here}, not {sys.argv[1]}"
assert (here.parent / "py.typed").is_file(), "py.typed is missing"
modules = [each.name for each in pkgutil.walk_packages(stable_plugin.__path__, "stable_plugin.")]
for name in modules:
    importlib.import_module(name)
print(f"{len(modules)} modules of the wheel imported")
