"""Forces as minus the gradient of an energy."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stable_plugin.md.neighbors import Edges


def differentiated(
    energies: Callable[[Tensor, Edges], Tensor], positions: Tensor, edges: Edges
) -> tuple[Tensor, Tensor]:
    """Return energies and forces of an energy function.

    Args:
        energies: Takes positions and edges, returns (n_replicas,) in eV.
        positions: (n_replicas, n_atoms, 3) in Å.
        edges: Neighbor graph of these replicas.

    Returns:
        Energies (n_replicas,) in eV, and minus their gradient (n_replicas, n_atoms, 3) in eV/Å.
    """
    with torch.enable_grad():
        positions = positions.detach().requires_grad_(True)
        values = energies(positions, edges)
        (gradient,) = torch.autograd.grad(values.sum(), positions)
    return values.detach(), -gradient
