"""Validation of a recipe against the signatures of the classes and functions that it names.

Pydantic compares each value with the type hint of its argument. A part, which is a mapping with a ``_target_``, is compared
as what it is going to make, so that a whole recipe is validated before anything in it is made.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Union

from pydantic import ConfigDict, InstanceOf, Strict, TypeAdapter, ValidationError

from stable_plugin.integrations.recipes.targets import resolve_target, shown
from stable_plugin.runtime import checks

PART_KEYS = ("_target_", "_partial_")
"""Keys of a part that are not arguments of its target."""

# Strict: text that looks like a number is not a number, and a truth value is not one either.
_CONFIG = ConfigDict(arbitrary_types_allowed=True, strict=True)

# Hints that pydantic validates by itself; other classes mean an instance.
_PLAIN = (bool, int, float, str, list, dict, set, object, types.NoneType, Any)

_instance_of: Any = InstanceOf  # which mypy takes for an alias of its argument


def is_part(value: Any) -> bool:
    """Return whether a value describes an object to make."""
    return isinstance(value, Mapping) and "_target_" in value


def validate_arguments(
    target: Callable[..., Any], arguments: Mapping[str, Any], path: str, name: str, *, partial: bool = False
) -> None:
    """Raise an error unless a class or function takes these arguments, the parts inside them included.

    Args:
        target: The class or function.
        arguments: Plain data by name.
        path: Key path of the arguments in the recipe, for errors.
        name: Name of the target as the recipe writes it, for errors.
        partial: Whether required arguments may be missing, because the caller is going to pass them.

    Raises:
        ValueError: If an argument is unknown, missing, or of another type, a number is not finite, or a part names a target
            that it may not name. The error starts with the key path.
    """
    _validate_names(target, arguments, path, name, partial)
    hints = _hints(target)
    for key, value in arguments.items():
        _validate_type(value, hints.get(key, Any), f"{path}.{key}")
    for key, value in arguments.items():
        for where, part in _parts(value, f"{path}.{key}"):
            part_target = resolve_target(part["_target_"], f"{where}._target_")
            inner = {key: entry for key, entry in part.items() if key not in PART_KEYS}
            validate_arguments(part_target, inner, where, part["_target_"], partial=part.get("_partial_", False))


def signature_names(target: Callable[..., Any]) -> list[str]:
    """Return the names of the arguments of a class or function, in the order of its signature."""
    return list(_parameters(target) or {})


def _validate_names(
    target: Callable[..., Any], arguments: Mapping[str, Any], path: str, name: str, partial: bool
) -> None:
    parameters = _parameters(target)
    if parameters is None:
        return
    known = [key for key, each in parameters.items() if each.kind is not each.VAR_KEYWORD]
    for key, value in arguments.items():
        if key not in known and len(known) == len(parameters):
            close = checks.closest(str(key), known)
            remedy = f"did you mean {close}?" if close else f"pass {', '.join(known) or 'no argument'}."
            raise ValueError(f"{path}.{key}={shown(value)} is not an argument of {name}: {remedy}")
    missing = [key for key in known if parameters[key].default is inspect.Parameter.empty and key not in arguments]
    if missing and not partial:
        paths = ", ".join(f"{path}.{key}" for key in missing)
        # An argument of another name is accepted where further ones are passed on.
        given = checks.closest(missing[0], [str(key) for key in arguments if key not in known])
        remedy = f"did you mean it by {given}?" if given else "pass a value."
        raise ValueError(f"{paths} is missing, and {name} requires it: {remedy}")


def _parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter] | None:
    """Return the arguments that can be passed by name, or None where Python cannot tell."""
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return None
    unnamed = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
    return {name: each for name, each in parameters.items() if each.kind not in unnamed}


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:  # a hint that cannot be evaluated is not validated
        return {}


def _validate_type(value: Any, hint: Any, path: str) -> None:
    stand_in = _stand_in(value, path)
    try:
        # In a list, as pydantic refuses a configuration for a class at the top.
        schema: Any = list.__class_getitem__(_schema(hint))
        TypeAdapter[Any](schema, config=_CONFIG).validate_python([stand_in])
    except ValidationError as error:
        found = [(*_located(each["loc"][1:], value), each) for each in error.errors(include_url=False)]
    except Exception:  # a hint that pydantic does not support is not validated
        return
    else:
        return
    if any(isinstance(each["input"], _Unknown) for _, _, each in found):
        return
    # Of a union, the choice that went furthest into the value is the one that was meant.
    where, inside, _ = max(found, key=lambda each: len(each[0]))
    expected = [_expectation(each["type"], each["msg"]) for place, _, each in found if place == where]
    wanted = " or ".join(dict.fromkeys(expected))
    raise ValueError(f"{path}{where}={shown(inside)} is not {wanted}: {_remedy(inside, wanted)}")


def _schema(hint: Any) -> Any:
    """Return a hint as pydantic needs it: a list of YAML may be a tuple, text a path, and a class means an instance."""
    origin: Any = typing.get_origin(hint)
    inner = tuple(each if each is Ellipsis else _schema(each) for each in typing.get_args(hint))
    if origin in (Union, types.UnionType):
        return Union.__getitem__(inner)
    if tuple in (hint, origin):
        return Annotated[tuple.__class_getitem__(inner) if inner else tuple, Strict(False)]
    if inspect.isclass(origin) and issubclass(origin, Sequence | Mapping):
        return origin[inner]  # type: ignore[index]
    if hint is Path:
        return Union.__getitem__((str, _instance_of[hint]))
    is_plain = hint in _PLAIN or getattr(hint, "__module__", "") == "collections.abc"
    return _instance_of[hint] if inspect.isclass(hint) and origin is None and not is_plain else hint


def _expectation(kind: str, message: str) -> str:
    if kind == "sequence_str" or message.endswith("instance of Sequence"):
        return "a valid list"
    return message.removeprefix("Input should be ") if message.startswith("Input should be ") else f"valid ({message})"


def _remedy(value: Any, wanted: str) -> str:
    if is_part(value):
        partial = ", or set _partial_: true" if "callable" in wanted and not value.get("_partial_") else ""
        return f"set _target_ to a class or function that returns one{partial}."
    return "pass one, by its _target_ if it is a part." if re.search("instance of|callable", wanted) else "pass one."


def _located(location: Sequence[Any], value: Any) -> tuple[str, Any]:
    """Return the key path of pydantic's location inside a value, and what is there; names of a union's choices are left out."""
    path = ""
    for key in location:
        if isinstance(value, list) and isinstance(key, int):
            path, value = f"{path}[{key}]", value[key]
        elif isinstance(value, Mapping) and not is_part(value) and key in value:
            path, value = f"{path}.{key}", value[key]
    return path, value


def _parts(value: Any, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the outermost parts in a value with their key paths."""
    if is_part(value):
        yield path, value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _parts(entry, f"{path}.{key}")
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            yield from _parts(entry, f"{path}[{index}]")


