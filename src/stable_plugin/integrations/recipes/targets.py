"""Which classes and functions a recipe may name."""

from __future__ import annotations

import inspect
import pkgutil
import sys
from collections.abc import Callable
from typing import Any

LOADERS = (
    "torch.load", "torch.serialization", "torch.hub", "torch.jit", "torch.package", "torch.utils.cpp_extension",
    "numpy.load", "pandas", "joblib", "cloudpickle", "dill", "hydra", "omegaconf", "submitit",
)  # fmt: skip
"""What runs code that it finds in a file or under a name."""

LONGEST_VALUE = 80
"""Letters of a value that an error repeats."""


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
        raise ValueError(f"{path}={shown(name)} is no name: give the full name of a class or function.")
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


def shown(value: Any) -> str:
    """A value as an error repeats it."""
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}…"
