"""Argument checks whose messages name the argument, the value and the way out."""

from __future__ import annotations

import math

LARGEST_COUNT = 2**63 - 1
"""Of a signed integer in a tensor."""

MOST_BINS = 100_000
"""More is a slip of the pen, for which there may be no memory."""

MOST_STEPS = 10**12
"""Likewise: at a million steps a second these are eleven days."""

MOST_REPLICAS = 1_000_000
"""Likewise: more replicas than a device has room for."""


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
    is_number = (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        # Not what tensors cannot hold: an integer of thirty digits.
        and (abs(value) <= LARGEST_COUNT if isinstance(value, int) else math.isfinite(value))
    )
    inside = is_number and (
        (above is None or value > above) and (least is None or value >= least) and (most is None or value <= most)
    )
    if not inside:
        wanted = f"a finite number {' and '.join(bounds)}".rstrip()
        raise ValueError(f"{name}={value!r} is out of range: give {wanted}. {hint}".rstrip())
    return value


def count(name: str, value: int, *, least: int = 1, most: int = LARGEST_COUNT, hint: str = "") -> int:
    """Return ``value`` if it is an integer from ``least`` to ``most``.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        wanted = f"an integer >= {least}" + (f" and <= {most}" if isinstance(value, int) and value > most else "")
        raise ValueError(f"{name}={value!r} is out of range: give {wanted}. {hint}".rstrip())
    return value


def seed(value: int, name: str = "seed") -> int:
    """Return ``value`` if random generators take it.

    Raises:
        ValueError: If they do not.
    """
    # One less than what torch takes: some streams are seeded with the number that follows.
    return count(name, value, least=0, most=LARGEST_COUNT - 1)


def flag(name: str, value: bool) -> bool:
    """Return ``value`` if it is true or false.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} is neither true nor false: give one of them.")
    return value


def bins(name: str, width: float, reach: float) -> float:
    """Return ``width`` if bins of it are not too many for memory, from zero to ``reach``.

    Raises:
        ValueError: If they are.
    """
    if reach / width > MOST_BINS:
        raise ValueError(
            f"{name}={width:g} makes {reach / width:.3g} bins up to {reach:g}, of {MOST_BINS} at most: give wider ones."
        )
    return width


def steps(name: str, duration_fs: float, timestep_fs: float) -> int:
    """The whole number of timesteps in a duration.

    Raises:
        ValueError: If the duration is shorter than a timestep, not a multiple of it, or endless.
    """
    # Told as the user wrote it: in the unit that the argument is named for.
    unit, fs = ("ps", 1000.0) if name.endswith("_ps") else ("fs", 1.0)
    number(name, duration_fs / fs, above=0)
    n_steps = round(min(duration_fs / timestep_fs, 2.0 * MOST_STEPS))
    given = f"{name}={duration_fs / fs:.12g} {unit}"
    if n_steps > MOST_STEPS:
        raise ValueError(
            f"{given} is {duration_fs / timestep_fs:.3g} timesteps of {timestep_fs:g} fs, which no machine gets through: "
            "give less time, or a longer timestep."
        )
    if n_steps < 1 or not math.isclose(n_steps * timestep_fs, duration_fs, rel_tol=1e-6):
        raise ValueError(
            f"{given} is not a whole number of timesteps of {timestep_fs:g} fs: "
            f"give a multiple, for instance {max(n_steps, 1) * timestep_fs / fs:.12g} {unit}."
        )
    return n_steps
