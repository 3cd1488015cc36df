"""The parts of a recipe: all of them checked before the first is made.

Hydra makes the innermost parts first, whatever they name. A runner with ``_recursive_: false`` gets its parts as they are
written instead, and makes them here.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import hydra
from hydra.errors import InstantiationException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stable_plugin.integrations.recipes.hints import (
    choices,
    entry_hint,
    fits,
    hints_of,
    is_callable,
    makes,
    named,
    parameters_of,
    way_out,
)
from stable_plugin.integrations.recipes.targets import allowed, shown

HYDRAS_OWN = ("_target_", "_partial_", "_recursive_", "_convert_", "_args_")
"""Keys of a part that are no arguments of what it names."""


def made(runner: Callable[..., Any], parts: Mapping[str, Any], at: str = "runner") -> dict[str, Any]:
    """The arguments of a runner, with its parts made of what a recipe says of them.

    Args:
        runner: Whose arguments they are.
        parts: By name; objects that are there already are taken as they are.
        at: Path of the runner in the recipe, for errors.

    Raises:
        ValueError: If a part names what it must not or what is not there, or an argument does not exist, is missing, or of
            another kind. The error says where in the recipe.
    """
    written = {name: part for name, part in parts.items() if OmegaConf.is_config(part)}
    try:
        config = OmegaConf.create({at: written})
        plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"the recipe cannot be read: {error}") from error
    hints = hints_of(runner)
    for name, part in parts.items():
        if name in written or isinstance(part, bool | int | float | str | None):
            _check(plain[at].get(name, part), f"{at}.{name}", hints.get(name, Any))
    return {**parts, **{name: _make(config[at][name]) for name in written}}


def _make(part: Any) -> Any:
    try:
        return hydra.utils.instantiate(part, _convert_="all")
    except InstantiationException as error:
        _, _, key = str(error).rpartition("full_key: ")
        cause = error.__cause__
        if cause is None:
            raise ValueError(str(error)) from error
        raise ValueError(f"{key}: {_told(cause)}{_given(_at(part, key), str(cause))}") from cause


def _at(part: Any, key: str) -> Any:
    """The part in a part that hydra calls by that key."""
    if part._get_full_key(None) == key:
        return part
    entries = part.values() if isinstance(part, Mapping) else part
    found = (_at(entry, key) for entry in entries if OmegaConf.is_config(entry))
    return next((each for each in found if each is not None), None)


def _given(part: Any, told: str) -> str:
    """The arguments of a part, where an error of somebody else's names none with its value."""
    plain: Any = None if part is None else OmegaConf.to_container(part, resolve=True)
    arguments = {
        key: value for key, value in (plain.items() if isinstance(plain, Mapping) else ()) if key not in HYDRAS_OWN
    }
    if not arguments or any(f"{key}={value!r}" in told for key, value in arguments.items()) or "=" in told:
        return ""
    return f" It was given {', '.join(f'{key}={shown(value)}' for key, value in arguments.items())}."


def _told(error: BaseException) -> str:
    """An error of ours says enough; of others the kind helps."""
    return str(error) if type(error) in (ValueError, FileNotFoundError) else f"{type(error).__name__}: {error}"


def _check(value: Any, path: str, hint: Any) -> None:
    if isinstance(value, Mapping) and "_target_" in value:
        _check_part(value, path, hint)
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{path}={value!r} is not a finite number: give one, or leave it out.")
    if not fits(value, hint):
        raise ValueError(f"{path}={shown(value)} is no {named(hint)}: {way_out(value, hint)}")
    if isinstance(value, Mapping):
        for key, entry in value.items():
            _check(entry, f"{path}.{key}", entry_hint(hint, 1))
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            _check(entry, f"{path}[{index}]", entry_hint(hint, 0))


def _check_part(part: Mapping[str, Any], path: str, hint: Any) -> None:
    target = allowed(part["_target_"], f"{path}._target_")
    partial = part.get("_partial_", False)
    for key, default in (("_partial_", False), ("_recursive_", True)):
        if not isinstance(part.get(key, default), bool):
            raise ValueError(f"{path}.{key}={shown(part[key])} is no bool: give true or false.")
    if not makes(target, partial, hint):
        what = ", or set _partial_: true" if not partial and any(map(is_callable, choices(hint))) else ""
        raise ValueError(f"{path}._target_={part['_target_']!r} makes no {named(hint)}: name one that does{what}.")
    arguments = {key: value for key, value in part.items() if key not in HYDRAS_OWN}
    parameters, open_ended = parameters_of(target)
    for key, value in arguments.items():
        if parameters is not None and key not in parameters and not open_ended:
            close = difflib.get_close_matches(str(key), parameters, n=1)
            hint_at = f"did you mean {close[0]}?" if close else f"it takes {', '.join(parameters) or 'none'}."
            raise ValueError(f"{path}.{key}={shown(value)} is no argument of {part['_target_']}: {hint_at}")
    if parameters is not None and not partial and "_args_" not in part:
        missing = [
            name for name, each in parameters.items() if each.default is inspect.Parameter.empty and name not in part
        ]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}, which {part['_target_']} needs: give a value.")
    hints = hints_of(target)
    for key, value in arguments.items():
        _check(value, f"{path}.{key}", hints.get(key, Any))
