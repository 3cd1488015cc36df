"""Observables, detector and samples for a system, where the user does not choose them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from math import sqrt

import torch
from ase.data import covalent_radii
from torch import Tensor

from stable_plugin.config import Local, SystemConfig
from stable_plugin.detectors import AnyOf, BondDeviation, Detector, IntermolecularContact, RunawayTemperature
from stable_plugin.md.cells import optional
from stable_plugin.md.neighborhoods import Molecules, Neighborhoods
from stable_plugin.md.system import System
from stable_plugin.observables import (
    AngleDistribution,
    BondAmplitudes,
    BondLengths,
    DistanceDistribution,
    LocalBondAmplitudes,
    LocalBondLengths,
    LocalContactAmplitudes,
    LocalContacts,
    LocalObservable,
    Observable,
    RadialDistribution,
)

log = logging.getLogger(__name__)

TRAINING_DEVIATION_A = BondDeviation().threshold
"""Deviation of a bond from its mean length in Å that is unstable in training."""

HOT_FACTOR = 1.1
"""Threshold of bonds relative to their largest deviation in a hot reference."""

EVALUATION_DEVIATION_A = 0.5
"""Deviation of a bond from its mean length in Å that counts as a failure in an evaluation, as published."""

BROKEN_DEVIATION_A = 0.6
"""Deviation of a bond in Å that only a broken one has, in a reference of any temperature."""

N_DEVIATIONS = 6.0
"""Standard deviations of the kinetic temperature that a stable system does not exceed."""

CONTACT_FRACTION = 2.0 / 3.0
"""Molecules have collided when they are closer than this fraction of the shortest contact in the reference."""

MAX_CONTACT_A = 1.5
"""Largest collision distance in Å: molecules that are far apart in the reference may approach each other. Free
atoms and ions have collided within the sum of their covalent radii."""

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


def has_molecules(system: System) -> bool:
    """Return whether the system has molecules with bonds, and not only a framework, ions or free atoms."""
    return len(system.bonds) > 0


def default_observables(system: System) -> list[Observable]:
    """Return the observables for a system.

    Lengths and amplitudes of the bonds of molecules; bonds and contacts by molecule where there are several; radial
    distributions in what fills its cell; all distances where nothing else is defined.

    Args:
        system: The system that is simulated.
    """
    radial = _radial_distributions(system) if all(system.pbc) else []
    if has_several_molecules(system):
        return [LocalBondLengths(), LocalBondAmplitudes(), LocalContacts(), LocalContactAmplitudes(), *radial]
    if not has_molecules(system):
        return list(radial) or [_distances(system)]
    return [BondLengths(), BondAmplitudes(), *(radial if system.is_extended else [])]


def evaluated_observables(system: System) -> list[Observable]:
    """Return the observables to look at in an evaluation: more than are trained on.

    Args:
        system: The system that is simulated.
    """
    angles: list[Observable] = [AngleDistribution()] if len(system.angles) > 0 else []
    if system.periodic or not has_molecules(system):
        return [*default_observables(system), *angles]
    return [BondLengths(), _distances(system), *angles]


def default_detector(
    system: System,
    reference: Tensor,
    temperature_K: float,
    cell: Tensor | None = None,
    bond_deviation_A: float = TRAINING_DEVIATION_A,
) -> Detector:
    """Return the detector for a system, by the kinds of its parts.

    Molecules are watched by their bonds; molecules, ions and free atoms by their contacts with all other parts; frameworks,
    and systems without molecules, by the temperature.

    Args:
        system: The system that is simulated.
        reference: Reference frames, (n_frames, n_atoms, 3) in Å.
        temperature_K: Temperature of the simulation in K.
        cell: Cells of the reference frames, (n_frames, 3, 3) in Å; that of the system if None.
        bond_deviation_A: Deviation of a bond from its mean length in Å that is unstable.
    """
    detectors: list[Detector] = []
    if has_molecules(system):
        detectors.append(_bond_detector(system, reference, cell, bond_deviation_A))
    if int(system.molecules.max()) > 0:
        detectors.append(_contact_detector(system, reference, cell))
    if system.is_extended or not has_molecules(system):
        detectors.append(RunawayTemperature(runaway_temperature(system.n_moving, temperature_K)))
    return detectors[0] if len(detectors) == 1 else AnyOf(detectors)


def runaway_temperature(n_moving: int, temperature_K: float) -> float:
    """Return a kinetic temperature in K that a stable system does not reach.

    Twice the temperature, and in a small system six standard deviations of the canonical ensemble above it.

    Args:
        n_moving: Number of atoms that are not fixed.
        temperature_K: Temperature of the simulation in K.
    """
    return temperature_K * max(2.0, 1.0 + N_DEVIATIONS * sqrt(2.0 / (3.0 * n_moving)))


def _bond_detector(system: System, reference: Tensor, cell: Tensor | None, deviation_A: float) -> BondDeviation:
    """Return a detector of bonds that tolerates what the bonds of a hot reference do, unless one of them is broken."""
    detector = BondDeviation(deviation_A)
    detector.bind(system, reference, *optional(cell))
    largest = detector.measure(reference, torch.zeros_like(reference), *optional(cell)).max().item()
    if not deviation_A < largest < BROKEN_DEVIATION_A:
        return detector
    tolerant = BondDeviation(round(HOT_FACTOR * largest, 2))
    log.warning(
        f"StABlE: bonds of the reference deviate by up to {largest:.2f} Å from their mean lengths, more than "
        f"{deviation_A:g} Å: a bond is unstable from {tolerant.threshold:g} Å. Pass detector=BondDeviation(...) to set it."
    )
    return tolerant


def _contact_detector(system: System, reference: Tensor, cell: Tensor | None) -> IntermolecularContact:
    """Return a detector of collisions, from the shortest contact in the reference."""
    contact = IntermolecularContact()
    contact.bind(system, reference, *optional(cell))
    shortest = -contact.measure(reference, torch.zeros_like(reference), *optional(cell)).max().item()
    largest = MAX_CONTACT_A
    if not has_molecules(system) and not system.is_extended:
        largest = max(largest, 2.0 * float(covalent_radii[system.numbers.cpu().numpy()].max()))
    distance = round(min(CONTACT_FRACTION * shortest, largest), 2)
    return IntermolecularContact(distance, min(0.3, distance))


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
    bonded = {frozenset(system.symbols[i] for i in pair) for pair in system.bonds.tolist()}
    r_max = min(SHELLS_A, system.minimum_image_cutoff) if has_several_molecules(system) else None
    return [
        RadialDistribution(pair, r_max=r_max, intramolecular=frozenset(pair) not in bonded)
        for pair in combinations_with_replacement(sorted(set(system.symbols)), 2)
        if _has_pair(system, pair, frozenset(pair) not in bonded)
    ]


def _has_pair(system: System, pair: tuple[str, str], intramolecular: bool) -> bool:
    """Return whether two atoms of these elements exist, of different molecules unless ``intramolecular``."""
    labels = system.molecules.tolist()
    one, other = (
        [label for label, symbol in zip(labels, system.symbols, strict=True) if symbol == end] for end in pair
    )
    if intramolecular:
        return pair[0] != pair[1] or len(one) > 1
    return len({*one, *other}) > 1


def _distances(system: System) -> DistanceDistribution:
    return DistanceDistribution(r_max=min(DistanceDistribution().r_max, system.minimum_image_cutoff))


def _listed(observables: Observable | Sequence[Observable]) -> list[Observable]:
    return [observables] if isinstance(observables, Observable) else list(observables)
