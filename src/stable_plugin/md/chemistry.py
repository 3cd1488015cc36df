"""Which close atoms of one structure are bonded, and which of them form an extended framework."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import vesin
from ase import Atoms
from ase.data import covalent_radii
from scipy.sparse import coo_array
from scipy.sparse.csgraph import breadth_first_order, connected_components

BOND_TOLERANCE = 1.2
"""Factor on covalent radii, which fit equilibrium bonds: a thermal frame stretches them."""

BROKEN_FACTOR = 1.25
"""A bond is broken where it is longer than the longest bond of these elements by this factor."""

LONGEST_BONDS = {(1, 1): 1.0, (9, 9): 1.65}
"""Longest bond in Å of pairs of elements whose bond is longer than their radii suggest."""

NOBLE_GASES = (2, 10, 18, 36, 54, 86)
HEAVY_NOBLE_GASES = (36, 54, 86)
OXIDIZERS = (8, 9)
"""Elements that heavy noble gases form compounds with, such as XeF2."""

NONMETALS = (1, 5, 6, 7, 8, 9, 14, 15, 16, 17, 32, 33, 34, 35, 51, 52, 53, 85, *NOBLE_GASES)
"""Elements that form covalent bonds among themselves, metalloids included."""

CATIONS = (3, 11, 19, 37, 55, 87, 12, 20, 38, 56, 88)
"""Metals that are cations in compounds: their contacts to molecules are not bonds."""

HYDRIDE_FACTOR = 1.25
"""Factor on bonds of cations and hydrogen, because the covalent radius of hydrogen is too small for a hydride ion."""

MIN_CLUSTER = 4
"""Fewest metal atoms that form a framework without periodic images."""


@dataclass(frozen=True)
class Links:
    """Pairs of atoms that are close enough for a bond, each listed once.

    Attributes:
        first: Index of one atom, (n_links,).
        second: Index of the other atom, (n_links,).
        images: Cell of the second atom relative to that of the first, (n_links, 3).
    """

    first: np.ndarray
    second: np.ndarray
    images: np.ndarray

    def __len__(self) -> int:
        return len(self.first)

    @property
    def fields(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First and second atoms, and images."""
        return self.first, self.second, self.images

    def select(self, mask: np.ndarray) -> Links:
        """Return the links for which ``mask`` (n_links,) is true, or those of an index array."""
        return Links(self.first[mask], self.second[mask], self.images[mask])

    def degrees(self, n_atoms: int) -> np.ndarray:
        """Return the number of links of each atom, (n_atoms,)."""
        return np.bincount(self.first, minlength=n_atoms) + np.bincount(self.second, minlength=n_atoms)

    def components(self, n_atoms: int) -> np.ndarray:
        """Return the connected component of each atom, (n_atoms,), numbered by its first atom."""
        joined = coo_array((np.ones(len(self)), (self.first, self.second)), shape=(n_atoms, n_atoms))
        labels: np.ndarray = connected_components(joined, directed=False)[1]
        return labels

    def extended(self, n_atoms: int) -> np.ndarray:
        """Return whether links connect each atom to a periodic image of itself, (n_atoms,)."""
        labels = self.components(n_atoms)
        if not self.images.any():
            return np.zeros(n_atoms, dtype=bool)
        cells = self._cells(labels, n_atoms)
        closed = (cells[self.first] + self.images != cells[self.second]).any(axis=1)
        return np.isin(labels, labels[self.first[closed]])

    def _cells(self, labels: np.ndarray, n_atoms: int) -> np.ndarray:
        """Return the cell that a walk along links from the first atom of its component reaches each atom in."""
        image = dict(zip(zip(self.first.tolist(), self.second.tolist(), strict=True), self.images, strict=True))
        graph = coo_array((np.ones(len(self)), (self.first, self.second)), shape=(n_atoms, n_atoms)).tocsr()
        cells = np.zeros((n_atoms, 3), dtype=int)
        for start in np.unique(labels, return_index=True)[1]:
            order, previous = breadth_first_order(graph, start, directed=False)
            for atom in order[1:].tolist():
                before = int(previous[atom])
                step = image[before, atom] if (before, atom) in image else -image[atom, before]
                cells[atom] = cells[before] + step
        return cells


