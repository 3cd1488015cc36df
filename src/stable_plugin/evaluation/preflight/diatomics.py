"""Energy curves of two atoms of each pair of elements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from math import isinf

import numpy as np
import torch
from ase import Atoms
from ase.data import atomic_numbers, covalent_radii
from ase.units import kB

from stable_plugin.evaluation.batches import energies_and_forces
from stable_plugin.md.system import System
from stable_plugin.models import Potential

CLOSEST = 0.45
"""Shortest distance over the sum of the covalent radii, as in MLIP Arena for two equal atoms."""

REPULSIVE = 0.6
"""Distance, over the sum of the covalent radii, below which all atoms repel each other.

No shorter bond is known: that of Cr2, 0.60, is the shortest on this scale; N2 has 0.77 and CO 0.79."""

FURTHEST_A = 6.0
"""Longest distance where the potential has no cutoff, or a longer one."""

STEP_A = 0.02

QUIET_FORCE = 0.01
"""Forces in eV/Å below which the sign does not count, as in MLIP Arena."""


@dataclass(frozen=True)
class DiatomicCurve:
    """What is wrong with the energy of two atoms as a function of their distance.

    Attributes:
        elements: Names of the elements, such as ``C-H``.
        force_flips: Number of times that the force changes its sign with the distance; at most one if the curve has a
            single minimum.
        tortuosity: Total variation of the energy over that of a curve with the same ends and the same minimum; 1 is smooth.
        repulsive: Whether the atoms repel each other at all distances below 0.6 times the sum of the covalent radii.
        minima: Distances in Å of minima that are deeper than :math:`k_B T`, the deepest one first.
        conservation_eV_per_A: Mean difference between the force and minus the slope of the energy.
    """

    elements: str
    force_flips: int
    tortuosity: float
    repulsive: bool
    minima: list[float]
    conservation_eV_per_A: float


def diatomic_curves(
    make_potential: Callable[[System], Potential], system: System, temperature_K: float
) -> tuple[list[DiatomicCurve], str]:
    """Return the curves of all pairs of elements of a system, and why there are none.

    Source: ``force_flips``, ``tortuosity`` and the conservation deviation are those of the homonuclear diatomics of MLIP
    Arena, Y. Chiang et al., arXiv:2509.20630 (2025), here for unlike elements too.

    Args:
        make_potential: Returns the potential of a system.
        system: The system.
        temperature_K: Temperature in K.
    """
    curves = []
    try:
        for pair in combinations_with_replacement(sorted(set(system.symbols)), 2):
            potential = make_potential(dimer(pair, system))
            distances = _distances(pair, potential.cutoff)
            energies, forces = energies_and_forces(potential, dimers(distances))
            curves.append(
                curve_of("-".join(pair), pair, distances, energies.numpy(), forces[:, 1, 0].numpy(), temperature_K)
            )
    except Exception as error:  # a family may take no isolated molecules, or no such charge
        return curves, f"no diatomic curves beyond {len(curves)}: {type(error).__name__}: {error}"
    return curves, ""


def dimer(pair: Sequence[str], system: System) -> System:
    """Return the system of two isolated atoms, neutral and of the lowest spin where the other system states these.

    Args:
        pair: Chemical symbols.
        system: The system whose head they are simulated with.
    """
    atoms = Atoms(list(pair), positions=[[0.0, 0.0, 0.0], [_radii(pair), 0.0, 0.0]])
    n_electrons = sum(atomic_numbers[symbol] for symbol in pair)
    if system.charge is not None:
        atoms.info["charge"] = 0
    if system.spin is not None:
        atoms.info["spin"] = 1 + n_electrons % 2
    if system.head is not None:
        atoms.info["head"] = system.head
    return System.from_atoms(atoms, bonds=[])


def dimers(distances: np.ndarray) -> torch.Tensor:
    """Return frames of two atoms on the x axis, (n_frames, 2, 3) in Å.

    Args:
        distances: (n_frames,) in Å.
    """
    positions = torch.zeros(len(distances), 2, 3, dtype=torch.float64)
    positions[:, 1, 0] = torch.from_numpy(distances)
    return positions


def curve_of(
    elements: str,
    pair: Sequence[str],
    distances: np.ndarray,
    energies: np.ndarray,
    forces: np.ndarray,
    temperature_K: float,
) -> DiatomicCurve:
    """Return the properties of a curve.

    Args:
        elements: Name of the pair.
        pair: Chemical symbols.
        distances: Ascending, (n_points,) in Å.
        energies: (n_points,) in eV.
        forces: Force on the second atom away from the first, (n_points,) in eV/Å.
        temperature_K: Temperature in K.
    """
    slopes = np.gradient(energies, distances)
    variation = np.abs(np.diff(energies)).sum()
    least = abs(energies[0] - energies.min()) + abs(energies[-1] - energies.min())
    near = distances < REPULSIVE * _radii(pair)
    signs = np.sign(forces[np.abs(forces) >= QUIET_FORCE])
    return DiatomicCurve(
        elements=elements,
        force_flips=int((np.diff(signs) != 0).sum()),
        tortuosity=float(variation / least) if least > 0 else 1.0,
        repulsive=bool((forces[near] > 0).all() and (np.diff(energies[near]) < 0).all()),
        minima=_minima(distances, energies, kB * temperature_K),
        conservation_eV_per_A=float(np.abs(forces + slopes).mean()),
    )


def _minima(distances: np.ndarray, energies: np.ndarray, depth: float) -> list[float]:
    """Return the distances of minima between which, and beyond which, the energy is higher by more than ``depth``."""
    found: list[tuple[float, float]] = []
    lowest = highest = 0
    rising = True
    for index, energy in enumerate(energies):
        if rising:
            highest = index if energy > energies[highest] else highest
            if energy < energies[highest] - depth:
                rising, lowest = False, index
        else:
            lowest = index if energy < energies[lowest] else lowest
            if energy > energies[lowest] + depth:
                found.append((float(energies[lowest]), float(distances[lowest])))
                rising, highest = True, index
    return [distance for _, distance in sorted(found)]


def _distances(pair: Sequence[str], cutoff: float) -> np.ndarray:
    """Return distances up to the cutoff, ascending, (n_points,) in Å."""
    last = FURTHEST_A if isinf(cutoff) else min(cutoff, FURTHEST_A)
    first = CLOSEST * _radii(pair)
    return np.arange(first, max(last, 2.0 * first), STEP_A)


def _radii(pair: Sequence[str]) -> float:
    """Return the sum of the covalent radii in Å."""
    return float(sum(covalent_radii[atomic_numbers[symbol]] for symbol in pair))
