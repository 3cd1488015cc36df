"""Argument checks whose messages name the argument, its value, and the remedy."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

MAX_COUNT = 2**63 - 1
"""Largest signed integer that a tensor holds."""

MAX_BINS = 100_000
"""Most bins of a histogram; more than these is a typing error that could exhaust the memory."""

MAX_STEPS = 10**12
"""Most timesteps of a duration: eleven days at a million steps per second."""

MAX_REPLICAS = 1_000_000
"""Most replicas; no device has memory for more."""


def number(
    name: str,
    value: float,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    hint: str = "",
) -> float:
    """Return ``value`` if it is a finite number inside the bounds.

    Args:
        name: Argument name as the user wrote it.
        value: Value to check.
        above: Exclusive lower bound.
        at_least: Inclusive lower bound.
        at_most: Inclusive upper bound.
        hint: Sentence appended to the error message.

    Raises:
        ValueError: If ``value`` is not a finite number inside the bounds.
    """
    bounds = []
    if above is not None:
        bounds.append(f"> {above:g}")
    if at_least is not None:
        bounds.append(f">= {at_least:g}")
    if at_most is not None:
        bounds.append(f"<= {at_most:g}")
    is_number = (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        # Tensors cannot hold an integer of thirty digits, although Python counts it as finite.
        and (abs(value) <= MAX_COUNT if isinstance(value, int) else math.isfinite(value))
    )
    inside = is_number and (
        (above is None or value > above)
        and (at_least is None or value >= at_least)
        and (at_most is None or value <= at_most)
    )
    if not inside:
        wanted = f"a finite number {' and '.join(bounds)}".rstrip()
        raise ValueError(f"{name}={value!r} is out of range: pass {wanted}. {hint}".rstrip())
    return value


def count(name: str, value: int, *, at_least: int = 1, at_most: int = MAX_COUNT, hint: str = "") -> int:
    """Return ``value`` if it is an integer from ``at_least`` to ``at_most``.

    Args:
        name: Argument name as the user wrote it.
        value: Value to check.
        at_least: Inclusive lower bound.
        at_most: Inclusive upper bound.
        hint: Sentence appended to the error message.

    Raises:
        ValueError: If ``value`` is not an integer inside the bounds.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not at_least <= value <= at_most:
        wanted = f"an integer >= {at_least}" + (
            f" and <= {at_most}" if isinstance(value, int) and value > at_most else ""
        )
        raise ValueError(f"{name}={value!r} is out of range: pass {wanted}. {hint}".rstrip())
    return value


def seed(value: int, name: str = "seed") -> int:
    """Return ``value`` if every random generator of a run accepts it.

    Args:
        value: Value to check.
        name: Argument name as the user wrote it.

    Raises:
        ValueError: If ``value`` is not an integer from 0 to ``MAX_COUNT - 1``.
    """
    # One less than the maximum of torch, because some streams are seeded with seed + 1.
    return count(name, value, at_least=0, at_most=MAX_COUNT - 1)


def flag(name: str, value: bool) -> bool:
    """Return ``value`` if it is a boolean.

    Args:
        name: Argument name as the user wrote it.
        value: Value to check.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} is not a boolean: pass true or false.")
    return value


def closest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that an unknown one is probably a misspelling of; None if there is none.

    Args:
        name: The unknown name.
        known: Names to choose from.
    """
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)


def bins(name: str, width: float, upper: float) -> float:
    """Return ``width`` if a histogram from zero to ``upper`` with bins of this width fits in memory.

    Args:
        name: Argument name as the user wrote it.
        width: Width of a bin.
        upper: Upper end of the histogram.

    Raises:
        ValueError: If it needs more than ``MAX_BINS`` bins.
    """
    if upper / width > MAX_BINS:
        raise ValueError(
            f"{name}={width:g} results in {upper / width:.3g} bins up to {upper:g}, more than the maximum of "
            f"{MAX_BINS}: pass a larger {name}."
        )
    return width