def bond_cutoffs(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the longest bonds of pairs of elements, (n_pairs,) in Å.

    Args:
        first: Atomic numbers, (n_pairs,).
        second: Atomic numbers, (n_pairs,).
    """
    cutoffs: np.ndarray = BOND_TOLERANCE * (covalent_radii[first] + covalent_radii[second])
    hydride = (np.isin(first, CATIONS) & (second == 1)) | (np.isin(second, CATIONS) & (first == 1))
    cutoffs[hydride] *= HYDRIDE_FACTOR
    for (one, other), longest in LONGEST_BONDS.items():
        cutoffs[(first == one) & (second == other)] = longest
    return cutoffs


def bonded_links(atoms: Atoms) -> Links:
    """Return the links of a structure that are bonds: covalent, metallic, ionic, or of a metal and its ligand.

    Noble gases have none, except with oxygen and fluorine. A cation has bonds to anions of one atom, as in a crystal or a
    molecule NaCl, and none to molecules or where molecules solvate it. A hydrogen without any bond is bonded to the nearest
    nonmetal that it has not dissociated from, because hot frames stretch its bond most.

    Args:
        atoms: An ASE structure.
    """
    wide, lengths = _within(atoms, BROKEN_FACTOR)
    near = lengths < 1.0
    bonded = _chemical(wide.select(near), atoms.numbers)
    lone = (atoms.numbers == 1) & (bonded.degrees(len(atoms)) == 0)
    if not lone.any():
        return bonded
    stretched = _stretched(wide.select(~near), lengths[~near], lone, atoms.numbers)
    return Links(*(np.concatenate(pair) for pair in zip(bonded.fields, stretched.fields, strict=True)))


def _chemical(links: Links, numbers: np.ndarray) -> Links:
    """Return the links that are bonds by the chemistry of their elements and of their surroundings."""
    n_atoms = len(numbers)
    one, other = numbers[links.first], numbers[links.second]
    nonmetal = np.isin(numbers, NONMETALS)
    cation = np.isin(numbers, CATIONS)
    noble = np.isin(one, NOBLE_GASES) | np.isin(other, NOBLE_GASES)
    compound = np.isin(one, HEAVY_NOBLE_GASES) & np.isin(other, OXIDIZERS)
    compound |= np.isin(other, HEAVY_NOBLE_GASES) & np.isin(one, OXIDIZERS)
    links = links.select(~noble | compound)

    both = nonmetal[links.first] & nonmetal[links.second]
    in_molecule = links.select(both).degrees(n_atoms) > 0
    to_anion = _between(links, cation, nonmetal & ~in_molecule)
    to_molecule = _between(links, cation, in_molecule)
    n_anions, n_solvent = links.select(to_anion).degrees(n_atoms), links.select(to_molecule).degrees(n_atoms)
    solvated = cation & (n_solvent > n_anions)

    metallic = ~nonmetal[links.first] & ~nonmetal[links.second]
    n_metals = links.select(metallic).degrees(n_atoms)
    ionized = cation & (n_anions + n_solvent >= np.maximum(n_metals, 1))
    free = to_molecule | (to_anion & (solvated[links.first] | solvated[links.second]))
    free |= metallic & (ionized[links.first] | ionized[links.second])
    return links.select(~free)


def framework_of(links: Links, numbers: np.ndarray) -> np.ndarray:
    """Return which atoms belong to an extended framework, (n_atoms,).

    A framework continues through its periodic images, or is a cluster of metal atoms. Molecules that are bound to its
    metal atoms are not part of it.

    Args:
        links: Bonds of the structure, see :func:`bonded_links`.
        numbers: Atomic numbers, (n_atoms,).
    """
    n_atoms = len(numbers)
    nonmetal = np.isin(numbers, NONMETALS)
    metallic = links.select(~nonmetal[links.first] & ~nonmetal[links.second])
    cluster = metallic.components(n_atoms)
    clustered = np.bincount(cluster)[cluster] >= MIN_CLUSTER
    whole = links.components(n_atoms)
    extended = links.extended(n_atoms) | np.isin(whole, whole[clustered])

    covalent = links.select(nonmetal[links.first] & nonmetal[links.second])
    in_molecule = (covalent.degrees(n_atoms) > 0) & ~covalent.extended(n_atoms)
    bound_to_metal = np.isin(whole, whole[~nonmetal])
    framework: np.ndarray = extended & ~(in_molecule & bound_to_metal)
    return framework


def _between(links: Links, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return which links join an atom of one mask (n_atoms,) to an atom of the other, (n_links,)."""
    first, second = links.first, links.second
    mask: np.ndarray = (one[first] & other[second]) | (other[first] & one[second])
    return mask


def _stretched(links: Links, lengths: np.ndarray, lone: np.ndarray, numbers: np.ndarray) -> Links:
    """Return the shortest link of each lone atom to a nonmetal."""
    partner = np.isin(numbers, NONMETALS) & ~np.isin(numbers, NOBLE_GASES) & ~lone
    candidates = _between(links, lone, partner).nonzero()[0]
    candidates = candidates[np.argsort(lengths[candidates])]
    hydrogen = np.where(lone[links.first[candidates]], links.first[candidates], links.second[candidates])
    return links.select(candidates[np.unique(hydrogen, return_index=True)[1]])


def _within(atoms: Atoms, factor: float) -> tuple[Links, np.ndarray]:
    """Return pairs within ``factor`` times their longest bond, images included, and their lengths relative to it."""
    elements = np.unique(atoms.numbers)
    longest = float(bond_cutoffs(*(grid.ravel() for grid in np.meshgrid(elements, elements))).max())
    search = vesin.NeighborList(cutoff=factor * longest, full_list=False)
    cell = atoms.cell.complete().array
    images = np.where(atoms.pbc, np.floor(np.linalg.solve(cell.T, atoms.positions.T).T), 0.0).astype(int)
    first, second, crossed, lengths = search.compute(
        atoms.positions - images @ cell, cell, atoms.pbc.tolist(), quantities="ijSd"
    )
    first, second = first.astype(int), second.astype(int)
    relative = lengths / bond_cutoffs(atoms.numbers[first], atoms.numbers[second])
    near = relative < factor
    first, second, crossed = first[near], second[near], crossed[near].astype(int)
    return Links(first, second, crossed - images[second] + images[first]), relative[near]
