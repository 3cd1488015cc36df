"""Reading structures and their labels from files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import ase.db
import ase.io
import numpy as np
from ase import Atoms

ENERGY_KEY = "REF_energy"
FORCES_KEY = "REF_forces"

Frames = str | Path | Sequence[Atoms]
"""A file that ASE reads, or structures at hand."""


def read_frames(source: Frames, name: str = "structures") -> list[Atoms]:
    """All structures of a file, or the ones given.

    Args:
        source: Path of a file in a format that ASE reads or of an aselmdb database, or structures.
        name: The argument's name, for errors.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read or holds no structure.
    """
    if not isinstance(source, str | Path):
        frames = list(source)
    elif not Path(source).is_file():
        raise FileNotFoundError(f"{name}={str(source)!r} is not a file: give the path of an extxyz file.")
    else:
        try:
            frames = _database(source) if str(source).endswith(".aselmdb") else list(ase.io.iread(source, index=":"))
        except Exception as error:  # ASE's readers raise whatever their parsing trips over
            raise ValueError(
                f"{name}={str(source)!r} cannot be read ({type(error).__name__}: {error}): give a complete extxyz file."
            ) from error
    if not frames:
        raise ValueError(f"{name}={source!r} holds no structure: give at least one.")
    return frames


def _database(path: str | Path) -> list[Atoms]:
    """All rows of fairchem's kind of ASE database, with what it keeps beside the structure in ``atoms.info``."""
    frames = []
    with ase.db.connect(str(path), type="aselmdb", readonly=True, use_lock_file=False) as database:
        for row in database.select():
            atoms = row.toatoms()
            atoms.info.update(row.data)
            frames.append(atoms)
    return frames


def read_labelled(
    source: Frames, name: str, energy_key: str = ENERGY_KEY, forces_key: str = FORCES_KEY, *, least: int = 1
) -> list[Atoms]:
    """Copies of structures, with energies and forces under :data:`ENERGY_KEY` and :data:`FORCES_KEY`.

    Args:
        source: As for :func:`read_frames`.
        name: The argument's name, for errors.
        energy_key: Key of the total energy in eV, in ``atoms.info``; ``energy`` reads ASE's own.
        forces_key: Key of the forces in eV/Å, in ``atoms.arrays``; ``forces`` reads ASE's own.
        least: Fewest frames that will do.

    Raises:
        ValueError: If there are fewer frames, or one lacks an energy or forces, or they are not finite.
    """
    frames = read_frames(source, name)
    if len(frames) < least:
        raise ValueError(f"{name} holds {len(frames)} frame(s): give at least {least}.")
    labelled = []
    for index, frame in enumerate(frames):
        results = {} if frame.calc is None else frame.calc.results
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
                f"{arrays or 'nothing'}. Name the keys that hold eV and eV/Å, or label the frames."
            )
        if not (np.isfinite(energy) and np.isfinite(forces).all()):
            raise ValueError(f"{name}[{index}] has a non-finite energy or force: remove that frame.")
        copy = frame.copy()  # without its calculator, which stays the caller's
        copy.info[ENERGY_KEY], copy.arrays[FORCES_KEY] = float(energy), np.array(forces, dtype=float)
        labelled.append(copy)
    return labelled
