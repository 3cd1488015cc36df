"""What is watched and what should be reproduced, where the user does not say."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement
from typing import Literal

import torch
from torch import Tensor

from stable_plugin.detectors import AnyOf, BondDeviation, Detector, IntermolecularContact, RunawayTemperature
from stable_plugin.md.neighborhoods import Molecules, Neighborhoods
from stable_plugin.md.system import System
from stable_plugin.observables import (
    BondAmplitudes,
    BondLengths,
    LocalBondAmplitudes,
    LocalBondLengths,
    LocalContactAmplitudes,
    LocalContacts,
    LocalObservable,
    Observable,
    RadialDistribution,
)

Local = Neighborhoods | Literal["auto"] | None

CLOSEST_SHARE = 2.0 / 3.0
"""Molecules this much closer than they ever come in the reference have collided."""


SHELLS_A = 5.0
"""Radial distributions of molecules are trained up to here: the first shells, beyond which small models do not see."""


def several_molecules(system: System) -> bool:
    """Whether the system consists of more than one molecule."""
    return not system.is_extended and len(system.bonds) > 0 and int(system.molecules.max()) > 0


def default_observables(system: System) -> list[Observable]:
    """Bonds; bonds and contacts by molecule where there are several; radial distributions in what fills its cell."""
    if several_molecules(system):
        by_molecule = [LocalBondLengths(), LocalBondAmplitudes(), LocalContacts(), LocalContactAmplitudes()]
        return [*by_molecule, *(_radial_distributions(system) if all(system.pbc) else [])]
    if system.is_extended and all(system.pbc):
        return list(_radial_distributions(system))
    return [BondLengths(), BondAmplitudes()]


def _radial_distributions(system: System) -> list[RadialDistribution]:
    """Of all pairs of elements; within molecules only where no bond joins the two, whose peak would drown the others."""
    bonded = (
        set() if system.is_extended else {frozenset(system.symbols[i] for i in pair) for pair in system.bonds.tolist()}
    )
    pairs = combinations_with_replacement(sorted(set(system.symbols)), 2)
    r_max = None if system.is_extended else min(SHELLS_A, system.minimum_image_cutoff)
    return [
        RadialDistribution(pair, r_max=r_max, intramolecular=frozenset(pair) not in bonded)
        for pair in pairs
        if pair[0] != pair[1] or system.symbols.count(pair[0]) > 1
    ]


def default_detector(system: System, reference: Tensor, temperature_K: float) -> Detector:
    """Bonds, and molecules that collide; in a crystal without molecules the temperature."""
    if system.is_extended:
        return RunawayTemperature(2.0 * temperature_K)
    if not several_molecules(system):
        return BondDeviation()
    contact = IntermolecularContact()
    contact.bind(system, reference)
    closest = -contact.measure(reference, torch.zeros_like(reference)).max().item()
    distance = round(CLOSEST_SHARE * closest, 2)
    return AnyOf([BondDeviation(), IntermolecularContact(distance, min(0.3, distance))])


def chosen_local(local: Local, system: System, observables: Sequence[Observable]) -> Neighborhoods | None:
    """What the local estimator takes as a sample: molecules if there are several and an observable is local.

    Raises:
        ValueError: If ``local`` is none of those.
    """
    if local is None or isinstance(local, Neighborhoods):
        return local
    if local != "auto":
        raise ValueError(
            f"local={local!r} is no kind of neighbourhood: give Molecules(), NearestMolecules(n), AtomsWithin(radius_A), "
            "None or 'auto'."
        )
    by_site = any(isinstance(observable, LocalObservable) for observable in observables)
    return Molecules() if by_site and several_molecules(system) else None
