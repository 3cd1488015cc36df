"""Bonds of a system, and the parts that they connect, from its reference frames."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ase import Atoms
from ase.geometry import find_mic

from stable_plugin.md.chemistry import (
    BROKEN_FACTOR,
    NOBLE_GASES,
    NONMETALS,
    Links,
    bond_cutoffs,
    bonded_links,
    framework_of,
)

log = logging.getLogger(__name__)

MAX_ANALYZED_ATOMS = 100_000
"""Most atoms, in all frames together, whose bonds are searched for; evenly spaced frames are taken."""

MAX_BROKEN_FRACTION = 0.1
"""A bond is persistent if it is broken in at most this fraction of the frames."""

MAX_CHANGED = 2
"""Most bonds that a reaction changes in one frame of a small system."""

MAX_CHANGED_FRACTION = 0.05
"""Most bonds that reactions change in one frame of a large system, as a fraction."""

HALOGENS = (9, 17, 35, 53, 85)

MAX_LISTED = 10
"""Most frames listed in a message."""


@dataclass(frozen=True)
class Topology:
    """Bonds of molecules, and the atoms of extended frameworks.

    Attributes:
        bonds: Pairs of bonded atoms that are not in a framework, first index smaller, sorted.
        framework: Whether each atom belongs to an extended framework, (n_atoms,).
    """

    bonds: list[tuple[int, int]]
    framework: np.ndarray


@dataclass(frozen=True)
class Part:
    """A connected part of a system.

    Attributes:
        kind: ``"framework"`` (a crystal, metal or network), ``"molecule"``, ``"ion"`` or ``"atom"``.
        atoms: Its atoms, ascending.
    """

    kind: str
    atoms: tuple[int, ...]


def find_topology(frames: Sequence[Atoms], name: str = "reference") -> Topology:
    """Return the bonds that persist in nearly all frames, and the framework that most frames have.

    Args:
        frames: Frames of one system with its atoms in one order.
        name: Name of the frames in messages.

    Raises:
        ValueError: If the frames are of different molecules, or their atoms are in different orders.
    """
    chosen = np.unique(np.linspace(0, len(frames) - 1, _n_analyzed(frames)).round().astype(int))
    numbers = frames[0].numbers
    links = [bonded_links(frames[index]) for index in chosen]
    framework = np.mean([framework_of(each, numbers) for each in links], axis=0) >= 0.5
    found = [_pairs(each, framework) for each in links]
    count = Counter(pair for pairs in found for pair in pairs)
    usual = sorted(pair for pair, times in count.items() if times > 0.5 * len(chosen))
    table = np.array(usual, dtype=int).reshape(-1, 2)
    broken = _broken(frames, table)
    covalent = np.isin(numbers, NONMETALS)[table].all(axis=1)
    added = np.zeros(len(frames), dtype=int)
    added[chosen] = [_n_covalent(pairs - set(usual), numbers) for pairs in found]
    _check_frames(broken[:, covalent].sum(axis=1), added, int(covalent.sum()), name)
    # One failed frame of a short reference is for the detector to report.
    persistent = broken.sum(axis=0) <= max(1.0, MAX_BROKEN_FRACTION * len(frames))
    _log_changes(broken[:, covalent], persistent[covalent], added, name)
    return Topology([pair for pair, keep in zip(usual, persistent, strict=True) if keep], framework)


def checked_bonds(bonds: Sequence[tuple[int, int]], n_atoms: int) -> list[tuple[int, int]]:
    """Return the bonds sorted and unique, if all of them join two different atoms."""
    pairs = sorted({(min(pair), max(pair)) for pair in bonds})
    for i, j in pairs:
        if not 0 <= i < j < n_atoms:
            raise ValueError(f"bonds contains ({i}, {j}): pass pairs of different atoms from 0 to {n_atoms - 1}.")
    return pairs


def kind_of_atom(number: int) -> str:
    """Return the kind of an atom without bonds: metals and halogens are ions.

    Args:
        number: Atomic number.
    """
    is_ion = number in HALOGENS or number not in NONMETALS
    return "ion" if is_ion and number not in NOBLE_GASES else "atom"


def _n_analyzed(frames: Sequence[Atoms]) -> int:
    return min(len(frames), max(5, min(100, MAX_ANALYZED_ATOMS // len(frames[0]))))


def _pairs(links: Links, framework: np.ndarray) -> set[tuple[int, int]]:
    """Return the bonded pairs outside the framework, first index smaller."""
    kept = links.select(~framework[links.first] & ~framework[links.second] & (links.first != links.second))
    ends = np.sort(np.stack([kept.first, kept.second], axis=1), axis=1)
    return {(int(first), int(second)) for first, second in ends}


def _broken(frames: Sequence[Atoms], pairs: np.ndarray) -> np.ndarray:
    """Return which bonds are broken in each frame, (n_frames, n_bonds)."""
    if len(pairs) == 0:
        return np.zeros((len(frames), 0), dtype=bool)
    first, second = pairs.T
    longest = BROKEN_FACTOR * bond_cutoffs(frames[0].numbers[first], frames[0].numbers[second])
    rows = []
    for frame in frames:
        vectors = frame.positions[second] - frame.positions[first]
        lengths = find_mic(vectors, frame.cell, frame.pbc)[1] if frame.pbc.any() else np.linalg.norm(vectors, axis=1)
        rows.append(~(lengths <= longest))
    return np.stack(rows)


def _n_covalent(pairs: set[tuple[int, int]], numbers: np.ndarray) -> int:
    nonmetal = np.isin(numbers, NONMETALS)
    return sum(bool(nonmetal[i] and nonmetal[j]) for i, j in pairs)


def _check_frames(broken: np.ndarray, added: np.ndarray, n_bonds: int, name: str) -> None:
    """Raise an error if frames have other covalent bonds than the majority, more than reactions explain.

    Args:
        broken: Number of bonds that are broken in each frame, (n_frames,).
        added: Number of bonds that only this frame has, (n_frames,).
        n_bonds: Number of bonds that the majority has.
        name: Name of the frames.
    """
    different = np.flatnonzero(np.maximum(broken, added) > max(MAX_CHANGED, MAX_CHANGED_FRACTION * n_bonds)).tolist()
    if different:
        raise ValueError(
            f"{name} frames {_listed(different)} have other bonds than the rest: they broke apart, are another molecule, or "
            "have their atoms in another order. Remove those frames, or pass the bonds that hold in all frames with "
            "bonds=[(i, j), ...]."
        )


def _log_changes(broken: np.ndarray, persistent: np.ndarray, added: np.ndarray, name: str) -> None:
    """Log the frames whose covalent bonds are not those of the majority, and how many bonds do not persist."""
    frames = np.flatnonzero(broken.any(axis=1) | (added > 0)).tolist()
    if frames:
        log.warning(
            f"StABlE: {int(broken.any(axis=0).sum())} bond(s) are broken and {int(added.sum())} added in {name} frames "
            f"{_listed(frames)}, by a reaction, a failure, or because they are of another molecule; "
            f"{int((~persistent).sum())} bond(s) are broken in more than {MAX_BROKEN_FRACTION:.0%} of the frames and not "
            "watched. Remove those frames, or pass bonds=[(i, j), ...], if that is wrong."
        )


def _listed(frames: Sequence[int]) -> str:
    rest = len(frames) - MAX_LISTED
    return ", ".join(map(str, frames[:MAX_LISTED])) + (f" and {rest} more" if rest > 0 else "")
