"""Reading structures and their labels from files."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ase.db
import ase.io
import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from stable_plugin.md.system import check_geometry

ENERGY_KEY = "REF_energy"
FORCES_KEY = "REF_forces"

READ_ALL = """
import sys, zlib, lmdb
with lmdb.open(sys.argv[1], subdir=False, readonly=True, lock=False) as database, database.begin() as reading:
    left = 10 + database.stat()["entries"]
    for key, value in reading.cursor():
        zlib.crc32(value)
        left -= 1
        assert left > 0, "its entries go round in a circle"
"""
"""A program that touches every byte of a database."""

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
        kind = "database" if str(source).endswith(".aselmdb") else "extxyz file"
        try:
            _refuse_half_a_line(source)
            frames = _database(source) if str(source).endswith(".aselmdb") else list(ase.io.iread(source, index=":"))
        except Exception as error:  # ASE's readers raise whatever their parsing trips over
            raise ValueError(
                f"{name}={str(source)!r} cannot be read ({type(error).__name__}: {error}): give a complete {kind}."
            ) from error
    if not frames:
        raise ValueError(f"{name}={str(source)!r} holds no structure: give at least one.")
    return frames


def _refuse_half_a_line(path: str | Path) -> None:
    """Refuse text that ends within a line: half a number reads as a number.

    Raises:
        ValueError: If there is no newline at the end of an xyz file.
    """
    if Path(path).suffix not in (".xyz", ".extxyz") or Path(path).stat().st_size == 0:
        return
    with Path(path).open("rb") as file:
        file.seek(-1, os.SEEK_END)
        if file.read() != b"\n":
            raise ValueError("its last line has no end, so it may be cut off; add a newline if it is whole")


def _database(path: str | Path) -> list[Atoms]:
    """All rows of fairchem's kind of ASE database, with what it keeps beside the structure in ``atoms.info``."""
    frames = []
    _refuse_damaged(path)
    with ase.db.connect(str(path), type="aselmdb", readonly=True, use_lock_file=False) as database:
        for row in database.select():
            atoms = row.toatoms()
            atoms.info.update(row.data)
            frames.append(atoms)
    return frames


def _refuse_damaged(path: str | Path) -> None:
    """Have another process read a database first.

    LMDB follows the page numbers in a file as they are. Where they are wrong nothing is raised: the process is killed.

    Raises:
        ValueError: If the other process did not get to its end.
    """
    done = subprocess.run(
        [sys.executable, "-I", "-c", READ_ALL, str(path)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()
        raise ValueError(
            f"the database is cut off or damaged: {reason[-1] if reason else 'its pages do not fit together'}"
        )


def read_labeled(
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
        ValueError: If there are fewer frames, one lacks an energy or forces, they are not finite, or it is no structure.
    """
    frames = read_frames(source, name)
    if len(frames) < least:
        raise ValueError(f"{name} holds {len(frames)} frame(s): give at least {least}.")
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
                f"{arrays or 'nothing'}. Name the keys that hold eV and eV/Å, or label the frames."
            )
        energy, forces = (
            _numbers(energy, (), f"{name}[{index}] energy_key={energy_key!r}"),
            _numbers(forces, (len(frame), 3), f"{name}[{index}] forces_key={forces_key!r}"),
        )
        if not (np.isfinite(energy) and np.isfinite(forces).all()):
            raise ValueError(f"{name}[{index}] has a non-finite energy or force: remove that frame.")
        check_geometry(frame, f"{name}[{index}]")
        copy = frame.copy()  # without its calculator, which stays the caller's
        copy.info[ENERGY_KEY], copy.arrays[FORCES_KEY] = float(energy), np.array(forces, dtype=float)
        labeled.append(copy)
    return labeled


def _numbers(value: Any, shape: tuple[int, ...], where: str) -> NDArray[np.float64]:
    try:
        numbers = np.asarray(value, dtype=float)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} holds {value!r}: give numbers.") from error
    if numbers.shape != shape:
        raise ValueError(f"{where} holds numbers of shape {numbers.shape}: give {shape or 'a single one'}.")
    return numbers
