"""Detectors based on interatomic distances."""

from __future__ import annotations

import copy
from abc import abstractmethod
from math import sqrt
from typing import Self

import torch
from torch import Tensor

from stable_plugin.detectors.base import Detector
from stable_plugin.md.cells import each_cell
from stable_plugin.md.neighbors.contacts import ContactSearch
from stable_plugin.md.system import System
from stable_plugin.runtime import checks

MAX_LISTED_ATOMS = 1000
"""Most atoms of a system whose pairs are all listed; contacts are searched for in a larger one."""

MIN_SEARCH_A = 4.0
"""Smallest radius in Å that is searched for contacts."""

MAX_DISTANCES = 2_000_000
"""Most distances held in memory at a time."""


def rows_per_chunk(n_columns: int) -> int:
    """Return how many rows of a table of distances are computed at once, at least one."""
    return max(1, MAX_DISTANCES // max(1, n_columns))


class BondDeviation(Detector):
    r"""Largest deviation of a bond length from its mean in the reference, in Å.

    .. math:: v = \max_b \left| r_b - \langle r_b \rangle_\mathrm{ref} \right|

    Source: the criterion of Raja et al., TMLR 2025, arXiv:2402.13984: 0.25 Å in training (the default), 0.5 Å in
    evaluation.

    Args:
        threshold: In Å.
        discard: In Å, no limit if None; the default of 3 Å is well past dissociation.

    Example:
        >>> import torch
        >>> from ase.build import molecule
        >>> from stable_plugin import BondDeviation, System
        >>> water = molecule("H2O")
        >>> positions = torch.tensor(water.positions)[None]
        >>> detector = BondDeviation()
        >>> detector.bind(System.from_atoms(water), reference=positions)
        >>> [round(value, 3) for value in detector.measure(1.2 * positions, torch.zeros_like(positions)).tolist()]
        [0.194]
    """

    unit = "Å"
    supports_margin = True

    def __init__(self, threshold: float = 0.25, discard: float | None = 3.0) -> None:
        super().__init__(threshold, discard)
        self._system: System | None = None
        self._lengths: Tensor | None = None

    def heated(self, ratio: float) -> Self:
        hotter = copy.copy(self)
        hotter.threshold = sqrt(ratio) * self.threshold
        hotter.discard = None if self.discard is None else max(self.discard, hotter.threshold)
        return hotter

    def bind(self, system: System, reference: Tensor, cell: Tensor | None = None) -> None:
        if len(system.bonds) == 0:
            raise ValueError(f"{self!r} finds no bonds in the system: pass them, System.from_atoms(..., bonds=...).")
        self._system = system
        self._lengths = system.distances(reference.to(system.masses), system.bonds, cell).mean(dim=0)

    def measure(self, positions: Tensor, velocities: Tensor, cell: Tensor | None = None) -> Tensor:
        return self._deviations(positions, cell).amax(dim=-1)

    def by_coordinate(self, positions: Tensor, cell: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._deviations(positions, cell), self._bound_system.bonds

    def offending_atoms(
        self, positions: Tensor, velocities: Tensor, cell: Tensor | None = None
    ) -> list[tuple[int, ...]]:
        """Return the two atoms of the bond that deviates most."""
        worst = torch.nan_to_num(self._deviations(positions, cell), nan=torch.inf).argmax(dim=-1)
        return _pair_tuples(self._bound_system.bonds, worst)

    def describe(self, positions: Tensor, velocities: Tensor, cell: Tensor | None = None) -> list[str]:
        """Return the bond of each replica that deviates most, its length and its mean in the reference."""
        system = self._bound_system
        assert self._lengths is not None
        worst = torch.nan_to_num(self._deviations(positions, cell), nan=torch.inf).argmax(dim=-1).tolist()
        lengths = system.distances(positions, system.bonds, cell)
        return [
            f"bond {system.label(system.bonds[bond].tolist())} {float(length[bond]):.3g} Å, mean of the reference "
            f"{float(self._lengths[bond]):.3g}"
            for bond, length in zip(worst, lengths, strict=True)
        ]

    @property
    def _bound_system(self) -> System:
        if self._system is None:
            raise RuntimeError("BondDeviation has no reference yet: call bind(system, reference) first.")
        return self._system

    def _deviations(self, positions: Tensor, cell: Tensor | None = None) -> Tensor:
        return self._elongations(positions, cell).abs()

    def _elongations(self, positions: Tensor, cell: Tensor | None = None) -> Tensor:
        """Return lengths of the bonds less those in the reference, (n_replicas, n_bonds) in Å."""
        system = self._bound_system
        assert self._lengths is not None
        return system.distances(positions, system.bonds, cell) - self._lengths.to(positions)


class _MinimumDistance(Detector):
    """Base class of detectors of close contacts: minus the shortest distance of certain pairs of atoms, in Å."""

    unit = "Å"
    supports_margin = True

    def __init__(self, distance: float = 1.2, discard_distance: float | None = 0.3) -> None:
        checks.number("distance", distance, above=0)
        super().__init__(-distance, None if discard_distance is None else -discard_distance)
        self.distance = distance
        self._system: System | None = None
        self._pairs: Tensor | None = None
        self._search: ContactSearch | None = None

    def bind(self, system: System, reference: Tensor, cell: Tensor | None = None) -> None:
        self._system = system
        self._pairs = self._search = None
        self.capturable = system.n_atoms <= MAX_LISTED_ATOMS
        if self.capturable:
            self._pairs = self._candidate_pairs(system).to(system.bonds.device)
        else:
            self._search = self._contact_search(system)

    @abstractmethod
    def _candidate_pairs(self, system: System) -> Tensor:
        """Return the pairs of atoms that must not come close, (n_pairs, 2)."""

    @abstractmethod
    def _contact_search(self, system: System) -> ContactSearch:
        """Return a search for these pairs, for a system with too many of them."""

    def measure(self, positions: Tensor, velocities: Tensor, cell: Tensor | None = None) -> Tensor:
        """Return minus the shortest distance, (n_replicas,) in Å, so that larger is worse.

        In a large system, distances above twice the threshold and 4 Å are not measured: the value is that limit.
        """
        system = self._bound_system
        if self._search is not None:
            return -self._search.shortest(positions, self._radius, cell)[0]
        pairs = self._listed_pairs
        chunk = rows_per_chunk(len(positions))
        shortest = [system.distances(positions, part, cell).amin(dim=-1) for part in pairs.split(chunk)]
        return -torch.stack(shortest).amin(dim=0)

    def offending_atoms(
        self, positions: Tensor, velocities: Tensor, cell: Tensor | None = None
    ) -> list[tuple[int, ...]]:
        """Return the two atoms that are closest."""
        if self._search is not None:
            return self._search.shortest(positions, self._radius, cell)[1]
        system, pairs = self._bound_system, self._listed_pairs
        cells = each_cell(cell, len(positions))
        distances = [system.distances(frame, pairs, own) for frame, own in zip(positions, cells, strict=True)]
        return _pair_tuples(pairs, torch.stack([torch.nan_to_num(each, nan=0.0).argmin() for each in distances]))

    def describe(self, positions: Tensor, velocities: Tensor, cell: Tensor | None = None) -> list[str]:
        """Return the two atoms of each replica that are closest, and their distance."""
        system = self._bound_system
        distances = (-self.measure(positions, velocities, cell)).tolist()
        pairs = self.offending_atoms(positions, velocities, cell)
        return [
            f"contact {system.label(atoms)} {distance:.3g} Å" for atoms, distance in zip(pairs, distances, strict=True)
        ]

    @property
    def _radius(self) -> float:
        return max(2.0 * self.distance, MIN_SEARCH_A)

    @property
    def _bound_system(self) -> System:
        if self._system is None:
            raise RuntimeError(f"{type(self).__name__} has no system yet: call bind(system, reference) first.")
        return self._system

    @property
    def _listed_pairs(self) -> Tensor:
        assert self._pairs is not None
        return self._pairs

    def __str__(self) -> str:
        return f"{type(self).__name__}(distance={self.distance:g})"


class ClosestContact(_MinimumDistance):
    r"""Shortest distance of two atoms that are more than two bonds apart, with a minus sign, in Å.

    .. math:: v = -\min_{i<j} r_{ij}, \qquad \text{threshold} = -\texttt{distance}

    Pairs that are bonded (1-2) or share a neighbor (1-3) are left out. The default of 1.2 Å is that of
    :class:`IntermolecularContact`.

    Args:
        distance: Contacts shorter than this, in Å, are unstable.
        discard_distance: Contacts shorter than this, in Å, stop the replica, no limit if None; the default of 0.3 Å is
            far below any bond length.

    Example:
        >>> import torch
        >>> from ase.build import molecule
        >>> from stable_plugin import ClosestContact, System
        >>> ethane = molecule("C2H6")
        >>> positions = torch.tensor(ethane.positions)[None]
        >>> detector = ClosestContact()
        >>> detector.bind(System.from_atoms(ethane), reference=positions)
        >>> [round(value, 2) for value in detector.measure(positions, torch.zeros_like(positions)).tolist()]
        [-2.53]
    """

    def _candidate_pairs(self, system: System) -> Tensor:
        candidates = nonbonded_pairs(system)
        if len(candidates) == 0:
            raise ValueError(f"{self!r} finds no pair of atoms more than two bonds apart: use another detector.")
        return candidates

    def _contact_search(self, system: System) -> ContactSearch:
        return ContactSearch(system, excluded=torch.cat([system.bonds, system.angles[:, [0, 2]]]))


class IntermolecularContact(_MinimumDistance):
    r"""Shortest distance of two atoms of different molecules, with a minus sign, in Å.

    .. math:: v = -\min_{i<j} r_{ij}, \qquad \text{threshold} = -\texttt{distance}

    Source: the criterion of Raja et al., TMLR 2025, arXiv:2402.13984, for liquid water: 1.2 Å (the default).

    Args:
        distance: Contacts shorter than this, in Å, are unstable.
        discard_distance: Contacts shorter than this, in Å, stop the replica, no limit if None; the default of 0.3 Å is
            far below any bond length.

    Example:
        >>> import torch
        >>> from ase.build import molecule
        >>> from stable_plugin import IntermolecularContact, System
        >>> dimer = molecule("N2")
        >>> other = molecule("N2")
        >>> other.positions[:, 0] += 1.0
        >>> dimer += other
        >>> positions = torch.tensor(dimer.positions)[None]
        >>> detector = IntermolecularContact(distance=1.2)
        >>> detector.bind(System.from_atoms(dimer, bonds=[(0, 1), (2, 3)]), reference=positions)
        >>> unstable, discarded = detector.classify(positions, torch.zeros_like(positions))
        >>> unstable.tolist(), discarded.tolist()
        ([True], [False])
    """

    def _candidate_pairs(self, system: System) -> Tensor:
        self._check_molecules(system)
        molecules = system.molecules.cpu()
        return (molecules[:, None] != molecules).triu().nonzero()

    def _contact_search(self, system: System) -> ContactSearch:
        self._check_molecules(system)
        return ContactSearch(system, labels=system.molecules)

    def _check_molecules(self, system: System) -> None:
        if int(system.molecules.max()) == 0:
            raise ValueError(
                f"{self!r} finds no two molecules in the system: use ClosestContact for a single molecule, and "
                "LindemannCriterion or CoordinationNumber for a solid."
            )


def _pair_tuples(pairs: Tensor, chosen: Tensor) -> list[tuple[int, ...]]:
    """Return the chosen pairs, (n_chosen,) indices into (n_pairs, 2), as tuples."""
    return [tuple(pair) for pair in pairs.cpu()[chosen.cpu()].tolist()]


def nonbonded_pairs(system: System) -> Tensor:
    """Return the pairs of atoms that are more than two bonds apart, (n_pairs, 2)."""
    linked = torch.eye(system.n_atoms, dtype=torch.bool)
    for pairs in (system.bonds.cpu(), system.angles.cpu()[:, [0, 2]]):
        linked[pairs[:, 0], pairs[:, 1]] = linked[pairs[:, 1], pairs[:, 0]] = True
    return (~linked).triu().nonzero()
