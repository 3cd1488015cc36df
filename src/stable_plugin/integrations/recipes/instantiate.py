"""The parts of a recipe, all validated before the first is made.

Hydra makes the innermost parts first, whatever they name. A runner with ``_recursive_: false`` receives its parts as they are
written instead, and makes them here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from omegaconf import OmegaConf

from stable_plugin.integrations.recipes.targets import resolve_target, shown
from stable_plugin.integrations.recipes.validation import PART_KEYS, is_part, signature_names, validate_arguments


def instantiate_arguments(
    target: Callable[..., Any], arguments: Mapping[str, Any], path: str = "runner", name: str = ""
) -> dict[str, Any]:
    """Return the arguments of a class or function with objects in place of the parts.

    Args:
        target: The class or function.
        arguments: By name: plain data, parts, and objects, which stay as they are.
        path: Key path of the arguments in the recipe, for errors.
        name: Name of the target in errors; its own if empty.

    Raises:
        ValueError: If an argument is invalid, or a part cannot be made of its arguments. The error names the key path, the
            value and the remedy.
    """
    plain = {key: _plain(value) for key, value in arguments.items()}
    validate_arguments(target, plain, path, name or target.__name__)
    # In the order of the signature, whatever the order in the file: a part may draw random numbers.
    order = [key for key in signature_names(target) if key in plain]
    return {key: _make(plain[key], f"{path}.{key}") for key in [*order, *(key for key in plain if key not in order)]}


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True, throw_on_missing=True) if OmegaConf.is_config(value) else value


def _make(value: Any, path: str) -> Any:
    if isinstance(value, list):
        return [_make(entry, f"{path}[{index}]") for index, entry in enumerate(value)]
    if not isinstance(value, Mapping):
        return value
    entries = {key: _make(entry, f"{path}.{key}") for key, entry in value.items() if key not in PART_KEYS}
    if not is_part(value):
        return entries
    target = resolve_target(value["_target_"], f"{path}._target_")
    if value.get("_partial_"):
        return functools.partial(target, **entries)
    try:
        return target(**entries)
    except Exception as error:  # constructors of other packages can raise anything
        raise ValueError(f"{path}: {_reason(error)}{_shown_arguments(value, str(error))}") from error


def _reason(error: BaseException) -> str:
    """Return an error's message, with its type unless it is one whose message suffices."""
    return str(error) if type(error) in (ValueError, FileNotFoundError) else f"{type(error).__name__}: {error}"


def _shown_arguments(part: Mapping[str, Any], message: str) -> str:
    """Return the arguments of a part as a sentence, for an error of another package that does not name them."""
    arguments = {key: value for key, value in part.items() if key not in PART_KEYS}
    if not arguments or "=" in message:
        return ""
    return f" Its arguments are {', '.join(f'{key}={shown(value)}' for key, value in arguments.items())}."
