"""A ``repr`` that shows the constructor's arguments."""

from __future__ import annotations

import inspect
from reprlib import Repr
from typing import Any, Self

_MAX_LENGTH = 8
_MAX_CHARACTERS = 1000


class _ArgumentRepr(Repr):
    """Shorten long sequences, and show the shape of an array instead of its values."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlist = self.maxtuple = self.maxdict = _MAX_LENGTH
        self.maxstring = self.maxother = _MAX_CHARACTERS

    # reprlib dispatches on the name of the type.
    def repr_Tensor(self, array: Any, level: int) -> str:
        return f"Tensor{tuple(array.shape)}"

    def repr_ndarray(self, array: Any, level: int) -> str:
        return f"array{tuple(array.shape)}"


class ReprMixin:
    """Show the constructor's arguments in ``repr``, defaults included; arguments that are None are left out.

    Subclasses need no code of their own: the arguments are recorded when an instance is created.

    Example:
        >>> from stable_plugin import BondDeviation
        >>> BondDeviation(threshold=0.5)
        BondDeviation(threshold=0.5, discard=3.0)
    """

    _init_arguments: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Record the arguments."""
        self = super().__new__(cls)
        # torch.nn.Module has a __setattr__ that must not run before its constructor.
        object.__setattr__(self, "_init_arguments", (args, kwargs))
        return self

    def __repr__(self) -> str:
        args, kwargs = self._init_arguments
        signature = inspect.signature(type(self))
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        shown: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            is_extra = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
            shown.update(value if is_extra else {name: value})
        format_value = _ArgumentRepr().repr
        arguments = ", ".join(f"{name}={format_value(value)}" for name, value in shown.items() if value is not None)
        return f"{type(self).__name__}({arguments})"
