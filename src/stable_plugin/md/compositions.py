"""Frames of several systems in one data set, by composition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ase import Atoms

Composition = tuple[tuple[int, ...], tuple[bool, ...]]
"""Atomic numbers in their order, and the periodic directions."""


def composition_of(atoms: Atoms) -> Composition:
    """Return what frames of one system have in common: atomic numbers in their order, and the periodic directions.

    Args:
        atoms: An ASE structure.
    """
    return tuple(atoms.numbers.tolist()), tuple(atoms.pbc.tolist())


def split_by_composition(frames: Sequence[Atoms]) -> dict[str, list[Atoms]]:
    """Return the frames of each composition by its name, the most frequent composition first.

    A composition is named by its formula; those with the same formula, in another order of atoms or with other periodic
    directions, are numbered: ``C2H6O``, ``C2H6O_2``.

    Args:
        frames: ASE structures.
    """
    groups: dict[Composition, list[Atoms]] = {}
    for frame in frames:
        groups.setdefault(composition_of(frame), []).append(frame)
    named: dict[str, list[Atoms]] = {}
    for group in sorted(groups.values(), key=len, reverse=True):
        formula = name = group[0].get_chemical_formula()
        number = 1
        while name in named:
            number += 1
            name = f"{formula}_{number}"
        named[name] = group
    return named


def frames_by_name(named: Mapping[str, Sequence[Atoms]], frames: Sequence[Atoms]) -> dict[str, list[Atoms]]:
    """Return further frames of compositions that have names already; those of other compositions are left out.

    Args:
        named: Frames of each composition by its name, from :func:`split_by_composition`.
        frames: ASE structures.
    """
    names = {composition_of(group[0]): name for name, group in named.items()}
    found: dict[str, list[Atoms]] = {}
    for frame in frames:
        name = names.get(composition_of(frame))
        if name is not None:
            found.setdefault(name, []).append(frame)
    return found