class _StandIn:
    """An object that ``isinstance`` takes for one of another class, which is going to be made later."""

    def __init__(self, kind: type) -> None:
        self._kind = kind

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return self._kind


class _CallableStandIn(_StandIn):
    def __call__(self) -> None: ...


class _Unknown:
    """Stands for the result of a function, whose type is known once it has been called."""


def _stand_in(value: Any, path: str) -> Any:
    """Return a value with stand-ins in place of its parts."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{path}={value!r} is not a finite number: pass one, or leave it out.")
    if isinstance(value, list):
        return [_stand_in(entry, f"{path}[{index}]") for index, entry in enumerate(value)]
    if not isinstance(value, Mapping):
        return value
    if not is_part(value):
        return {key: _stand_in(entry, f"{path}.{key}") for key, entry in value.items()}
    target = resolve_target(value["_target_"], f"{path}._target_")
    partial = value.get("_partial_", False)
    if not isinstance(partial, bool):
        raise ValueError(f"{path}._partial_={shown(partial)} is not a valid boolean: pass true or false.")
    if partial:
        return functools.partial(target)
    if not inspect.isclass(target):
        return _Unknown()
    is_callable = any("__call__" in vars(base) for base in target.__mro__)
    return (_CallableStandIn if is_callable else _StandIn)(target)
