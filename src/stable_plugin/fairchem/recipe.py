"""The parts of a recipe: all of them checked before the first is made.

Hydra makes the innermost parts first, whatever they name. A runner with ``_recursive_: false`` gets its parts as they are
written instead, and makes them here.
"""

from __future__ import annotations

import difflib
import inspect
import math
import pkgutil
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import InstantiationException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

HYDRAS_OWN = ("_target_", "_partial_", "_recursive_", "_convert_", "_args_")
"""Keys of a part that are no arguments of what it names."""

LOADERS = (
    "torch.load", "torch.serialization", "torch.hub", "torch.jit", "torch.package", "torch.utils.cpp_extension",
    "numpy.load", "pandas", "joblib", "cloudpickle", "dill", "hydra", "omegaconf", "submitit",
)  # fmt: skip
"""What runs code that it finds in a file or under a name."""

LONGEST_VALUE = 80
"""Letters of a value that an error repeats."""


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
    hints = _hints(runner)
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
    return f" It was given {', '.join(f'{key}={_shown(value)}' for key, value in arguments.items())}."


def _told(error: BaseException) -> str:
    """An error of ours says enough; of others the kind helps."""
    return str(error) if type(error) in (ValueError, FileNotFoundError) else f"{type(error).__name__}: {error}"


def _check(value: Any, path: str, hint: Any) -> None:
    if isinstance(value, Mapping) and "_target_" in value:
        _check_part(value, path, hint)
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{path}={value!r} is not a finite number: give one, or leave it out.")
    if not _fits(value, hint):
        raise ValueError(f"{path}={_shown(value)} is no {_named(hint)}: {_way_out(value, hint)}")
    if isinstance(value, Mapping):
        for key, entry in value.items():
            _check(entry, f"{path}.{key}", _entry_hint(hint, 1))
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            _check(entry, f"{path}[{index}]", _entry_hint(hint, 0))


def _check_part(part: Mapping[str, Any], path: str, hint: Any) -> None:
    target = allowed(part["_target_"], f"{path}._target_")
    partial = part.get("_partial_", False)
    for key, default in (("_partial_", False), ("_recursive_", True)):
        if not isinstance(part.get(key, default), bool):
            raise ValueError(f"{path}.{key}={_shown(part[key])} is no bool: give true or false.")
    if not _makes(target, partial, hint):
        what = ", or set _partial_: true" if not partial and any(map(_is_callable_hint, _choices(hint))) else ""
        raise ValueError(f"{path}._target_={part['_target_']!r} makes no {_named(hint)}: name one that does{what}.")
    arguments = {key: value for key, value in part.items() if key not in HYDRAS_OWN}
    parameters, open_ended = _parameters(target)
    for key, value in arguments.items():
        if parameters is not None and key not in parameters and not open_ended:
            close = difflib.get_close_matches(str(key), parameters, n=1)
            hint_at = f"did you mean {close[0]}?" if close else f"it takes {', '.join(parameters) or 'none'}."
            raise ValueError(f"{path}.{key}={_shown(value)} is no argument of {part['_target_']}: {hint_at}")
    if parameters is not None and not partial and "_args_" not in part:
        missing = [
            name for name, each in parameters.items() if each.default is inspect.Parameter.empty and name not in part
        ]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}, which {part['_target_']} needs: give a value.")
    hints = _hints(target)
    for key, value in arguments.items():
        _check(value, f"{path}.{key}", hints.get(key, Any))


def allowed(name: Any, path: str) -> Callable[..., Any]:
    """The class or function of that name.

    Args:
        name: Full name, module and all.
        path: Where it is written, for errors.

    Raises:
        ValueError: If there is none, or it is one that a recipe may not name: anything of Python's own library, which holds
            shell, processes, files and ``eval``, and what loads code.
    """
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{path}={_shown(name)} is no name: give the full name of a class or function.")
    _refuse(name, name, path)
    try:
        target = pkgutil.resolve_name(name)
    except Exception as error:  # importing runs a module, from which anything can come
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"{path}={name!r} cannot be imported ({reason[-1] if reason else type(error).__name__}): give the full name of "
            "a class or function."
        ) from error
    if not (inspect.isclass(target) or inspect.isroutine(target)):
        raise ValueError(f"{path}={name!r} is a {type(target).__name__}: give the full name of a class or function.")
    # Under another package's name it is still what it is: some.package.os.system.
    _refuse(f"{getattr(target, '__module__', None) or 'builtins'}.{getattr(target, '__qualname__', '')}", name, path)
    found: Callable[..., Any] = target
    return found


