"""Detector of nonbonded atoms that are closer than thermal motion brings them."""

from __future__ import annotations

from math import inf, sqrt

import numpy as np
import torch
from ase.data import vdw_radii
from ase.units import kB
from torch import Tensor

from stable_plugin.detectors.geometry import MAX_LISTED_ATOMS, MIN_SEARCH_A, nonbonded_pairs, rows_per_chunk
from stable_plugin.detectors.limits import FALSE_ALARMS, ReferenceLimitDetector, thermal_limits
from stable_plugin.md.chemistry import NONMETALS, bond_cutoffs
from stable_plugin.md.neighbors.contacts import ContactSearch
from stable_plugin.md.system import System
from stable_plugin.runtime import checks

STIFFNESS = 2.0
"""Force constant of a close contact in eV/Å²: soft."""

VDW_FRACTION = 0.6
"""Nonmetals that are closer than this fraction of the sum of their van der Waals radii repel each other strongly."""

HYDROGEN_BOND_FRACTION = 0.5
"""The same for hydrogen and an acceptor of hydrogen bonds."""

ACCEPTORS = (7, 8, 9, 16, 17)

OBSERVED_FRACTION = 0.8
"""A limit is at least this fraction of the shortest contact in the reference, unless that is a bond."""


class ContactLimits(ReferenceLimitDetector):
    r"""Nonbonded atoms closer than the contacts of their elements in the reference allow.

    .. math:: v = \max_{i<j} \frac{d_{e(i) e(j)}}{r_{ij}}, \qquad \text{threshold} = 1

    over all pairs of atoms more than two bonds apart. The limit d of a pair of elements, within a molecule and between
    molecules, is the lower thermal limit of the shortest contact in the reference
    (:func:`~stable_plugin.detectors.limits.thermal_limits`), and at most 0.6 of the sum of the van der Waals radii for two
    nonmetals, which come closer in a new conformation than in a short reference.

    Source of the radii: A. Bondi, J. Phys. Chem. 68, 441 (1964), as ASE lists them.

    Args:
        temperature_K: Temperature of the simulation in K.
        false_alarms: Fraction of frames at equilibrium that are flagged.
        reference_temperature_K: Temperature of the reference in K; that of the simulation if None.
        discard_A: Distance in Å below which a frame is excluded from the estimator; no limit if None.

    Example:
        >>> import torch
        >>> from ase.build import bulk
        >>> from stable_plugin import ContactLimits, System
        >>> copper = bulk("Cu", cubic=True) * 2
        >>> positions = torch.tensor(copper.positions)[None]
        >>> detector = ContactLimits(temperature_K=300.0)
        >>> detector.bind(System.from_atoms(copper), reference=positions)
        >>> moved = positions.clone()
        >>> moved[0, 1] = moved[0, 0] + 0.2
        >>> detector.classify(moved, torch.zeros_like(moved))[0].tolist()
        [True]
    """

    def __init__(
        self,
        temperature_K: float,
        false_alarms: float = FALSE_ALARMS,
        reference_temperature_K: float | None = None,
        discard_A: float | None = 0.3,
    ) -> None:
        super().__init__(temperature_K, false_alarms, reference_temperature_K)
        self.discard_A = discard_A if discard_A is None else checks.number("discard_A", discard_A, above=0)
        self._system: System | None = None
        self._search: ContactSearch | None = None

    def applies(self, system: System) -> bool:
        """Return whether the system has a pair of atoms more than two bonds apart."""
        return system.n_atoms > MAX_LISTED_ATOMS or len(nonbonded_pairs(system)) > 0

    def bind(self, system: System, reference: Tensor, cell: Tensor | None = None) -> None:
        self._system = system
        elements, element = np.unique(system.numbers.cpu().numpy(), return_inverse=True)
        self._element = torch.as_tensor(element, device=system.bonds.device)
        self._molecule = system.molecules
        self._n_elements = len(elements)
        self.capturable = system.n_atoms <= MAX_LISTED_ATOMS
        if self.capturable:
            self._search = None
            self._pairs = nonbonded_pairs(system).to(system.bonds.device)
            if len(self._pairs) == 0:
                raise ValueError(f"{self!r} finds no atoms more than two bonds apart: use another detector.")
        else:
            self._search = ContactSearch(system, excluded=torch.cat([system.bonds, system.angles[:, [0, 2]]]))
        limits = self._limits(self._shortest_by_kind(reference, cell), elements)
        self._limit_of_kind = limits.to(system.masses)
        self._radius = max(MIN_SEARCH_A, float(limits[limits < inf].max()))
        if self.capturable:
            self._limit = self._limit_of_kind[self.kinds(self._pairs)]

    def measure(self, positions: Tensor, velocities: Tensor, cell: Tensor | None = None) -> Tensor:
        """Return the largest ratio of limit and distance; 0 in a large system whose atoms are all further apart."""
        return self._extremes(positions, cell)[0]

    def classify(self, positions: Tensor, velocities: Tensor, cell: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return which replicas are unstable and which have a distance below ``discard_A``, both (n_replicas,)."""
        ratio, shortest = self._extremes(positions, cell)
        return ~(ratio <= self.threshold), ~(shortest >= (self.discard_A or 0.0))

    def offending_atoms(
        self, positions: Tensor, velocities: Tensor, cell: Tensor | None = None
    ) -> list[tuple[int, ...]]:
        """Return the two atoms that are closest, relative to their limit."""
        return [atoms for atoms, _, _ in self._closest(positions, cell)]

    def describe(self, positions: Tensor, velocities: Tensor, cell: Tensor | None = None) -> list[str]:
        """Return the two atoms that are closest, relative to their limit, and both distances."""
        assert self._system is not None
        return [
            f"contact {self._system.label(atoms)} {distance:.3g} Å, limit {limit:.3g}" if atoms else ""
            for atoms, distance, limit in self._closest(positions, cell)
        ]

    def limits(self, pairs: Tensor) -> Tensor:
        """Return the shortest allowed distances of pairs of atoms, (n_pairs,) in Å.

        Args:
            pairs: Atoms more than two bonds apart, (n_pairs, 2).
        """
        if self._system is None:
            raise RuntimeError("ContactLimits has no reference yet: call bind(system, reference) first.")
        return self._limit_of_kind[self.kinds(pairs)]

    def __str__(self) -> str:
        return "contact limits"

    def _extremes(self, positions: Tensor, cell: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the largest ratio of limit and distance, and the shortest distance, of each replica."""
        if self._system is None:
            raise RuntimeError("ContactLimits has no reference yet: call bind(system, reference) first.")
        if self._search is None:
            ratio, shortest = [], []
            n_pairs = rows_per_chunk(len(positions))
            for pairs, limit in zip(self._pairs.split(n_pairs), self._limit.split(n_pairs), strict=True):
                distances = self._system.distances(positions, pairs, cell)
                ratio.append((limit.to(distances) / distances).amax(dim=-1))
                shortest.append(distances.amin(dim=-1))
            return torch.stack(ratio).amax(dim=0), torch.stack(shortest).amin(dim=0)
        replica, pairs, distances = self._search.pairs(positions, self._radius, cell)
        # NaN if the frame is not finite.
        nothing = 0.0 * positions.sum(dim=(1, 2))
        found = self._limit_of_kind[self.kinds(pairs)].to(distances) / distances
        return (
            nothing.scatter_reduce(0, replica, found, "amax"),
            (nothing + self._radius).scatter_reduce(0, replica, distances, "amin"),
        )

    def _closest(self, positions: Tensor, cell: Tensor | None) -> list[tuple[tuple[int, ...], float, float]]:
        """Return the atoms of the worst contact of each replica, their distance and limit in Å; no atoms if none is near."""
        assert self._system is not None
        closest: list[tuple[tuple[int, ...], float, float]] = []
        for index, frame in enumerate(positions):
            own = None if cell is None else cell[index : index + 1]
            if self._search is None:
                pairs, distances = (
                    self._pairs,
                    self._system.distances(frame, self._pairs, None if own is None else own[0]),
                )
            else:
                _, pairs, distances = self._search.pairs(frame[None], self._radius, own)
            if len(pairs) == 0:
                closest.append(((), inf, 0.0))
                continue
            limits = self._limit_of_kind[self.kinds(pairs)].to(distances)
            worst = int(torch.nan_to_num(limits / distances, nan=inf).argmax())
            closest.append((tuple(pairs[worst].tolist()), float(distances[worst]), float(limits[worst])))
        return closest

    def kinds(self, pairs: Tensor) -> Tensor:
        """Return the number of the kind of pairs, (n_pairs,): their elements, and whether the molecule is the same.

        Args:
            pairs: Atoms, (n_pairs, 2).
        """
        element, molecule = self._element.to(pairs.device)[pairs], self._molecule.to(pairs.device)[pairs]
        same = (molecule[:, 0] == molecule[:, 1]).long()
        return (same * self._n_elements + element.amin(dim=1)) * self._n_elements + element.amax(dim=1)

    def _shortest_by_kind(self, reference: Tensor, cell: Tensor | None) -> Tensor:
        """Return the shortest distance of each kind of pair in each frame, (n_frames, n_kinds) in Å; inf if there is none."""
        assert self._system is not None
        shortest = reference.new_full((len(reference), 2 * self._n_elements**2), inf, dtype=torch.float64)
        if self._search is not None:
            frame, pairs, distances = self._search.pairs(reference, MIN_SEARCH_A, cell)
            kinds = frame * shortest.shape[1] + self.kinds(pairs)
            return shortest.flatten().scatter_reduce(0, kinds, distances.double(), "amin").view_as(shortest)
        kinds = self.kinds(self._pairs)
        n_frames = rows_per_chunk(len(kinds))
        for start in range(0, len(reference), n_frames):
            part = slice(start, start + n_frames)
            own = None if cell is None else cell[part]
            distances = self._system.distances(reference[part], self._pairs, own).double()
            shortest[part] = shortest[part].scatter_reduce(1, kinds.expand_as(distances), distances, "amin")
        return shortest

    def _limits(self, shortest: Tensor, elements: np.ndarray) -> Tensor:
        """Return the limit of each kind of pair, (n_kinds,) in Å; -inf for kinds that are always far apart."""
        first, second = elements[np.indices((len(elements),) * 2).reshape(2, -1)]
        ceiling = torch.as_tensor(_longest_limits(first, second)).repeat(2)
        bonds = torch.as_tensor(bond_cutoffs(first, second)).repeat(2)
        ceiling, bonds = ceiling.to(shortest), bonds.to(shortest)
        near = shortest.amin(dim=0) < inf
        limits = torch.where(ceiling < inf, ceiling, bonds)
        values = shortest[:, near].clamp_max(2.0 * MIN_SEARCH_A)
        kinds = torch.arange(values.shape[1], device=values.device)
        amplitude = sqrt(kB * self.temperature_K / STIFFNESS)
        thermal = thermal_limits(values, kinds, amplitude, self.false_alarms, self.scale).lower
        floor = torch.minimum(OBSERVED_FRACTION * values.amin(dim=0), bonds[near])
        limits[near] = torch.minimum(torch.maximum(thermal, floor), ceiling[near])
        return limits


def _longest_limits(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the largest limits of pairs of elements, (n_pairs,) in Å; inf unless both are nonmetals."""
    radii = np.nan_to_num(vdw_radii, nan=inf)
    hydrogen_bond = ((first == 1) & np.isin(second, ACCEPTORS)) | ((second == 1) & np.isin(first, ACCEPTORS))
    limits: np.ndarray = np.where(hydrogen_bond, HYDROGEN_BOND_FRACTION, VDW_FRACTION) * (radii[first] + radii[second])
    return np.where(np.isin(first, NONMETALS) & np.isin(second, NONMETALS), limits, inf)
