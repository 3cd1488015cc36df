"""Argument checks whose messages name the argument, the value and the way out."""

from __future__ import annotations

import math


def number(
    name: str,
    value: float,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
    hint: str = "",
) -> float:
    """Return ``value`` if it is a finite number inside the bounds.

    Args:
        name: Argument name as the user wrote it.
        value: The value given.
        above: Exclusive lower bound.
        least: Inclusive lower bound.
        most: Inclusive upper bound.
        hint: What to do about it, a sentence.

    Raises:
        ValueError: If ``value`` is not a finite number inside the bounds.
    """
    bounds = []
    if above is not None:
        bounds.append(f"> {above:g}")
    if least is not None:
        bounds.append(f">= {least:g}")
    if most is not None:
        bounds.append(f"<= {most:g}")
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    inside = is_number and (
        (above is None or value > above) and (least is None or value >= least) and (most is None or value <= most)
    )
    if not inside:
        wanted = f"a finite number {' and '.join(bounds)}".rstrip()
        raise ValueError(f"{name}={value!r} is out of range: give {wanted}. {hint}".rstrip())
    return value


def count(name: str, value: int, *, least: int = 1, hint: str = "") -> int:
    """Return ``value`` if it is an integer of at least ``least``.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} is out of range: give an integer >= {least}. {hint}".rstrip())
    return value


def steps(name: str, duration_fs: float, timestep_fs: float) -> int:
    """The whole number of timesteps in a duration.

    Raises:
        ValueError: If the duration is shorter than a timestep or not a multiple of it.
    """
    number(name, duration_fs, above=0)
    n_steps = round(duration_fs / timestep_fs)
    if n_steps < 1 or not math.isclose(n_steps * timestep_fs, duration_fs, rel_tol=1e-6):
        raise ValueError(
            f"{name}={duration_fs:g} fs is not a whole number of timesteps of {timestep_fs:g} fs: "
            f"give a multiple, for instance {max(n_steps, 1) * timestep_fs:g} fs."
        )
    return n_steps