def _refuse(full_name: str, name: str, path: str) -> None:
    root = full_name.partition(".")[0]
    loads = any(full_name == loader or full_name.startswith(f"{loader}.") for loader in LOADERS)
    if root in sys.stdlib_module_names or loads:
        of = "what loads or runs code" if loads else f"Python's own library ({root})"
        raise ValueError(
            f"{path}={name!r} is of {of}, which a recipe may not call: name a class or function of a package for models or "
            "training, or one of your own."
        )


def _parameters(target: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter] | None, bool]:
    """Arguments by name, None where they cannot be known, and whether there may be others."""
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return None, True
    named = {
        name: each
        for name, each in parameters.items()
        if each.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    }
    return named, any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:  # hints are hints: what cannot be evaluated is not checked
        return {}


def _makes(target: Any, partial: bool, hint: Any) -> bool:
    """Whether calling the target may give what is asked for; only classes say."""
    choices = _choices(hint)
    if partial:
        return any(_is_callable_hint(choice) or not inspect.isclass(choice) for choice in choices)
    if not inspect.isclass(target):
        return True
    for choice in choices:
        origin = typing.get_origin(choice) or choice
        if not inspect.isclass(origin) or origin in (object, Any):
            return True
        if _is_callable_hint(choice):
            if any("__call__" in vars(base) for base in target.__mro__):
                return True
            continue
        if issubclass(target, origin):
            return True
    return False


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value can be what a hint asks for; where the hint says little it can."""
    return any(_fits_one(value, choice) for choice in _choices(hint))


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
        return (not _is_callable_hint(hint) and issubclass(list, origin)) or origin is tuple
    return isinstance(value, Mapping) and issubclass(dict, origin)


def _choices(hint: Any) -> tuple[Any, ...]:
    """The kinds of a union, or the one kind."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(choice for part in typing.get_args(hint) for choice in _choices(part))
    return (hint,)


def _is_callable_hint(hint: Any) -> bool:
    return (typing.get_origin(hint) or hint) is Callable


def _entry_hint(hint: Any, place: int) -> Any:
    """What the entries of a list (0) or a mapping (1) should be."""
    for choice in _choices(hint):
        arguments = [each for each in typing.get_args(choice) if each is not Ellipsis]
        origin = typing.get_origin(choice)
        if inspect.isclass(origin) and issubclass(origin, Mapping) == bool(place) and not _is_callable_hint(choice):
            if place and len(arguments) == 2:
                return arguments[1]
            if not place and arguments and (issubclass(origin, Sequence)):
                return typing.Union[tuple(arguments)]  # noqa: UP007  (of a tuple, element by element)
    return Any


def _named(hint: Any) -> str:
    """A hint as one would say it."""
    words: list[str] = []
    for choice in _choices(hint):
        if typing.get_origin(choice) is typing.Literal:
            words.extend(repr(each) for each in typing.get_args(choice))
        elif choice is type(None):
            words.append("null")
        else:
            words.append(getattr(typing.get_origin(choice) or choice, "__name__", str(choice)))
    return " or ".join(dict.fromkeys(words))


def _way_out(value: Any, hint: Any) -> str:
    plain = {bool, int, float, str, list, type(None)}
    kinds = [typing.get_origin(choice) or choice for choice in _choices(hint)]
    if any(inspect.isclass(kind) and kind not in plain for kind in kinds) and not isinstance(value, Mapping):
        return "give one, by its _target_ if it is a part."
    return "give one."


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}…"
