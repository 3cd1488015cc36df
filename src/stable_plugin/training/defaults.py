"""What is watched and what should be reproduced, where the user does not say."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement
from typing import Literal

import torch
from torch import Tensor

from stable_plugin.detectors import AnyOf, BondDeviation, Detector, IntermolecularContact, RunawayTemperature
from stable_plugin.neighborhoods import Molecules, Neighborhoods
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
from stable_plugin.systems import System

Local = Neighborhoods | Literal["auto"] | None

CLOSEST_SHARE = 2.0 / 3.0
"""Molecules this much closer than they ever come in the reference have collided."""


def several_molecules(system: System) -> bool:
    """Whether the system consists of more than one molecule."""
    return not system.endless and len(system.bonds) > 0 and int(system.molecules.max()) > 0


def default_observables(system: System) -> list[Observable]:
    """Bonds; bonds and contacts by molecule where there are several; radial distributions in other crystals."""
    if several_molecules(system):
        return [LocalBondLengths(), LocalBondAmplitudes(), LocalContacts(), LocalContactAmplitudes()]
    if system.endless and all(system.pbc):
        return [RadialDistribution(pair) for pair in combinations_with_replacement(sorted(set(system.symbols)), 2)]
    return [BondLengths(), BondAmplitudes()]


def default_detector(system: System, reference: Tensor, temperature_K: float) -> Detector:
    """Bonds, and molecules that collide; in a crystal without molecules the temperature."""
    if system.endless:
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
