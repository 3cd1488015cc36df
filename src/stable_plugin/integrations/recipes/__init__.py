"""Recipes: YAML files that describe a run."""
