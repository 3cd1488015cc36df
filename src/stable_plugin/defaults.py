"""Observables, detector and samples for a system, where the user does not choose them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np
import torch
from ase.neighborlist import neighbor_list
from torch import Tensor

from stable_plugin.config import Local, SystemConfig
from stable_plugin.detectors import (
    AngleLimits,
    AnyOf,
    BondLimits,
    ChiralityLimits,
    ContactLimits,
    Detector,
    LindemannCriterion,
    MomentumLimits,
    PlaneLimits,
    Published,
    RingLimits,
    TemperatureLimits,
    VolumeDeviation,
    published_detector,
)
from stable_plugin.md.cells import optional
from stable_plugin.md.integrators import Integrator
from stable_plugin.md.neighborhoods import Molecules, Neighborhoods
from stable_plugin.md.system import System
from stable_plugin.observables import (
    AngleDistribution,
    BondAmplitudes,
    BondLengths,
    Density,
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

LINDEMANN_RATIO = 0.15
"""Root mean square displacement of the atoms of a molten crystal, over the distance of nearest neighbors."""

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
    if config.integrator.barostat is not None:
        config.integrator.barostat.check(system)
    detector = find_detector(config.detector, system, reference, config.integrator, cell, training=True)
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


def evaluated_observables(system: System, integrator: Integrator) -> list[Observable]:
    """Return the observables to look at in an evaluation: more than are trained on.

    Args:
        system: The system that is simulated.
        integrator: Integrator of the simulation.
    """
    angles: list[Observable] = [AngleDistribution()] if len(system.angles) > 0 else []
    density = [] if integrator.barostat is None else [Density()]
    if system.periodic or not has_molecules(system):
        return [*default_observables(system), *angles, *density]
    return [BondLengths(), _distances(system), *angles]


def find_detector(
    detector: Detector | Published | None,
    system: System,
    reference: Tensor,
    integrator: Integrator,
    cell: Tensor | None = None,
    *,
    training: bool = False,
) -> Detector:
    """Return a detector by what a setting says: itself, a published criterion by its name, or the default.

    Args:
        detector: Value of the setting.
        system: The system that is simulated.
        reference: Reference frames, (n_frames, n_atoms, 3) in Å.
        integrator: Integrator of the simulation.
        cell: Cells of the reference frames, (n_frames, 3, 3) in Å; that of the system if None.
        training: Whether the detector is for training, for which some published limits are tighter.

    Raises:
        ValueError: If the name is that of no published criterion, or of one for other systems.
    """
    if detector is None:
        return default_detector(system, reference, integrator, cell)
    if isinstance(detector, str):
        return published_detector(detector, system, integrator.temperature_K, training=training)
    return detector


def default_detector(
    system: System,
    reference: Tensor,
    integrator: Integrator,
    cell: Tensor | None = None,
    reference_temperature_K: float | None = None,
) -> Detector:
    """Return the detector for a system, by the kinds of its parts.

    All systems are watched by temperature, momentum and contacts; molecules by bonds, angles, planes, configurations and
    rings; crystals by the displacements from their sites; the volume at constant pressure. All limits come from the
    reference and the temperature, but for that of the volume.

    Args:
        system: The system that is simulated.
        reference: Reference frames, (n_frames, n_atoms, 3) in Å.
        integrator: Integrator of the simulation.
        cell: Cells of the reference frames, (n_frames, 3, 3) in Å; that of the system if None.
        reference_temperature_K: Temperature of the reference in K; that of the simulation if None.
    """
    temperature_K = integrator.temperature_K
    kinds = (BondLimits, AngleLimits, PlaneLimits, ChiralityLimits, RingLimits, ContactLimits)
    limits = (kind(temperature_K, reference_temperature_K=reference_temperature_K) for kind in kinds)
    detectors: list[Detector] = [each for each in limits if each.applies(system)]
    sites = _site_detector(system, reference, cell)
    volume = [] if integrator.barostat is None else [VolumeDeviation()]
    return AnyOf([*detectors, *sites, *volume, TemperatureLimits(temperature_K), MomentumLimits(temperature_K)])


def _site_detector(system: System, reference: Tensor, cell: Tensor | None) -> list[Detector]:
    """Return a detector of melting, if the reference is a crystal whose atoms stay at their sites in one cell."""
    if cell is not None or not system.is_extended or not all(system.pbc):
        return []
    threshold = (LINDEMANN_RATIO * _nearest_neighbors(system, reference[:1])) ** 2
    detector = LindemannCriterion(round(threshold, 3))
    detector.bind(system, reference)
    moved = detector.measure(reference, torch.zeros_like(reference)).max().item()
    return [detector] if moved < 0.5 * threshold else []


def _nearest_neighbors(system: System, frame: Tensor) -> float:
    """Return the mean distance in Å of the atoms of the framework to their nearest neighbors."""
    atoms = system.atoms(frame[0])[system.framework.cpu().numpy()]
    first, distances = neighbor_list("id", atoms, SHELLS_A)
    shortest = [distances[first == atom].min(initial=SHELLS_A) for atom in range(len(atoms))]
    return float(np.mean(shortest))


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
