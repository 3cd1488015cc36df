"""Recipes: YAML files that describe a run, and the pipelines that run them.

Nothing here needs fairchem: the ``stable-plugin`` command runs recipes with these modules alone, and
:mod:`stable_plugin.integrations.fairchem.runner` makes the same pipelines available to ``fairchem -c``.
"""
