"""Observables, detector and samples for a system, where the user does not choose them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from stable_plugin.config import Local, SystemConfig
from stable_plugin.detectors import AnyOf, BondDeviation, Detector, IntermolecularContact, RunawayTemperature
from stable_plugin.md.neighborhoods import Molecules, Neighborhoods
from stable_plugin.md.system import System, optional
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

CONTACT_FRACTION = 2.0 / 3.0
"""Molecules have collided when they are closer than this fraction of the shortest contact in the reference."""

SHELLS_A = 5.0
"""Upper end in Å of radial distributions of molecules: the first shells; small models do not see further."""


@dataclass(frozen=True)
class Choices:
    """What a system is trained with, bound to it.

    Attributes:
        observables: Observables to reproduce.
        detector: Detector of unstable replicas.
        local: Samples of the local estimator; None for whole frames.
    """

    observables: list[Observable]
    detector: Detector
    local: Neighborhoods | None


def choose(config: SystemConfig, system: System, reference: Tensor, cell: Tensor | None = None) -> Choices:
    """Return observables, detector and samples for a system: those of the settings, and defaults where they name none.

    Args:
        config: The settings.
        system: The system that is simulated.
        reference: Reference frames, (n_frames, n_atoms, 3) in Å.
        cell: Cells of these frames, (n_frames, 3, 3) in Å; that of the system if None.

    Raises:
        ValueError: If the settings and the system do not fit together, or a reference frame itself is unstable.
    """
    observables = default_observables(system) if config.observables is None else _listed(config.observables)
    detector = config.detector or default_detector(system, reference, config.integrator.temperature_K, cell)
    detector.bind(system, reference, *optional(cell))
    detector.check_reference(reference, "reference", *optional(cell))
    for observable in observables:
        observable.bind(system, reference, *optional(cell))
    return Choices(observables, detector, default_local(config.local, system, observables))


def has_several_molecules(system: System) -> bool:
    """Return whether the system consists of more than one molecule."""
    return not system.is_extended and len(system.bonds) > 0 and int(system.molecules.max()) > 0


def default_observables(system: System) -> list[Observable]:
    """Return the observables for a system.

    Lengths and amplitudes of bonds; bonds and contacts by molecule where there are several; radial distributions in what
    fills its cell.
    """
    if has_several_molecules(system):
        by_molecule = [LocalBondLengths(), LocalBondAmplitudes(), LocalContacts(), LocalContactAmplitudes()]
        return [*by_molecule, *(_radial_distributions(system) if all(system.pbc) else [])]
    if system.is_extended and all(system.pbc):
        return list(_radial_distributions(system))
    return [BondLengths(), BondAmplitudes()]


def default_detector(system: System, reference: Tensor, temperature_K: float, cell: Tensor | None = None) -> Detector:
    """Return the detector for a system: bonds, and collisions of molecules; in a crystal without molecules the temperature.

    Args:
        system: The system that is simulated.
        reference: Reference frames, (n_frames, n_atoms, 3) in Å.
        temperature_K: Temperature of the simulation in K.
        cell: Cells of the reference frames, (n_frames, 3, 3) in Å; that of the system if None.
    """
    if system.is_extended:
        return RunawayTemperature(2.0 * temperature_K)
    if not has_several_molecules(system):
        return BondDeviation()
    contact = IntermolecularContact()
    contact.bind(system, reference, cell)
    shortest = -contact.measure(reference, torch.zeros_like(reference), cell).max().item()
    distance = round(CONTACT_FRACTION * shortest, 2)
    return AnyOf([BondDeviation(), IntermolecularContact(distance, min(0.3, distance))])


def default_local(local: Local, system: System, observables: Sequence[Observable]) -> Neighborhoods | None:
    """Return the samples of the local estimator: molecules if there are several and an observable is local.

    Args:
        local: Value of the setting.
        system: The system that is simulated.
        observables: Observables to reproduce.
    """
    if local is None or isinstance(local, Neighborhoods):
        return local
    by_site = any(isinstance(observable, LocalObservable) for observable in observables)
    return Molecules() if by_site and has_several_molecules(system) else None


def _radial_distributions(system: System) -> list[RadialDistribution]:
    """Return one per pair of elements; a bonded pair's is intermolecular, because its bond peak would dominate the rest."""
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


def _listed(observables: Observable | Sequence[Observable]) -> list[Observable]:
    return [observables] if isinstance(observables, Observable) else list(observables)
