"""CHGNet models applied to replicas of one system."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from ase.data import chemical_symbols
from torch import Tensor

from stable_plugin.md.neighbors import Edges
from stable_plugin.md.system import System
from stable_plugin.models.base import Potential
from stable_plugin.models.family import not_installed
from stable_plugin.runtime.console import quiet_stdout

try:
    with quiet_stdout():
        from chgnet.model.model import BatchedGraph
except ImportError as error:
    raise not_installed("chgnet", "CHGNet", "chgnet") from error


class CHGNetPotential(Potential):
    """A CHGNet model applied to replicas of one periodic system.

    The graphs of bonds and angles are those of CHGNet's own converter, made of the neighbor graph of all replicas at once.
    Predicted magnetic moments are not used.

    Source of the model: Deng et al., Nat. Mach. Intell. 5, 1031 (2023), arXiv:2302.14231.

    Args:
        module: A ``CHGNet``.
        system: What is simulated.

    Raises:
        ValueError: If the system is not periodic, the model does not know one of its elements, or it has no energies of atoms
            or elements.
    """

    # Any: nn.Module does not declare the attributes of a CHGNet.
    module: Any
    uncompilable = "CHGNet models, whose graphs change at every step"

    def __init__(self, module: Any, system: System) -> None:
        super().__init__(module, system)
        if not system.periodic:
            raise ValueError(
                "CHGNet is a model of crystals, but the system is not periodic: put it into a cell with vacuum around it and "
                "set pbc=True."
            )
        n_known = module.atom_embedding.embedding.num_embeddings
        unknown = sorted({number for number in system.numbers.tolist() if number > n_known})
        if unknown:
            names = ", ".join(chemical_symbols[number] for number in unknown)
            raise ValueError(
                f"the model does not know the element(s) {names} (it knows those up to "
                f"{chemical_symbols[n_known]}): use a model that was trained on them."
            )
        if module.composition_model is not None and not hasattr(module.composition_model, "fc"):
            raise ValueError(
                f"the composition model is a {type(module.composition_model).__name__}, which has no energies of elements: use "
                "a model with AtomRef, or none."
            )
        if not module.mlp_first:
            raise ValueError("the model has no energies of atoms (mlp_first=False): use a model with mlp_first=True.")

    @property
    def cutoff(self) -> float:
        return float(self.module.graph_converter.atom_graph_cutoff)

    @property
    def constant_energy(self) -> float:
        return float(self._references[self.system.numbers - 1].double().sum()) if self._has_references else 0.0

    def shift_energies(self, per_atom_eV: float) -> bool:
        return self.shift_isolated_atoms({int(number): per_atom_eV for number in self.system.numbers.unique()})

    @torch.no_grad()
    def shift_isolated_atoms(self, shifts: Mapping[int, float]) -> bool:
        if not self._has_references:
            return False
        for number, shift in shifts.items():
            self._references[number - 1] += shift
        return True

    def atomic_energies(self, positions: Tensor, edges: Edges) -> Tensor:
        graph = self._graph(positions, edges)
        energies = self.module._compute(graph, return_site_energies=True)["site_energies"]
        return torch.stack(energies).double()

    @property
    def _has_references(self) -> bool:
        return self.module.composition_model is not None

    @property
    def _references(self) -> Tensor:
        """Energies of isolated atoms in eV, from hydrogen on."""
        weight: Tensor = self.module.composition_model.fc.weight
        return weight.view(-1)

    def _graph(self, positions: Tensor, edges: Edges) -> BatchedGraph:
        """Return the graphs of bonds (pairs within the cutoff) and of angles (pairs of short bonds with a common atom)."""
        module, flat = self.module, positions.reshape(-1, 3)
        first, second, vectors = _undirected(flat, edges, self.cutoff)
        lengths = torch.linalg.vector_norm(vectors, dim=1)
        n_bonds = len(lengths)
        # From each atom of a bond to the other one, as a unit vector, in the direction that CHGNet has.
        center, neighbor = torch.cat([first, second]), torch.cat([second, first])
        directions = torch.cat([-vectors, vectors]) / torch.cat([lengths, lengths])[:, None]
        bond = torch.arange(n_bonds, device=flat.device).repeat(2)
        short = lengths < float(module.graph_converter.bond_graph_cutoff)
        one, other = _angles(center, bond, short, len(flat))
        angle_bases = (
            module.angle_basis_expansion(directions[one], directions[other]) if len(one) else flat.new_zeros(0)
        )
        n_replicas, n_atoms = positions.shape[:2]
        return BatchedGraph(
            atomic_numbers=self.system.numbers.repeat(n_replicas),
            bond_bases_ag=module.bond_basis_expansion.rbf_expansion_ag(lengths),
            bond_bases_bg=module.bond_basis_expansion.rbf_expansion_bg(lengths),
            angle_bases=angle_bases,
            batched_atom_graph=torch.stack([center, neighbor], dim=1),
            batched_bond_graph=torch.stack([center[one], bond[one], bond[other]], dim=1),
            atom_owners=torch.arange(n_replicas, device=flat.device).repeat_interleave(n_atoms),
            directed2undirected=bond,
            atom_positions=list(positions),
            strains=[],
            volumes=[],
        )


def _undirected(positions: Tensor, edges: Edges, cutoff: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the bonds within the cutoff, each once: both atoms, and the vectors from the first to the second.

    Args:
        positions: Of all replicas, (n, 3) in Å.
        edges: Directed edges.
        cutoff: In Å.
    """
    sender, receiver = edges.index
    vectors = positions[receiver] - positions[sender] + edges.shifts
    # An atom and its own image: the first component of the shift that is not zero decides.
    signs = edges.shifts.sign()
    forward = 4 * signs[:, 0] + 2 * signs[:, 1] + signs[:, 2] > 0
    once = (sender < receiver) | ((sender == receiver) & forward)
    chosen = (once & (vectors.detach().square().sum(dim=1) < cutoff**2)).nonzero().squeeze(1)
    return sender[chosen], receiver[chosen], vectors[chosen]


def _angles(center: Tensor, bond: Tensor, short: Tensor, n_atoms: int) -> tuple[Tensor, Tensor]:
    """Return all ordered pairs of different directed bonds that leave the same atom, if both are short.

    Args:
        center: Atom that each directed bond leaves, (n_directed,).
        bond: Bond that it is a direction of, (n_directed,).
        short: Whether each bond is short, (n_bonds,).
        n_atoms: Number of atoms of all replicas.
    """
    chosen = short[bond].nonzero().squeeze(1)
    chosen = chosen[center[chosen].argsort(stable=True)]
    of_atom = torch.bincount(center[chosen], minlength=n_atoms)
    n_partners = of_atom[center[chosen]]
    start = (of_atom.cumsum(0) - of_atom)[center[chosen]]
    one = torch.arange(len(chosen), device=center.device).repeat_interleave(n_partners)
    within = torch.arange(len(one), device=center.device) - (n_partners.cumsum(0) - n_partners)[one]
    other = start[one] + within
    different = one != other
    return chosen[one[different]], chosen[other[different]]
