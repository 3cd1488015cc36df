"""Sphinx configuration."""

from importlib.metadata import version as installed_version

project = "stable_plugin"
author = "the stable_plugin authors"
copyright = "2026, the stable_plugin authors"
release = version = installed_version("stable-plugin")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "quality"]  # quality.md includes what is in the folder
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

napoleon_google_docstring = True
napoleon_numpy_docstring = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
# Docstrings inherited from Lightning and torchmetrics are not ours to keep free of warnings.
autodoc_inherit_docstrings = False

html_theme = "furo"
html_title = "stable_plugin"
