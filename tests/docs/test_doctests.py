"""The examples in the docstrings, and the Python of the documentation pages."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import stable_plugin

DOCS = Path(__file__).parents[2] / "docs"
MODULES = [module.name for module in pkgutil.walk_packages(stable_plugin.__path__, "stable_plugin.")]


def imported(name):
    """Return a module, or None if it is for a family of models that is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if "stable-plugin[" not in str(error):
            raise
        return None


def test_docstring_examples_hold():
    results = [doctest.testmod(module) for module in map(imported, MODULES) if module is not None]
    assert sum(result.failed for result in results) == 0
    assert sum(result.attempted for result in results) >= 10


# The page on fairchem trains a model, so it is run with smaller settings, with the README. The pages of examples and API are
# generated, and examples run as scripts.
OPTIONAL = ("nequip", "schnetpack", "sevenn")
"""Packages that an environment may lack."""

GENERATED = ("examples", "api", "_build")
PAGES = sorted(
    page
    for page in DOCS.rglob("*.md")
    if "```python" in page.read_text() and page.stem != "fairchem" and page.relative_to(DOCS).parts[0] not in GENERATED
)


def test_pages_with_python_exist():
    assert len(PAGES) >= 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_python_runs(page, tmp_path, monkeypatch):
    (tmp_path / "recipes").symlink_to(DOCS.parent / "recipes")
    monkeypatch.chdir(tmp_path)
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        for package in OPTIONAL:
            if f"from {package}" in code:
                pytest.importorskip(package)
        exec(compile(code, page.name, "exec"), {})
