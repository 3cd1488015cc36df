"""The classes and functions that a recipe may name."""

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
"""Functions and packages that run code which they find in a file or under a name."""

MAX_SHOWN = 80
"""Characters of a value that an error message repeats."""


def resolve_target(name: Any, path: str) -> Callable[..., Any]:
    """Return the class or function of a full name.

    Args:
        name: Full name, such as ``torch.optim.Adam``.
        path: Key path of the name in the recipe, for errors.

    Raises:
        ValueError: If the name cannot be imported, or a recipe may not use it: Python's standard library, which holds the
            shell, processes, files and ``eval``, and everything that loads code.
    """
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{path}={shown(name)} is not a name: pass the full name of a class or function.")
    _refuse_unsafe(name, name, path)
    try:
        target = pkgutil.resolve_name(name)
    except Exception as error:  # importing runs a module, which can raise anything
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"{path}={name!r} cannot be imported ({reason[-1] if reason else type(error).__name__}): pass the full name of "
            "a class or function."
        ) from error
    if not (inspect.isclass(target) or inspect.isroutine(target)):
        raise ValueError(f"{path}={name!r} is a {type(target).__name__}: pass the full name of a class or function.")
    # Another package can expose the standard library under its own name: some.package.os.system.
    _refuse_unsafe(
        f"{getattr(target, '__module__', None) or 'builtins'}.{getattr(target, '__qualname__', '')}", name, path
    )
    found: Callable[..., Any] = target
    return found


def _refuse_unsafe(full_name: str, name: str, path: str) -> None:
    root = full_name.partition(".")[0]
    loads_code = any(full_name == loader or full_name.startswith(f"{loader}.") for loader in LOADERS)
    if root in sys.stdlib_module_names or loads_code:
        reason = "loads or runs code" if loads_code else f"is part of Python's standard library ({root})"
        raise ValueError(
            f"{path}={name!r} {reason}, which a recipe may not call: pass a class or function of a package for models or "
            "training, or of your own."
        )


def shown(value: Any) -> str:
    """Return a value as an error message repeats it."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 1]}…"
