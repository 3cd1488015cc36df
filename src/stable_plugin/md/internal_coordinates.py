"""Internal coordinates of molecules: bond lengths, angles, heights above planes, torsions of rings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import networkx as nx
import torch
from torch import Tensor

from stable_plugin.md.system import System

MAX_RING = 8
"""Most atoms of a ring whose torsions are listed; larger rings are flexible."""


def angles(system: System, positions: Tensor, triples: Tensor, cell: Tensor | None = None) -> Tensor:
    """Return bond angles, (..., n_triples) in degrees.

    Args:
        system: The system.
        positions: (..., n_atoms, 3) in Å.
        triples: Atoms (end, center, end), (n_triples, 3).
        cell: Cells of the frames, (..., 3, 3) in Å; that of the system if None.
    """
    first, second = (system.separations(positions, _columns(triples, end, 1), cell) for end in (0, 2))
    cosine = torch.nn.functional.cosine_similarity(first, second, dim=-1).clamp(-1.0, 1.0)
    return torch.rad2deg(torch.arccos(cosine))


def heights(system: System, positions: Tensor, centers: Tensor, cell: Tensor | None = None) -> Tensor:
    """Return the signed heights of atoms above the plane of three neighbors, (..., n_centers) in Å.

    Args:
        system: The system.
        positions: (..., n_atoms, 3) in Å.
        centers: Atoms (center, neighbor, neighbor, neighbor), (n_centers, 4).
        cell: Cells of the frames, (..., 3, 3) in Å; that of the system if None.
    """
    one, two, three = (system.separations(positions, _columns(centers, end, 0), cell) for end in (1, 2, 3))
    normal = torch.linalg.cross(two - one, three - one)
    height: Tensor = -(normal * one).sum(dim=-1) / torch.linalg.vector_norm(normal, dim=-1).clamp_min(1e-12)
    return height


def torsions(system: System, positions: Tensor, chains: Tensor, cell: Tensor | None = None) -> Tensor:
    """Return torsions, (..., n_chains) in degrees from -180 to 180.

    Args:
        system: The system.
        positions: (..., n_atoms, 3) in Å.
        chains: Four atoms in a row, (n_chains, 4).
        cell: Cells of the frames, (..., 3, 3) in Å; that of the system if None.
    """
    one, two, three = (system.separations(positions, _columns(chains, end + 1, end), cell) for end in range(3))
    before, after = torch.linalg.cross(one, two), torch.linalg.cross(two, three)
    sine = torch.linalg.vector_norm(two, dim=-1) * (one * after).sum(dim=-1)
    return torch.rad2deg(torch.atan2(sine, (before * after).sum(dim=-1)))


def branched_centers(system: System, n_neighbors: int) -> Tensor:
    """Return atoms with this many bonds and three of their neighbors, (n_centers, 4).

    Args:
        system: The system.
        n_neighbors: Number of bonds.
    """
    neighbors = _neighbors(system)
    rows = [[center, *ends[:3]] for center, ends in enumerate(neighbors) if len(ends) == n_neighbors]
    return torch.tensor(rows, dtype=torch.long, device=system.bonds.device).reshape(-1, 4)


def ring_chains(system: System) -> Tensor:
    """Return four atoms in a row for each bond of each ring of at most eight atoms, (n_chains, 4)."""
    graph: nx.Graph[int] = nx.Graph(system.bonds.tolist())
    chains = []
    for ring in nx.minimum_cycle_basis(graph):
        if 4 <= len(ring) <= MAX_RING:
            chains += [[ring[(start + step) % len(ring)] for step in range(4)] for start in range(len(ring))]
    return torch.tensor(chains, dtype=torch.long, device=system.bonds.device).reshape(-1, 4)


def torsion_chains(system: System) -> Tensor:
    """Return four atoms in a row for each torsion about a bond, (n_chains, 4).

    Args:
        system: The system.
    """
    neighbors = _neighbors(system)
    chains = [
        [first, second, third, last]
        for second, third in system.bonds.tolist()
        for first in neighbors[second]
        for last in neighbors[third]
        if len({first, second, third, last}) == 4
    ]
    return torch.tensor(chains, dtype=torch.long, device=system.bonds.device).reshape(-1, 4)


def equivalent_atoms(system: System) -> list[int]:
    """Return a class for each atom, equal for atoms of the same element with the same surroundings of bonds.

    The classes are refined until they no longer change (Morgan's algorithm).
    """
    neighbors = _neighbors(system)
    classes = [int(number) for number in system.numbers.tolist()]
    while True:
        surroundings = [
            (own, tuple(sorted(classes[end] for end in ends))) for own, ends in zip(classes, neighbors, strict=True)
        ]
        refined = _numbered(surroundings)
        if len(Counter(refined)) == len(Counter(classes)):
            return refined
        classes = refined


def equivalent_coordinates(system: System, atoms: Tensor) -> Tensor:
    """Return a class for each internal coordinate, equal where its atoms are equivalent in either order, (n,).

    Args:
        system: The system.
        atoms: Atoms of each coordinate, (n, n_members).
    """
    of_atom = equivalent_atoms(system)
    keys = [min(names, names[::-1]) for names in (tuple(of_atom[i] for i in row) for row in atoms.tolist())]
    return torch.tensor(_numbered(keys), dtype=torch.long, device=atoms.device)


def _neighbors(system: System) -> list[list[int]]:
    neighbors: list[list[int]] = [[] for _ in range(system.n_atoms)]
    for first, second in system.bonds.tolist():
        neighbors[first].append(second)
        neighbors[second].append(first)
    return [sorted(ends) for ends in neighbors]


def _numbered(keys: Sequence[object]) -> list[int]:
    numbers: dict[object, int] = {}
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def _columns(atoms: Tensor, first: int, second: int) -> Tensor:
    """Return two columns as pairs, (n, 2); a list of columns as an index would be copied to the device."""
    return torch.stack([atoms[:, first], atoms[:, second]], dim=1)
