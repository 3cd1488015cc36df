"""Loading of a recipe with its overrides, as ``fairchem -c`` does it."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from stable_plugin.integrations.recipes.targets import shown
from stable_plugin.runtime import checks

CONFIG_FILE = "canonical_config.yaml"
"""The resolved recipe in a run folder, under the name that fairchem writes."""

SECTIONS = ("job", "runner")
"""Top-level keys that are not variables."""


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return a recipe as plain data, with overrides applied and interpolations resolved.

    Args:
        source: Path of a YAML file, or of a run folder, whose resolved recipe is loaded.
        overrides: Hydra overrides, such as ``runner.control=true`` or ``+runner.stable.chunk=8``.

    Returns:
        The sections ``job`` and ``runner``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a recipe, an override does not fit, or a top-level key is not used.
    """
    path = Path(source)
    path = path / CONFIG_FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"recipe={str(source)!r} is not a file: pass the path of a recipe. `stable-plugin recipes` lists those that can "
            "be copied."
        )
    try:
        config = _compose(path.resolve(), list(overrides))
        _validate_keys(config)
        recipe: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ValueError(f"recipe {str(path)!r} cannot be loaded: {_explained(error, path)}") from error
    return {"job": recipe.get("job", {}), "runner": recipe["runner"]}


def _compose(path: Path, overrides: list[str]) -> Any:
    with ExitStack() as stack:
        if path.suffix != ".yaml":  # the only suffix that hydra reads
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            path = Path(shutil.copy(path, os.path.join(folder, f"{path.stem}.yaml")))
        GlobalHydra.instance().clear()
        stack.enter_context(hydra.initialize_config_dir(str(path.parent), version_base="1.3"))
        return hydra.compose(config_name=path.name, overrides=overrides)


def _validate_keys(config: Any) -> None:
    """Refuse sections that are not mappings, and variables that nothing refers to, which are typing errors."""
    written: Any = OmegaConf.to_container(config)
    for section in SECTIONS:
        content = {"job": {}, **written}.get(section)
        if not isinstance(content, dict):
            raise ValueError(f"{section}={shown(content)} is not a section of a recipe: pass a mapping.")
    for key, value in written.items():
        if key not in SECTIONS and not _is_used(config, key):
            raise ValueError(
                f"{key}={shown(value)} is not used in the recipe: remove it, or refer to it as ${{{key}}}. Sections are "
                f"{' and '.join(SECTIONS)}."
            )


def _is_used(config: Any, key: Any) -> bool:
    rest = OmegaConf.masked_copy(config, [each for each in config if each != key])
    try:
        OmegaConf.resolve(rest)
    except InterpolationKeyError:
        return True
    return False


def _explained(error: Exception, path: Path) -> str:
    text = str(error).strip()
    if missing := re.search(r"Missing mandatory value: ([\w.]+)", text):
        return f"{missing[1]}=??? has no value: pass {missing[1]}=VALUE."
    if unknown := re.search(r"Could not override '([\w.]+)'\.\s*To append to your config use (\S+)", text):
        return _unknown_key(unknown[1], unknown[2], path)
    return text


def _unknown_key(key: str, addition: str, path: Path) -> str:
    """Return what to write instead of an override of a key that the recipe does not have."""
    section, _, name = key.rpartition(".")
    recipe = OmegaConf.load(path)
    siblings = OmegaConf.select(recipe, section) if section else recipe
    close = checks.closest(name, map(str, siblings)) if OmegaConf.is_dict(siblings) else None
    meant = f"did you mean {f'{section}.' if section else ''}{close}? To" if close else "to"
    return f"{key} is not in the recipe: {meant} add a key, use {addition}"
