"""Isolated-atom energies of a model and of its labels: whether they are of the same code, and how to move them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

log = logging.getLogger(__name__)

MAX_FRAMES = 32
"""Frames on which the energies are compared."""

MIN_OFFSET_EV = 0.02
"""Mean error in eV per atom below which the energies are those of the same code."""

MAX_UNEXPLAINED = 0.3
"""Part of the error that may remain after isolated atoms have been moved, if they are what differs."""

E0s = str | Mapping[int, float] | None
"""``average``, ``isolated``, ``model``, energies in eV by atomic number, or None."""

MODES = ("average", "isolated", "model")


@dataclass(frozen=True)
class EnergyOffset:
    """Errors of a model's energies on labeled frames, and the isolated atoms that explain them best.

    Attributes:
        mean: Mean error in eV per atom.
        rms: Root mean square error in eV per atom.
        rms_after: The same after the shifts, from the degrees of freedom that the shifts leave; infinite if they leave none.
        shifts: What to add to the energy of each isolated atom, in eV by atomic number.
    """

    mean: float
    rms: float
    rms_after: float
    shifts: dict[int, float]

    @property
    def is_of_another_code(self) -> bool:
        """Whether the errors are large, and isolated atoms explain most of them."""
        return self.rms > MIN_OFFSET_EV and self.rms_after < MAX_UNEXPLAINED * self.rms


def check_mode(mode: E0s) -> None:
    """Raise an error if a value of ``E0s`` is not valid.

    Args:
        mode: The value.

    Raises:
        ValueError: If it is neither a mode nor energies by atomic number.
    """
    if mode is None or isinstance(mode, Mapping) or mode in MODES:
        return
    raise ValueError(
        f"E0s={mode!r} is not valid: pass {', '.join(map(repr, MODES))}, energies in eV by atomic number, or None."
    )


def fit_offset(frames: Sequence[Atoms], predicted: Sequence[float], labels: Sequence[float]) -> EnergyOffset:
    """Return the shifts of isolated atoms that explain the errors of energies best.

    They are the least-squares solution of smallest norm, so that elements which always occur in the same ratio, as in
    frames of one molecule, share the shift.

    Args:
        frames: Structures.
        predicted: Energies of the model, in eV.
        labels: Labeled energies, in eV.
    """
    numbers = sorted({int(number) for frame in frames for number in frame.numbers})
    sizes = np.array([len(frame) for frame in frames], dtype=float)
    counts = count_elements(frames, numbers) / sizes[:, None]
    errors = (np.asarray(labels, dtype=float) - np.asarray(predicted, dtype=float)) / sizes
    shifts, _, rank, _ = np.linalg.lstsq(counts, errors, rcond=1e-8)
    n_free = len(frames) - int(rank)
    remaining = float(((errors - counts @ shifts) ** 2).sum())
    return EnergyOffset(
        mean=float(-errors.mean()),
        rms=float(np.sqrt(np.mean(errors**2))),
        # As many shifts as frames explain any errors.
        rms_after=float(np.sqrt(remaining / n_free)) if n_free > 0 else inf,
        shifts={number: float(shift) for number, shift in zip(numbers, shifts, strict=True)},
    )


def count_elements(frames: Sequence[Atoms], numbers: Sequence[int]) -> NDArray[np.float64]:
    """Return how many atoms of each element frames have, (n_frames, n_elements).

    Args:
        frames: Structures.
        numbers: Atomic numbers of the elements.
    """
    return np.array(
        [[np.count_nonzero(frame.numbers == number) for number in numbers] for frame in frames], dtype=float
    )


def evenly_chosen(frames: Sequence[Atoms]) -> list[Atoms]:
    """Return at most :data:`MAX_FRAMES` of the frames, spread evenly."""
    chosen = np.linspace(0, len(frames) - 1, min(MAX_FRAMES, len(frames))).round().astype(int)
    return [frames[index] for index in chosen]


def require_elements(energies: Mapping[int, float], frames: Sequence[Atoms], remedy: str) -> dict[int, float]:
    """Return the energies of the elements in frames.

    Args:
        energies: Energies in eV by atomic number.
        frames: Structures.
        remedy: What to do where one is missing, for the error.

    Raises:
        ValueError: If an element has none.
    """
    numbers = sorted({int(number) for frame in frames for number in frame.numbers})
    by_number = {int(number): float(energy) for number, energy in energies.items()}
    missing = [number for number in numbers if number not in by_number]
    if missing:
        raise ValueError(f"E0s lacks the atomic number(s) {missing}: {remedy}")
    return {number: by_number[number] for number in numbers}
