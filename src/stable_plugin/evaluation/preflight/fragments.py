"""Which atoms move along when a bond, an angle or a contact changes."""

from __future__ import annotations

import networkx as nx
import torch
from torch import Tensor

from stable_plugin.md.system import System


class Fragments:
    """Parts of molecules that are moved as rigid bodies.

    Args:
        system: The system.
    """

    def __init__(self, system: System) -> None:
        self._n_atoms = system.n_atoms
        self._molecule = system.molecules.tolist()
        self._graph: nx.Graph[int] = nx.Graph()
        self._graph.add_nodes_from(range(system.n_atoms))
        self._graph.add_edges_from(system.bonds.tolist())
        bridges = {tuple(sorted(bond)) for bond in nx.bridges(self._graph)}
        self._rings = [bond for bond in self._graph.edges if tuple(sorted(bond)) not in bridges]
        self._trees = self._graph.copy()
        self._trees.remove_edges_from(self._rings)

    def of_bond(self, first: int, second: int) -> Tensor:
        """Return how far each atom moves when a bond is stretched, in units of the stretch, (n_atoms,).

        The smaller side of the bond moves as a whole. In a ring, both ends move by half of it, with their substituents.

        Args:
            first: One end, which moves by negative numbers.
            second: The other end.
        """
        sides = {sign: self._side(*ends) for sign, ends in ((-1.0, (second, first)), (1.0, (first, second)))}
        if second in sides[-1.0] or not self._is_bridge(first, second):
            return self._weights({sign / 2: side for sign, side in sides.items()})
        smaller = min(sides, key=lambda sign: (len(sides[sign]), sign))
        return self._weights({smaller: sides[smaller]})

    def of_angle(self, first: int, center: int, second: int) -> tuple[Tensor, int]:
        """Return the atoms that move with one end of an angle, (n_atoms,), and which end that is.

        Args:
            first: One end.
            center: The center.
            second: The other end.
        """
        sides = {end: self._side(center, end) for end in (first, second)}
        end = min(sides, key=lambda end: (not self._is_bridge(center, end), len(sides[end])))
        return self._weights({1.0: sides[end]}), end

    def of_contact(self, first: int, second: int) -> Tensor:
        """Return how far each atom moves when two atoms move apart, in units of the change of their distance, (n_atoms,).

        The smaller molecule moves as a whole. Within a molecule or a framework, both atoms move by half of it, with the
        atoms that are bonded to them alone.

        Args:
            first: One atom, which moves by negative numbers.
            second: The other atom.
        """
        if self._molecule[first] == self._molecule[second]:
            return self._weights({-0.5: self._with_terminal_atoms(first), 0.5: self._with_terminal_atoms(second)})
        sides = {sign: self._molecule_of(atom) for sign, atom in ((-1.0, first), (1.0, second))}
        smaller = min(sides, key=lambda sign: (len(sides[sign]), sign))
        return self._weights({smaller: sides[smaller]})

    def _side(self, center: int, end: int) -> set[int]:
        """Return the atoms that hang on one end of a bond; those that do without rings, if the bond is in a ring."""
        if not self._is_bridge(center, end):
            return set(nx.node_connected_component(self._trees, end))
        self._graph.remove_edge(center, end)
        side = set(nx.node_connected_component(self._graph, end))
        self._graph.add_edge(center, end)
        return side

    def _is_bridge(self, first: int, second: int) -> bool:
        return bool(self._trees.has_edge(first, second))

    def _molecule_of(self, atom: int) -> set[int]:
        return {other for other, label in enumerate(self._molecule) if label == self._molecule[atom]}

    def _with_terminal_atoms(self, atom: int) -> set[int]:
        return {atom, *(other for other in self._graph[atom] if self._graph.degree(other) == 1)}

    def _weights(self, sides: dict[float, set[int]]) -> Tensor:
        weights = torch.zeros(self._n_atoms, dtype=torch.float64)
        for weight, atoms in sides.items():
            weights[sorted(atoms)] = weight
        return weights
