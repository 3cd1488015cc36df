"""Derivatives of the energy with respect to a homogeneous strain: the virial and the stress."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stable_plugin.md.neighbors import Edges


def strained(positions: Tensor, edges: Edges, moved: Tensor | None = None) -> tuple[Tensor, Tensor, Edges]:
    """Return a strain of zero, and positions and edges as differentiable functions of it.

    Positions, edges across the boundary, and cells are multiplied by 1 + ε from the right.

    Args:
        positions: (n_replicas, n_atoms, 3) in Å.
        edges: Neighbor graph of these replicas, with the cells for a model that builds its own graph.
        moved: What the strain multiplies in the place of positions, (n_replicas, n_atoms, 3) in Å, such as the centers of
            molecules, which then move as a whole.

    Returns:
        The strain ε, (n_replicas, 3, 3), positions and edges.
    """
    strain = positions.new_zeros(len(positions), 3, 3).requires_grad_(True)
    replica = edges.index[1] // positions.shape[1]
    cell = None if edges.cell is None else edges.cell + edges.cell @ strain.to(edges.cell)
    shifts = edges.shifts + (edges.shifts[:, None] @ strain[replica])[:, 0]
    at = positions + (positions if moved is None else moved).detach() @ strain
    return strain, at, Edges(edges.index, shifts, cell)


def symmetric(derivative: Tensor) -> Tensor:
    """Return the symmetric part of matrices, (..., 3, 3): a rotation costs no energy."""
    return 0.5 * (derivative + derivative.mT)


def strain_derivative(
    energies: Callable[[Tensor, Edges], Tensor],
    positions: Tensor,
    edges: Edges,
    *,
    moved: Tensor | None = None,
    create_graph: bool = False,
) -> Tensor:
    r"""Return the derivative of energies with respect to the strain of their cells.

    The derivative is taken at a strain of zero, see :func:`strained`, and symmetrized.

    Source: Thompson, Plimpton and Mattson, J. Chem. Phys. 131, 154107 (2009).

    Args:
        energies: Takes positions and edges, returns (n_replicas,) in eV.
        positions: (n_replicas, n_atoms, 3) in Å.
        edges: Neighbor graph of these replicas, with the cells for a model that builds its own graph.
        moved: What the strain multiplies in the place of positions, (n_replicas, n_atoms, 3) in Å, such as the centers of
            molecules, which then move as a whole.
        create_graph: Whether the derivative is to be differentiated for the parameters of the model.

    Returns:
        ∂U/∂ε, (n_replicas, 3, 3) in eV. Its negative is the virial.
    """
    with torch.enable_grad():
        strain, at, strained_edges = strained(positions.detach(), edges, moved)
        values = energies(at, strained_edges)
        (derivative,) = torch.autograd.grad(values.sum(), strain, create_graph=create_graph)
    return symmetric(derivative)
