"""Frames of several systems in one data set: by composition, charge, spin, head and fixed atoms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real

from ase import Atoms

from stable_plugin.md.constraints import resting_atoms

Composition = tuple[tuple[int, ...], tuple[bool, ...]]
"""Atomic numbers in their order, and the periodic directions."""

Label = int | str | None


@dataclass(frozen=True)
class Kind:
    """What frames of one system have in common.

    Attributes:
        composition: Atomic numbers in their order, and the periodic directions.
        labels: Charge, spin and head; None for those that are not stated, and for numbers that are not whole.
        fixed: Indices of the atoms that are held in place.
    """

    composition: Composition
    labels: tuple[Label, ...]
    fixed: tuple[int, ...]

    @classmethod
    def of(cls, atoms: Atoms) -> Kind:
        """Return the kind of one structure."""
        return cls(
            (tuple(atoms.numbers.tolist()), tuple(atoms.pbc.tolist())),
            (_number(atoms.info.get("charge")), _number(atoms.info.get("spin")), _name(atoms.info.get("head"))),
            resting_atoms(atoms),
        )

    def agrees(self, other: Kind) -> bool:
        """Return whether labels and fixed atoms that both kinds state are the same; no fixed atoms state nothing."""
        pairs = zip((*self.labels, self.fixed or None), (*other.labels, other.fixed or None), strict=True)
        return all(None in pair or pair[0] == pair[1] for pair in pairs)


def split_by_composition(frames: Sequence[Atoms]) -> dict[str, list[Atoms]]:
    """Return the frames of each system by its name, the most frequent one first.

    Frames of one system have the same atoms in the same order, periodic directions, charge, spin, head and fixed atoms. A
    system is named by its formula and by what tells it from others of this formula: ``C9H8O4_charge-1``, ``OPt36_fixed18``.
    Systems that still have one name, as with another order of the atoms, are numbered: ``C2H6O``, ``C2H6O_2``.

    A label that some frames of a composition state and others do not, or a charge that is not a whole number, is a mistake, not
    a difference of systems: these frames stay together, and building their system raises the error.

    Args:
        frames: ASE structures.
    """
    groups = sorted(_by_kind(frames).items(), key=lambda item: len(item[1]), reverse=True)
    same_formula: dict[str, list[Kind]] = {}
    for kind, group in groups:
        same_formula.setdefault(group[0].get_chemical_formula(), []).append(kind)
    stems = {kind: formula + _suffix(kind, kinds) for formula, kinds in same_formula.items() for kind in kinds}
    named: dict[str, list[Atoms]] = {}
    for kind, group in groups:
        name, number = stems[kind], 1
        while name in named:
            number += 1
            name = f"{stems[kind]}_{number}"
        named[name] = group
    return named


def group_by_system(frames: Sequence[Atoms]) -> list[list[Atoms]]:
    """Return the frames in groups that one system describes: of one composition, head, charge, spin and isotopes.

    Args:
        frames: ASE structures.
    """
    groups = []
    for group in split_by_composition(frames).values():
        for stated in dict.fromkeys(map(_stated, group)):
            groups.append([frame for frame in group if _stated(frame) == stated])
    return groups


def frames_by_name(named: Mapping[str, Sequence[Atoms]], frames: Sequence[Atoms]) -> dict[str, list[Atoms]]:
    """Return further frames of systems that have names already; those of other systems are left out.

    Where none are of exactly the same kind, those are taken that contradict nothing, such as frames without a constraint.

    Args:
        named: Frames of each system by its name, from :func:`split_by_composition`.
        frames: ASE structures.
    """
    available: dict[Composition, dict[Kind, list[Atoms]]] = {}
    for kind, group in _by_kind(frames).items():
        available.setdefault(kind.composition, {})[kind] = group
    found: dict[str, list[Atoms]] = {}
    for name, own_frames in named.items():
        (kind,) = _by_kind(own_frames)
        candidates = available.get(kind.composition, {})
        agreeing = [frame for other, each in candidates.items() if kind.agrees(other) for frame in each]
        own = candidates.get(kind, agreeing)
        if own:
            found[name] = own
    return found


def _by_kind(frames: Sequence[Atoms]) -> dict[Kind, list[Atoms]]:
    """Return frames by their kind; a label that only some frames of a composition state is None for all of them."""
    kinds = [Kind.of(frame) for frame in frames]
    missing: dict[Composition, set[int]] = {}
    for kind in kinds:
        missing.setdefault(kind.composition, set()).update(
            number for number, label in enumerate(kind.labels) if label is None
        )
    groups: dict[Kind, list[Atoms]] = {}
    for kind, frame in zip(kinds, frames, strict=True):
        left_out = missing[kind.composition]
        labels = tuple(None if number in left_out else label for number, label in enumerate(kind.labels))
        groups.setdefault(replace(kind, labels=labels), []).append(frame)
    return groups


def _stated(frame: Atoms) -> tuple[object, ...]:
    """Return what frames of one system have to have in common beside the composition."""
    return *(frame.info.get(label) for label in ("head", "charge", "spin")), tuple(frame.get_masses().round(3))


def _suffix(kind: Kind, kinds: Sequence[Kind]) -> str:
    """Return what tells a kind from others of the same formula, as ``_charge-1_fixed18``."""
    stated = zip(("charge", "spin", ""), kind.labels, *(each.labels for each in kinds), strict=True)
    labels = [f"_{word}{own}" for word, own, *values in stated if own is not None and len(set(values)) > 1]
    fixed = f"_fixed{len(kind.fixed)}" if len({each.fixed for each in kinds}) > 1 else ""
    return "".join(labels) + fixed


def _number(value: object) -> int | None:
    return int(number) if isinstance(value, Real) and (number := float(value)).is_integer() else None


def _name(value: object) -> str | None:
    return None if value is None else str(value)
