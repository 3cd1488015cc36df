"""What the hints of a signature say of the values in a recipe."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def parameters_of(target: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter] | None, bool]:
    """Arguments by name, None where they cannot be known, and whether there may be others."""
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return None, True
    by_name = {
        name: each
        for name, each in parameters.items()
        if each.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    }
    return by_name, any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())


def hints_of(target: Callable[..., Any]) -> dict[str, Any]:
    """What kinds of values the arguments are to have, by name; empty where that cannot be known."""
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:  # hints are hints: what cannot be evaluated is not checked
        return {}


def makes(target: Any, partial: bool, hint: Any) -> bool:
    """Whether calling the target may give what is asked for; only classes say."""
    if partial:
        return any(is_callable(choice) or not inspect.isclass(choice) for choice in choices(hint))
    if not inspect.isclass(target):
        return True
    for choice in choices(hint):
        origin = typing.get_origin(choice) or choice
        if not inspect.isclass(origin) or origin in (object, Any):
            return True
        if is_callable(choice):
            if any("__call__" in vars(base) for base in target.__mro__):
                return True
            continue
        if issubclass(target, origin):
            return True
    return False


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value can be what a hint asks for; where the hint says little it can."""
    return any(_fits_one(value, choice) for choice in choices(hint))


def _fits_one(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint) or hint
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if hint is None or hint is type(None):
        return value is None
    if not inspect.isclass(origin):
        return True
    if origin in (object, Any):
        return True
    if value is None:
        return False
    if isinstance(value, bool):
        return origin is bool
    if isinstance(value, int):
        return origin in (int, float)
    if isinstance(value, float):
        return origin is float
    if isinstance(value, str):
        return origin in (str, Path)
    if isinstance(value, list):
        return (not is_callable(hint) and issubclass(list, origin)) or origin is tuple
    return isinstance(value, Mapping) and issubclass(dict, origin)


def choices(hint: Any) -> tuple[Any, ...]:
    """The kinds of a union, or the one kind."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(choice for part in typing.get_args(hint) for choice in choices(part))
    return (hint,)


def is_callable(hint: Any) -> bool:
    """Whether a hint asks for something to call."""
    return (typing.get_origin(hint) or hint) is Callable


def entry_hint(hint: Any, place: int) -> Any:
    """What the entries of a list (0) or a mapping (1) should be."""
    for choice in choices(hint):
        arguments = [each for each in typing.get_args(choice) if each is not Ellipsis]
        origin = typing.get_origin(choice)
        if inspect.isclass(origin) and issubclass(origin, Mapping) == bool(place) and not is_callable(choice):
            if place and len(arguments) == 2:
                return arguments[1]
            if not place and arguments and (issubclass(origin, Sequence)):
                return typing.Union[tuple(arguments)]  # noqa: UP007  (of a tuple, element by element)
    return Any


def named(hint: Any) -> str:
    """A hint as one would say it."""
    words: list[str] = []
    for choice in choices(hint):
        if typing.get_origin(choice) is typing.Literal:
            words.extend(repr(each) for each in typing.get_args(choice))
        elif choice is type(None):
            words.append("null")
        else:
            words.append(getattr(typing.get_origin(choice) or choice, "__name__", str(choice)))
    return " or ".join(dict.fromkeys(words))


def way_out(value: Any, hint: Any) -> str:
    """What to do about a value that a hint does not allow."""
    plain = {bool, int, float, str, list, type(None)}
    kinds = [typing.get_origin(choice) or choice for choice in choices(hint)]
    if any(inspect.isclass(kind) and kind not in plain for kind in kinds) and not isinstance(value, Mapping):
        return "give one, by its _target_ if it is a part."
    return "give one."
