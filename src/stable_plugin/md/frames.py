"""Readers of structures and their labels."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import ase.db
import ase.io
import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from stable_plugin.md.geometry import check_geometry

ENERGY_KEY = "REF_energy"
FORCES_KEY = "REF_forces"

_READ_ALL = """
import sys, zlib, lmdb
with lmdb.open(sys.argv[1], subdir=False, readonly=True, lock=False) as database, database.begin() as reading:
    left = 10 + database.stat()["entries"]
    for key, value in reading.cursor():
        zlib.crc32(value)
        left -= 1
        assert left > 0, "its pages form a cycle"
"""
"""A program that reads every byte of a database."""

Frames = str | Path | Sequence[Atoms]
"""A file that ASE reads, or structures."""


def read_frames(source: Frames, name: str = "structures") -> list[Atoms]:
    """Return all structures of a file, or of a sequence.

    Args:
        source: Path of a file in a format that ASE reads or of an aselmdb database, or structures.
        name: Name of the argument in errors.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read or contains no structure, or the source is neither.
    """
    if isinstance(source, Path):
        source = str(source)
    if not isinstance(source, str):
        frames = _listed(source, name)
    elif not Path(source).is_file():
        raise FileNotFoundError(f"{name}={source!r} is not a file: pass the path of an extxyz file.")
    else:
        kind = "database" if source.endswith(".aselmdb") else "extxyz file"
        try:
            _check_last_line(source)
            frames = _database(source) if source.endswith(".aselmdb") else list(ase.io.iread(source, index=":"))
        except Exception as error:  # ASE's readers raise many kinds of errors
            raise ValueError(
                f"{name}={source!r} cannot be read ({type(error).__name__}: {error}): pass a complete {kind}."
            ) from error
    if not frames:
        raise ValueError(f"{name}={source!r} contains no structure: pass at least one.")
    return frames


def _listed(source: Any, name: str) -> list[Atoms]:
    # A single structure can be iterated over too, and results in its atoms.
    frames = list(source) if isinstance(source, Iterable) else [source]
    if isinstance(source, Atoms) or not all(isinstance(frame, Atoms) for frame in frames):
        raise ValueError(f"{name}={source!r} is not a list of structures: pass a list of ase.Atoms, or a path.")
    return frames


def _check_last_line(path: str | Path) -> None:
    """Raise an error if text ends within a line: the first digits of a number are a number too.

    Args:
        path: Path of the file.

    Raises:
        ValueError: If an xyz file does not end with a newline.
    """
    if Path(path).suffix not in (".xyz", ".extxyz") or Path(path).stat().st_size == 0:
        return
    with Path(path).open("rb") as file:
        file.seek(-1, os.SEEK_END)
        if file.read() != b"\n":
            raise ValueError(
                "its last line does not end with a newline, so it may be truncated; add a newline if it is complete"
            )


def _database(path: str | Path) -> list[Atoms]:
    """Return all rows of an aselmdb database, with the data of a row in ``atoms.info``, as fairchem stores it."""
    frames = []
    _check_database(path)
    with ase.db.connect(str(path), type="aselmdb", readonly=True, use_lock_file=False) as database:
        for row in database.select():
            atoms = row.toatoms()
            atoms.info.update(row.data)
            frames.append(atoms)
    return frames


def _check_database(path: str | Path) -> None:
    """Read a database in another process first.

    LMDB follows the page numbers in a file without checks. A wrong one kills the process instead of raising an error.

    Args:
        path: Path of the database.

    Raises:
        ValueError: If the other process failed.
    """
    done = subprocess.run(
        [sys.executable, "-I", "-c", _READ_ALL, str(path)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()
        raise ValueError(
            f"the database is truncated or damaged: {reason[-1] if reason else 'its pages are inconsistent'}"
        )


def read_labeled(
    source: Frames, name: str, energy_key: str = ENERGY_KEY, forces_key: str = FORCES_KEY, *, least: int = 1
) -> list[Atoms]:
    """Return copies of structures, with energies and forces under :data:`ENERGY_KEY` and :data:`FORCES_KEY`.

    Args:
        source: As for :func:`read_frames`.
        name: Name of the argument in errors.
        energy_key: Key of the total energy in eV, in ``atoms.info``; ``energy`` reads that of ASE's calculator.
        forces_key: Key of the forces in eV/Å, in ``atoms.arrays``; ``forces`` reads those of ASE's calculator.
        least: Minimum number of frames.

    Raises:
        ValueError: If there are fewer frames, an energy or forces are missing or not finite, or
            :func:`~stable_plugin.md.geometry.check_geometry` rejects a structure.
    """
    frames = read_frames(source, name)
    if len(frames) < least:
        raise ValueError(f"{name} contains {len(frames)} frame(s): pass at least {least}.")
    labeled = []
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
        labeled.append(copy)
    return labeled


def _numbers(value: Any, shape: tuple[int, ...], where: str) -> NDArray[np.float64]:
    """Return ``value`` as an array, if it has this shape."""
    try:
        numbers = np.asarray(value, dtype=float)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} holds {value!r}: set numbers.") from error
    if numbers.shape != shape:
        raise ValueError(f"{where} has the shape {numbers.shape}: set numbers of shape {shape or '() (a scalar)'}.")
    return numbers
