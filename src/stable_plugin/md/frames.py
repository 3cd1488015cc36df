"""Structures that users pass: files, or ASE structures."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ase import Atoms

from stable_plugin.md.files import expand, read_file

log = logging.getLogger(__name__)

Frames = str | Path | Sequence[str | Path] | Sequence[Atoms]
"""Files that ASE reads, or structures: see :func:`read_frames`."""


TEMPERATURE_TOLERANCE = 0.05
"""Relative difference of temperatures that does not matter."""


def read_frames(source: Frames, name: str = "structures") -> list[Atoms]:
    """Return all structures of files, or of a sequence, without isolated atoms.

    Args:
        source: Structures; or a path, a pattern such as ``data/*.extxyz``, a folder of ``.aselmdb`` files, or a list of
            these. ``file@0:100`` takes some of the frames of a file. Formats are those of ASE, aselmdb, and the npz files
            of MD17, rMD17 and MD22.
        name: Name of the argument in errors.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a file cannot be read or contains no structure, or the source is neither.
    """
    source = str(source) if isinstance(source, Path) else source
    frames, isolated = split_isolated(read_all(source, name))
    if isolated:
        log.debug("%s: %d frames of isolated atoms are not simulated", name, len(isolated))
    if not frames:
        raise ValueError(f"{name}={source!r} contains no structure: pass at least one.")
    return frames


def read_all(source: Frames, name: str = "structures") -> list[Atoms]:
    """Return all structures, isolated atoms among them; arguments and errors as for :func:`read_frames`."""
    if isinstance(source, str | Path):
        return [atoms for path, index in expand(str(source), name) for atoms in read_file(path, index, name)]
    # A single structure can be iterated over too, and results in its atoms.
    items: list[Any] = list(source) if isinstance(source, Iterable) else [source]
    if items and all(isinstance(item, str | Path) for item in items):
        return [atoms for item in items for atoms in read_all(item, name)]
    if isinstance(source, Atoms) or not all(isinstance(item, Atoms) for item in items):
        raise ValueError(f"{name}={source!r} is not a list of structures: pass a list of ase.Atoms, or a path.")
    return items


def split_isolated(frames: Sequence[Atoms]) -> tuple[list[Atoms], list[Atoms]]:
    """Return structures and isolated atoms separately.

    Args:
        frames: Structures. As in MACE, an isolated atom is a frame of one atom with ``config_type=IsolatedAtom``.
    """
    isolated = [len(frame) == 1 and frame.info.get("config_type") == "IsolatedAtom" for frame in frames]
    return (
        [frame for frame, alone in zip(frames, isolated, strict=True) if not alone],
        [frame for frame, alone in zip(frames, isolated, strict=True) if alone],
    )


def warn_temperature(frames: Sequence[Atoms], temperature_K: float, name: str) -> None:
    """Warn of frames that state another temperature than that of the simulation.

    Args:
        frames: ASE structures; the temperature is ``atoms.info["temperature_K"]``.
        temperature_K: Temperature of the simulation in K.
        name: Name of the frames in the warning.
    """
    stated = {float(frame.info["temperature_K"]) for frame in frames if "temperature_K" in frame.info}
    other = sorted(each for each in stated if abs(each - temperature_K) > TEMPERATURE_TOLERANCE * temperature_K)
    if other:
        log.warning(
            "%s states temperature_K=%s, but the simulation runs at %g K: mean square amplitudes are proportional to the "
            "temperature, so targets from these frames are %.2g times those of the simulation. Pass frames of its temperature.",
            name,
            ", ".join(f"{each:g}" for each in other),
            temperature_K,
            other[-1] / temperature_K,
        )
