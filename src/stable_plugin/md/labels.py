"""Energies, forces and stresses that structures are labeled with."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from ase import Atoms
from ase.stress import voigt_6_to_full_3x3_stress
from numpy.typing import NDArray

from stable_plugin.md.frames import Frames, read_frames
from stable_plugin.md.geometry import check_geometry

log = logging.getLogger(__name__)

ENERGY_KEY = "REF_energy"
FORCES_KEY = "REF_forces"
STRESS_KEY = "REF_stress"

SAME_ENERGY_EV = 1e-4
"""Largest difference in eV between the energies of two frames of the same isolated atom."""

UNUSED_LABELS = ("virial", "dipole", "magmom", "charges", "bec", "polarizability")
"""Parts of the names of labels that training does not use."""

INITIAL_GUESSES = {"initial_magmoms", "initial_charges"}
"""Arrays of ASE that are input of electronic structure codes, and no labels."""


def read_labeled(
    source: Frames,
    name: str,
    energy_key: str = ENERGY_KEY,
    forces_key: str = FORCES_KEY,
    stress_key: str = STRESS_KEY,
    *,
    least: int = 1,
) -> list[Atoms]:
    """Return copies of structures, with labels under :data:`ENERGY_KEY`, :data:`FORCES_KEY` and :data:`STRESS_KEY`.

    Args:
        source: As for :func:`read_frames`.
        name: Name of the argument in errors.
        energy_key: Key of the total energy in eV, in ``atoms.info``; ``energy`` reads that of ASE's calculator. If the
            default is missing, and the frames have one energy and one array of forces, these are used.
        forces_key: Key of the forces in eV/Å, in ``atoms.arrays``; ``forces`` reads those of ASE's calculator.
        stress_key: Key of the stress in eV/Å³ as ASE defines it, positive under tension: 6 numbers in Voigt order, or 9. Frames
            may lack it; that of a frame that is not periodic in all directions is left out.
        least: Minimum number of frames.

    Raises:
        ValueError: If there are fewer frames, an energy or forces are missing or not finite, or
            :func:`~stable_plugin.md.geometry.check_geometry` rejects a structure.
    """
    frames = read_frames(source, name)
    energy_key, forces_key, stress_key = find_keys(frames, name, energy_key, forces_key, stress_key)
    _tell_unused(frames, name, energy_key)
    if len(frames) < least:
        raise ValueError(f"{name} contains {len(frames)} frame(s): pass at least {least}.")
    labeled = []
    for index, frame in enumerate(frames):
        results = _results(frame)
        energy = frame.info.get(energy_key, results.get(energy_key))
        forces = frame.arrays.get(forces_key, results.get(forces_key))
        if energy is None or forces is None:
            found = sorted({*frame.info, *results} - {"temperature_K"})
            arrays = sorted({*frame.arrays, *results} - {"numbers", "positions"})
            missing = [f"energy_key={energy_key!r}"] * (energy is None) + [f"forces_key={forces_key!r}"] * (
                forces is None
            )
            raise ValueError(
                f"{name}[{index}] has no {' and no '.join(missing)}. Found per frame: {found or 'nothing'}; per atom: "
                f"{arrays or 'nothing'}. Set the keys of the energy in eV and the forces in eV/Å, or label the frames."
            )
        energy, forces = (
            _numbers(energy, (), f"{name}[{index}] energy_key={energy_key!r}"),
            _numbers(forces, (len(frame), 3), f"{name}[{index}] forces_key={forces_key!r}"),
        )
        if not (np.isfinite(energy) and np.isfinite(forces).all()):
            raise ValueError(f"{name}[{index}] has a non-finite energy or force: remove that frame.")
        check_geometry(frame, f"{name}[{index}]")
        copy = frame.copy()  # without the calculator
        copy.info[ENERGY_KEY], copy.arrays[FORCES_KEY] = float(energy), np.array(forces, dtype=float)
        stress = frame.info.get(stress_key, results.get(stress_key))
        copy.info.pop(STRESS_KEY, None)
        if stress is not None and frame.pbc.all():
            copy.info[STRESS_KEY] = _stress(stress, f"{name}[{index}] stress_key={stress_key!r}")
        labeled.append(copy)
    return labeled


def _stress(value: Any, where: str) -> NDArray[np.float64]:
    """Return a stress as a symmetric tensor, (3, 3)."""
    shape = np.shape(value)
    if shape not in ((6,), (9,), (3, 3)):
        raise ValueError(f"{where} has the shape {shape}: set 6 numbers in Voigt order (xx, yy, zz, yz, xz, xy), or 9.")
    numbers = _numbers(value, shape, where)
    tensor: NDArray[np.float64] = voigt_6_to_full_3x3_stress(numbers) if shape == (6,) else numbers.reshape(3, 3)
    if not np.isfinite(tensor).all() or not np.allclose(tensor, tensor.T, rtol=1e-3, atol=1e-6):
        raise ValueError(
            f"{where} is {tensor.tolist()}, which is not finite or not symmetric: set the stress in eV/Å³."
        )
    return tensor


def _numbers(value: Any, shape: tuple[int, ...], where: str) -> NDArray[np.float64]:
    """Return ``value`` as an array, if it has this shape."""
    try:
        numbers = np.asarray(value, dtype=float)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} holds {value!r}: set numbers.") from error
    if numbers.shape != shape:
        raise ValueError(f"{where} has the shape {numbers.shape}: set numbers of shape {shape or '() (a scalar)'}.")
    return numbers


def find_keys(
    frames: Sequence[Atoms], name: str, energy_key: str, forces_key: str, stress_key: str = STRESS_KEY
) -> tuple[str, str, str]:
    """Return the keys of energies, forces and stresses, found in the first frame where it does not have the default ones.

    Args:
        frames: Structures, at least one.
        name: Name of the argument in the log.
        energy_key: Key of the energy; another is looked for if it is the default, and missing.
        forces_key: The same for the forces.
        stress_key: The same for the stress.
    """
    first, results = frames[0], _results(frames[0])
    given = {**first.info, **first.arrays, **results}
    per_frame, per_atom = {**first.info, **results}, {**first.arrays, **results}
    energies = [key for key, value in per_frame.items() if _is_numeric(value, ()) and "energy" in key.lower()]
    forces = [key for key, value in per_atom.items() if _is_numeric(value, (len(first), 3)) and "force" in key.lower()]
    stresses = [key for key, value in per_frame.items() if np.size(value) in (6, 9) and "stress" in key.lower()]
    found = []
    for key, default, candidates in (
        (energy_key, ENERGY_KEY, [key for key in energies if key != "free_energy"]),
        (forces_key, FORCES_KEY, forces),
        (stress_key, STRESS_KEY, stresses),
    ):
        found.append(candidates[0] if key == default and key not in given and len(candidates) == 1 else key)
    if found != [energy_key, forces_key, stress_key]:
        log.info(
            "%s: energies are %r, forces are %r%s", name, *found[:2], f", stresses are {found[2]!r}" if stresses else ""
        )
    return found[0], found[1], found[2]


def isolated_energies(frames: Sequence[Atoms], name: str, energy_key: str) -> dict[int, float]:
    """Return the energies of isolated atoms in eV by atomic number.

    Args:
        frames: Frames of isolated atoms; they need no forces.
        name: Name of the argument in errors.
        energy_key: Key of the energy.

    Raises:
        ValueError: If one has no energy, or two of the same element disagree.
    """
    found: dict[int, float] = {}
    for frame in frames:
        (number,), (symbol,) = frame.numbers.tolist(), frame.get_chemical_symbols()
        energy = frame.info.get(energy_key, _results(frame).get(energy_key))
        if energy is None or not np.isfinite(
            _numbers(energy, (), f"{name}: isolated {symbol} energy_key={energy_key!r}")
        ):
            raise ValueError(
                f"{name}: the isolated atom {symbol} has no energy_key={energy_key!r}: set its energy in eV, or remove "
                "that frame."
            )
        if abs(found.setdefault(number, float(energy)) - float(energy)) > SAME_ENERGY_EV:
            raise ValueError(
                f"{name}: isolated atoms {symbol} have the energies {found[number]:g} and {float(energy):g} eV: remove "
                "one of these frames."
            )
    return found


def _tell_unused(frames: Sequence[Atoms], name: str, energy_key: str) -> None:
    """Log labels that are not used, and which of two kinds of energies is."""
    given = {key for frame in frames for key in (*frame.info, *frame.arrays, *_results(frame))}
    unused = sorted(key for key in given - INITIAL_GUESSES if any(part in key.lower() for part in UNUSED_LABELS))
    if unused:
        log.warning("%s: the labels %s are not used: training is on energies, forces and stresses.", name, unused)
    other = {"energy": "free_energy", "free_energy": "energy"}.get(energy_key)
    if other in given and any(_energies_differ(frame) for frame in frames):
        log.warning(
            "%s: energies are %r, which differ from %r: forces of smeared electrons are gradients of the free energy. Set "
            "energy_key to choose.",
            name,
            energy_key,
            other,
        )


def _energies_differ(frame: Atoms) -> bool:
    values: dict[str, Any] = {**frame.info, **_results(frame)}
    if not all(_is_numeric(values.get(key), ()) for key in ("energy", "free_energy")):
        return False
    return abs(float(values["energy"]) - float(values["free_energy"])) > SAME_ENERGY_EV


def _results(frame: Atoms) -> dict[str, Any]:
    return {} if frame.calc is None else frame.calc.results


def _is_numeric(value: Any, shape: tuple[int, ...]) -> bool:
    return not isinstance(value, bool | str) and np.shape(value) == shape and np.asarray(value).dtype.kind in "fiu"
