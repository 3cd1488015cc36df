"""Sphinx configuration. Writes the pages of examples and API before the build, from files and docstrings."""

import importlib
import inspect
import pkgutil
import re
from importlib.metadata import version as installed_version
from pathlib import Path

import jupytext

import stable_plugin

DOCS = Path(__file__).parent

project = "stable_plugin"
author = "the stable_plugin authors"
copyright = "2026, the stable_plugin authors"
release = version = installed_version("stable-plugin")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "quality"]  # dev/quality.md includes what is in the folder
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes described in a class and defined in its body are one entry
autosummary_generate = True
autosummary_imported_members = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
# Docstrings inherited from Lightning and torchmetrics are not ours to keep free of warnings.
autodoc_inherit_docstrings = False

html_theme = "furo"
html_title = "stable_plugin"

# Titles of the API pages, in their order. Packages that are not named here follow by name.
API_TITLES = {
    "stable_plugin.integrations.lightning": "Training in Lightning",
    "stable_plugin.integrations.fairchem": "Training in fairchem",
    "stable_plugin.integrations.recipes": "Recipes",
    "stable_plugin.config": "Settings",
    "stable_plugin.algorithm": "Algorithm",
    "stable_plugin.md": "Simulation",
    "stable_plugin.detectors": "Detectors",
    "stable_plugin.observables": "Observables",
    "stable_plugin.models": "Potentials",
    "stable_plugin.models.mace": "MACE models",
    "stable_plugin.models.fairchem": "fairchem models",
    "stable_plugin.evaluation": "Evaluation",
    "stable_plugin.testing": "Tests to inherit",
}
WITH_PUBLIC_MODULES = ("stable_plugin.algorithm", "stable_plugin.config", "stable_plugin.testing")
"""Where these have no ``__all__``, everything that they and their modules define without a leading underscore is public."""


def write_examples():
    """Convert examples/*.py to a page and a notebook each."""
    folder = DOCS / "examples"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for script in sorted((DOCS.parent / "examples").glob("*.py")):
        notebook = jupytext.read(script)
        jupytext.write(notebook, folder / f"{script.stem}.ipynb")
        # Without the header of jupytext, which MyST would read as its own.
        page = re.sub(r"\A---\n.*?\n---\n", "", jupytext.writes(notebook, fmt="md"), flags=re.DOTALL)
        links = f"{{download}}`Notebook <{script.stem}.ipynb>`, {{download}}`script <../../examples/{script.name}>`\n"
        title, _, rest = page.strip().partition("\n")
        (folder / f"{script.stem}.md").write_text(f"{title}\n\n{links}\n{rest}\n", encoding="utf-8")


def public_names(package):
    """Return the full names of what a package offers, each by the shortest path that it can be imported from."""
    found = []
    modules = [package]
    if package.__name__ in WITH_PUBLIC_MODULES and hasattr(package, "__path__") and not hasattr(package, "__all__"):
        modules += [importlib.import_module(f"{package.__name__}.{entry.name}") for entry in submodules(package)]
    for module in modules:
        names = getattr(module, "__all__", None)
        if names is None and package.__name__ in WITH_PUBLIC_MODULES:
            names = [
                name
                for name, value in vars(module).items()
                if (inspect.isclass(value) or inspect.isfunction(value))
                and value.__module__ == module.__name__
                and not name.startswith("_")
            ]
        found += [f"{module.__name__}.{name}" for name in names or ()]
    for name in stable_plugin.__all__:
        defined_in = getattr(getattr(stable_plugin, name), "__module__", "")
        if f"{defined_in}.".startswith(f"{package.__name__}.") and package is not stable_plugin:
            found.append(f"stable_plugin.{name}")
    return list(dict.fromkeys(shortest(path) for path in found if is_installed(path) and is_documented(path)))


def submodules(package):
    """Return the entries of a package that are not private."""
    return [entry for entry in pkgutil.iter_modules(package.__path__) if not entry.name.startswith("_")]


def value_of(path):
    """Return the object behind a dotted path of a module and a name."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def is_installed(path):
    """Return whether an object can be imported: those of families that are not installed cannot."""
    try:
        value_of(path)
    except ImportError as error:
        if "stable-plugin[" not in str(error):
            raise
        return False
    return True


def is_documented(path):
    """Return whether an object gets a page: classes and functions do."""
    return inspect.isclass(value_of(path)) or inspect.isfunction(value_of(path))


def shortest(path):
    """Return the path in the top package for what it exports, and the path itself otherwise."""
    name = path.rpartition(".")[2]
    exported = name in stable_plugin.__all__ and getattr(stable_plugin, name) is value_of(path)
    return f"stable_plugin.{name}" if exported else path


def api_packages():
    """Return the modules that offer something, in the order of their titles."""
    entries = pkgutil.walk_packages(stable_plugin.__path__, "stable_plugin.")
    packages = {entry.name for entry in entries if entry.ispkg} | API_TITLES.keys()
    order = [*API_TITLES, *sorted(packages - API_TITLES.keys())]
    for name in order:
        try:
            yield importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith("stable_plugin"):
                raise


def write_api():
    """Write docs/api: a page for each package, with a table of its classes and functions and a page for each of these."""
    folder = DOCS / "api"
    folder.mkdir(exist_ok=True)
    pages, seen = [], set()
    for package in api_packages():
        # Two packages may export the same object: the first one has its page.
        names = {id(value_of(name)): name for name in public_names(package)}
        names = [name for key, name in names.items() if key not in seen]
        seen.update(id(value_of(name)) for name in names)
        if not names:
            continue
        title = API_TITLES.get(package.__name__, package.__name__)
        summary = inspect.getdoc(package).partition("\n")[0]
        listed = "".join(f"   {name}\n" for name in names)
        page = package.__name__.removeprefix("stable_plugin.").replace(".", "_")
        (folder / f"{page}.rst").write_text(
            f"{title}\n{'=' * len(title)}\n\n``{package.__name__}``: {summary}\n\n"
            f".. autosummary::\n   :toctree: generated\n   :nosignatures:\n\n{listed}",
            encoding="utf-8",
        )
        pages.append(page)
    exported = [f"stable_plugin.{name}" for name in stable_plugin.__all__]
    missing = [path for path in exported if is_documented(path) and id(value_of(path)) not in seen]
    if missing:
        raise RuntimeError(f"no page in the API for {', '.join(sorted(missing))}: add their package to API_TITLES.")
    listed = "".join(f"   {page}\n" for page in pages)
    text = "Everything that can be imported from ``stable_plugin`` and its packages, from the docstrings."
    (folder / "index.rst").write_text(
        f"API\n===\n\n{text}\n\n.. toctree::\n   :maxdepth: 2\n\n{listed}", encoding="utf-8"
    )


def setup(app):
    """Write the pages before Sphinx looks for them."""
    app.connect("config-inited", lambda *_: (write_examples(), write_api()))
