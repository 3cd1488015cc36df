"""Searches for the pairs of atoms that are closer than a cutoff: linear in the atoms on the CPU, over all pairs on a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import vesin
from torch import Tensor

MAX_DISTANCES = 1 << 24
"""Most distances that are computed at a time on a device; bounds the memory."""


def search_on_cpu(positions: Tensor, cutoff: float, cells: Tensor, pbc: Sequence[bool]) -> Tensor:
    """Return every pair within the cutoff, images included; the cost is linear in the number of atoms.

    Args:
        positions: Inside the cell, where the search is exact, (n_replicas, n_atoms, 3) in Å; NaN in replicas that get no pairs.
        cutoff: In Å.
        cells: Cell of each replica, or one that serves all, (n_cells, 3, 3) in Å.
        pbc: Periodic directions.

    Returns:
        Replica, both atoms, and the image of the second in cells: integers, (n_pairs, 6).
    """
    search = vesin.NeighborList(cutoff=cutoff, full_list=False)
    tables = [torch.empty(0, 6, dtype=torch.long)]
    for replica, (frame, cell) in enumerate(zip(positions, cells.expand(len(positions), 3, 3), strict=True)):
        if frame.isnan().any():
            continue
        found = search.compute(frame.numpy(), cell.numpy(), list(pbc), quantities="ijS")
        first, second, image = (torch.from_numpy(part.astype("int64")) for part in found)
        tables.append(
            torch.cat([torch.full_like(first, replica)[:, None], first[:, None], second[:, None], image], dim=1)
        )
    return torch.cat(tables)


def search_on_device(positions: Tensor, cutoff: float, cells: Tensor, pbc: Sequence[bool]) -> Tensor:
    """Return the same as :func:`search_on_cpu`, by all pairs of atoms and images of all replicas at once.

    Args:
        positions: Inside the cell, (n_replicas, n_atoms, 3) in Å; NaN in replicas that get no pairs.
        cutoff: In Å.
        cells: Cell of each replica, or one that serves all, (n_cells, 3, 3) in Å, on the CPU.
        pbc: Periodic directions.
    """
    device, n_atoms = positions.device, positions.shape[1]
    inside = _images(cutoff, cells, pbc)
    forward = inside[len(inside) // 2 + 1 :]  # one of each image and its opposite, without the cell itself
    first, second = torch.triu_indices(n_atoms, n_atoms, offset=1, device=device)
    atoms = torch.arange(n_atoms, device=device)
    tables = []
    # Two different atoms are a pair with every image, and an atom with every other one of its own.
    for one, other, images in ((first, second, inside), (atoms, atoms, forward)):
        vectors = positions[:, other] - positions[:, one]
        n_images = max(1, MAX_DISTANCES // max(1, vectors[..., 0].numel()))
        for chosen in images.split(n_images):
            shifts = (chosen.double() @ cells).to(device)
            squares = (vectors[:, :, None] + shifts[:, None]).square().sum(dim=-1)
            replica, pair, image = (squares < cutoff**2).nonzero().unbind(dim=1)  # false for NaN
            ends = torch.stack([replica, one[pair], other[pair]], dim=1)
            tables.append(torch.cat([ends, chosen.to(device)[image]], dim=1))
    return torch.cat(tables)


def _images(cutoff: float, cells: Tensor, pbc: Sequence[bool]) -> Tensor:
    """Return the images that an atom inside the cell can have within the cutoff of another, in cells, (n_images, 3)."""
    inverse_heights = torch.linalg.inv(cells).norm(dim=1).amax(dim=0)
    reach = (cutoff * inverse_heights).ceil().long() * torch.tensor(pbc)
    return torch.cartesian_prod(*(torch.arange(-most, most + 1) for most in reach.tolist()))
