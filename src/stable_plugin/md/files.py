"""Readers of files of structures, by format."""

from __future__ import annotations

import glob
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ase.db
import ase.io
import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.units import kcal, mol

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

REFUSED = {
    ".h5": "HDF5 holds the preprocessed graphs of MACE or other packages",
    ".hdf5": "HDF5 holds the preprocessed graphs of MACE or other packages",
    ".lmdb": "LMDB holds pickled graphs of old versions of fairchem",
    ".pt": "torch files hold graphs or models, not structures",
    ".pth": "torch files hold graphs or models, not structures",
    ".model": "this is a model of MACE, not structures",
    ".pkl": "pickles run code when they are read",
}
"""Why formats are not read, by suffix."""

PYMATGEN_HEAD = 100_000
"""Characters at the beginning of a JSON file in which a structure of pymatgen is looked for."""

NPZ_UNITS = {"kcal/mol": kcal / mol, "ev": 1.0}
"""Energy units of npz files in eV."""


def expand(source: str, name: str) -> list[tuple[str, str | None]]:
    """Return the files that a path, a pattern or a folder stands for, each with the index of its frames.

    Args:
        source: Path of a file, with ``@index`` behind it in ASE's syntax to take some of its frames; a pattern such as
            ``data/*.extxyz``; or a folder of ``.aselmdb`` files, as fairchem has them.
        name: Name of the argument in errors.

    Returns:
        Paths in alphabetical order, with the index or None.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a folder contains no aselmdb file.
    """
    path = os.path.expanduser(source)
    if Path(path).is_dir():
        files = sorted(str(each) for each in Path(path).glob("*.aselmdb"))
        if not files:
            raise ValueError(
                f"{name}={source!r} is a folder without .aselmdb files: pass a file, a pattern such as "
                f"'{source.rstrip('/')}/*.extxyz', or a list of files."
            )
        return [(each, None) for each in files]
    base, _, index = path.rpartition("@")
    if base and not Path(path).is_file():
        path, selected = base, index
    else:
        selected = None
    found = [path] if Path(path).is_file() else sorted(glob.glob(path, recursive=True))
    if not found:
        raise FileNotFoundError(
            f"{name}={source!r} is not a file: pass the path of an extxyz file, a pattern such as 'data/*.extxyz', or a "
            "folder of .aselmdb files."
        )
    return [(each, selected) for each in found]


def read_file(path: str, index: str | None, name: str) -> list[Atoms]:
    """Return the structures of one file.

    Args:
        path: A file in a format that ASE reads, an aselmdb database, or an npz file of MD17, rMD17 or MD22.
        index: Which of its frames, in ASE's syntax, such as ``0:100`` or ``::10``; all if None.
        name: Name of the argument in errors.

    Raises:
        ValueError: If the file cannot be read.
    """
    suffix = Path(path).suffix.lower()
    if suffix in REFUSED:
        raise ValueError(
            f"{name}={path!r} is a {suffix} file, which is not read: {REFUSED[suffix]}. Pass the structures as extxyz, "
            "aselmdb, or another format of ASE."
        )
    kind = {".aselmdb": "database", ".npz": "npz file"}.get(suffix, "file in a format that ASE reads")
    kind = "extxyz file" if suffix in (".xyz", ".extxyz") else kind
    if suffix == ".json" and _is_pymatgen(path):
        raise ValueError(
            f"{name}={path!r} is a JSON file of pymatgen structures, which is not read: convert each with "
            "pymatgen.io.ase.AseAtomsAdaptor, set energies and forces, and write extxyz with ase.io.write."
        )
    try:
        _check_last_line(path)
        if suffix == ".aselmdb":
            frames = _database(path)
        elif suffix == ".npz":
            frames = _arrays(path)
        else:
            frames = list(ase.io.iread(path, index=":"))
    except Exception as error:  # ASE's readers raise many kinds of errors
        raise ValueError(
            f"{name}={path!r} cannot be read ({type(error).__name__}: {error}): pass a complete {kind}."
        ) from error
    return frames if index is None else _select(frames, index, f"{name}='{path}@{index}'")


def _is_pymatgen(path: str) -> bool:
    """Return whether a JSON file begins with what pymatgen writes, as data sets such as mlearn and MatPES hold it."""
    with Path(path).open(encoding="utf-8", errors="replace") as file:
        beginning = file.read(PYMATGEN_HEAD).lstrip()
    # ASE's own databases are dictionaries by the number of the row.
    return beginning.startswith(("[", '{"@module"')) and any(
        mark in beginning for mark in ('"lattice"', '"pymatgen', '"@module"')
    )


def _select(frames: list[Atoms], index: str, where: str) -> list[Atoms]:
    """Return the frames that an index such as ``3``, ``0:100`` or ``::10`` selects."""
    try:
        bounds = [int(part) if part else None for part in index.split(":")]
        chosen = frames[slice(*bounds)] if len(bounds) > 1 else [frames[bounds[0]]]  # type: ignore[index]
    except (ValueError, TypeError, IndexError) as error:
        raise ValueError(
            f"{where} selects no frame of the {len(frames)} in the file ({error}): use an index such as 0:100 or ::10."
        ) from error
    return chosen


def _arrays(path: str) -> list[Atoms]:
    """Return the frames of an npz file: rMD17 (in kcal/mol), or MD17 and MD22 in sGDML's format, which names its unit."""
    with np.load(path) as data:
        names = set(data.files)
        if names >= {"nuclear_charges", "coords", "energies", "forces"}:
            return _labeled_frames(data, ("nuclear_charges", "coords", "energies", "forces"), kcal / mol)
        if names >= {"z", "R", "E", "F"}:
            unit = str(data["e_unit"]).lower() if "e_unit" in names else "not stated"
            length = str(data["r_unit"]).lower() if "r_unit" in names else "ang"
            if unit not in NPZ_UNITS or not length.startswith("ang"):
                raise ValueError(
                    f"its units are e_unit={unit!r}, r_unit={length!r}; use an extxyz file in eV and Å, or set e_unit to "
                    f"one of {sorted(NPZ_UNITS)} and r_unit to 'Ang' in the file"
                )
            return _labeled_frames(data, ("z", "R", "E", "F"), NPZ_UNITS[unit])
        raise ValueError(
            f"its arrays are {sorted(names)}; use those of rMD17 (nuclear_charges, coords, energies, forces) or of MD17 "
            "and MD22 (z, R, E, F, e_unit)"
        )


def _labeled_frames(data: Mapping[str, Any], names: tuple[str, str, str, str], unit: float) -> list[Atoms]:
    numbers, positions, energies, forces = (np.asarray(data[name]) for name in names)
    frames = []
    for at, energy, force in zip(positions, energies.reshape(-1), forces, strict=True):
        atoms = Atoms(numbers=numbers, positions=at)
        atoms.calc = SinglePointCalculator(atoms, energy=float(energy) * unit, forces=force * unit)
        frames.append(atoms)
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