def steps(name: str, duration_fs: float, timestep_fs: float) -> int:
    """Return the number of timesteps in a duration.

    Args:
        name: Argument name as the user wrote it; the message is in ps if it ends in ``_ps``, and in fs otherwise.
        duration_fs: Duration in fs.
        timestep_fs: Timestep in fs.

    Raises:
        ValueError: If the duration is not a positive multiple of the timestep, or longer than ``MAX_STEPS`` timesteps.
    """
    unit, fs = ("ps", 1000.0) if name.endswith("_ps") else ("fs", 1.0)
    number(name, duration_fs / fs, above=0)
    n_steps = round(min(duration_fs / timestep_fs, 2.0 * MAX_STEPS))
    given = f"{name}={duration_fs / fs:.12g} {unit}"
    if n_steps > MAX_STEPS:
        raise ValueError(
            f"{given} is {duration_fs / timestep_fs:.3g} timesteps of {timestep_fs:g} fs, more than the maximum of "
            f"{MAX_STEPS:.0e}: pass a shorter duration, or a longer timestep."
        )
    if n_steps < 1 or not math.isclose(n_steps * timestep_fs, duration_fs, rel_tol=1e-6):
        raise ValueError(
            f"{given} is not a whole number of timesteps of {timestep_fs:g} fs: "
            f"pass a multiple, for instance {max(n_steps, 1) * timestep_fs / fs:.12g} {unit}."
        )
    return n_steps


@dataclass(frozen=True)
class Number:
    """Constraint of a dataclass field: a finite number inside bounds, as checked by :func:`number`.

    Attributes:
        above: Exclusive lower bound.
        at_least: Inclusive lower bound.
        at_most: Inclusive upper bound.
        hint: Sentence appended to the error message.

    Example:
        >>> from dataclasses import dataclass
        >>> from typing import Annotated
        >>> from stable_plugin.runtime.checks import Number, check_fields
        >>> @dataclass
        ... class Thermostat:
        ...     friction_per_ps: Annotated[float, Number(at_least=0)] = 1.0
        ...
        ...     def __post_init__(self):
        ...         check_fields(self)
        >>> Thermostat(friction_per_ps=-1.0)
        Traceback (most recent call last):
        ValueError: friction_per_ps=-1.0 is out of range: pass a finite number >= 0.
    """

    above: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    hint: str = ""

    def check(self, name: str, value: Any) -> None:
        """Raise ValueError if ``value`` is not a finite number inside the bounds."""
        number(name, value, above=self.above, at_least=self.at_least, at_most=self.at_most, hint=self.hint)


@dataclass(frozen=True)
class Count:
    """Constraint of a dataclass field: an integer inside bounds, as checked by :func:`count`.

    Attributes:
        at_least: Inclusive lower bound.
        at_most: Inclusive upper bound.
        hint: Sentence appended to the error message.
    """

    at_least: int = 1
    at_most: int = MAX_COUNT
    hint: str = ""

    def check(self, name: str, value: Any) -> None:
        """Raise ValueError if ``value`` is not an integer inside the bounds."""
        count(name, value, at_least=self.at_least, at_most=self.at_most, hint=self.hint)


@dataclass(frozen=True)
class Seed:
    """Constraint of a dataclass field: a seed of random generators, as checked by :func:`seed`."""

    def check(self, name: str, value: Any) -> None:
        """Raise ValueError if ``value`` is not a seed."""
        seed(value, name)


def check_fields(instance: Any) -> None:
    """Apply the constraints in the annotations of a dataclass to the values of its fields.

    A constraint is a :class:`Number`, :class:`Count` or :class:`Seed` in the metadata of ``Annotated``, around the whole
    hint or around a member of a union. ``None`` and the values of a ``Literal`` are accepted where the hint names them:
    ``Annotated[float, Number(above=0)] | Literal["auto"] | None``.

    Args:
        instance: Instance of a dataclass, for example ``self`` in ``__post_init__``.

    Raises:
        ValueError: If a value violates its constraint.
    """
    hints = get_type_hints(type(instance), include_extras=True)
    for field in fields(instance):
        constraints, accepted = _constraints(hints[field.name])
        value = getattr(instance, field.name)
        # Compared by type too, because True == 1.
        if any(type(value) is type(choice) and value == choice for choice in accepted):
            continue
        for constraint in constraints:
            constraint.check(field.name, value)


def _constraints(hint: Any) -> tuple[list[Number | Count | Seed], list[Any]]:
    """Return the constraints in a type hint, and the values that it accepts without a check."""
    if hint is type(None):
        return [], [None]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return [], list(arguments)
    own: list[Number | Count | Seed] = []
    if origin is Annotated:
        own = [each for each in arguments[1:] if isinstance(each, (Number, Count, Seed))]
        arguments = arguments[:1]
    elif origin not in (Union, UnionType):
        return [], []
    inner = [_constraints(argument) for argument in arguments]
    return own + [each for found, _ in inner for each in found], [each for _, choices in inner for each in choices]
