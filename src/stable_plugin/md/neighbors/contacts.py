"""Close contacts in large systems, whose pairs are too many to list."""

from __future__ import annotations

import torch
from torch import Tensor

from stable_plugin.md.neighbors.pairs import pairs_within
from stable_plugin.md.system import System


class ContactSearch:
    """Search for close pairs of atoms, linear in the number of atoms.

    Args:
        system: System that the positions belong to.
        labels: Groups of atoms, (n_atoms,); pairs within a group are left out. No groups if None.
        excluded: Pairs that are left out, (n_pairs, 2). None if None.
    """

    def __init__(self, system: System, labels: Tensor | None = None, excluded: Tensor | None = None) -> None:
        self.system = system
        self._labels = None if labels is None else labels.cpu()
        pairs = torch.empty(0, 2, dtype=torch.long) if excluded is None else excluded.cpu()
        self._excluded = pairs.amin(dim=1) * system.n_atoms + pairs.amax(dim=1) if len(pairs) else pairs[:, 0]

    def pairs(self, positions: Tensor, radius: float, cell: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the pairs within a radius: replica and atoms of each, and its distance.

        Args:
            positions: (n_replicas, n_atoms, 3) in Å.
            radius: In Å.
            cell: Cells of the replicas, (n_replicas, 3, 3) in Å; that of the system if None.

        Returns:
            Replicas, (n_pairs,); atoms, (n_pairs, 2); distances, (n_pairs,) in Å.
        """
        found = pairs_within(positions, radius, self.system, cell)
        n_atoms = self.system.n_atoms
        atoms = torch.stack([found.first, found.second], dim=1) % n_atoms
        kept = atoms[:, 0] != atoms[:, 1]
        if self._labels is not None:
            ends = self._labels.to(atoms.device)[atoms]
            kept &= ends[:, 0] != ends[:, 1]
        if len(self._excluded):
            keys = atoms.amin(dim=1) * n_atoms + atoms.amax(dim=1)
            kept &= ~torch.isin(keys, self._excluded.to(keys.device))
        return found.replica[kept], atoms[kept], found.squared_distances(positions)[kept].sqrt()

    def shortest(
        self, positions: Tensor, radius: float, cell: Tensor | None = None
    ) -> tuple[Tensor, list[tuple[int, ...]]]:
        """Return the shortest distance of each replica, and its two atoms.

        Args:
            positions: (n_replicas, n_atoms, 3) in Å.
            radius: In Å.
            cell: Cells of the replicas, (n_replicas, 3, 3) in Å; that of the system if None.

        Returns:
            (n_replicas,) in Å, at most the radius, NaN for positions that are not finite; and n_replicas tuples, empty
            where no pair is within the radius.
        """
        replica, atoms, distances = self.pairs(positions, radius, cell)
        shortest, closest = [], []
        for index, frame in enumerate(positions):
            own = replica == index
            near = distances[own]
            limit = frame.new_tensor(radius) + 0.0 * frame.sum()  # NaN if the frame is not finite
            shortest.append(torch.minimum(near.amin(), limit) if len(near) else limit)
            closest.append(tuple(atoms[own][near.argmin()].tolist()) if len(near) else ())
        return torch.stack(shortest), closest
