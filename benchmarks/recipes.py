"""The shipped recipes, which benchmarks take their models from."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

ROOT = Path(__file__).parents[1]


def shipped(name: str) -> DictConfig:
    """Return a shipped recipe, with its interpolations."""
    recipe = OmegaConf.load(ROOT / "recipes" / f"{name}.yaml")
    assert isinstance(recipe, DictConfig)
    return recipe
