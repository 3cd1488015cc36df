"""Centers of mass of molecules, for what moves molecules as a whole."""

from __future__ import annotations

import torch
from torch import Tensor

from stable_plugin.md.system import System


class MolecularCenters:
    """Centers of mass of the molecules of a system; an atom of a framework, an ion or a free atom is its own center.

    Args:
        system: The system. Its molecules must be shorter than half the smallest height of the cell.

    Attributes:
        number: Number of centers.
    """

    def __init__(self, system: System) -> None:
        self._system = system
        molecule = system.molecules.cpu()
        own = torch.arange(system.n_atoms)
        first = torch.zeros_like(own).scatter_reduce(0, molecule, own, "amin", include_self=False)[molecule]
        first = torch.where(system.framework.cpu(), own, first)
        self.number = len(first.unique())
        masses = system.masses.cpu().double()
        total = torch.zeros_like(masses).index_add(0, first, masses)
        device = system.masses.device
        self._pairs = torch.stack([own, first], dim=1).to(device)
        self._shares = (masses / total[first]).to(system.masses)

    def __call__(self, positions: Tensor, cell: Tensor | None = None) -> Tensor:
        """Return for each atom the center of its molecule, (n_frames, n_atoms, 3) in Å.

        Where a molecule is split by the boundary, each atom has the center of the image of the molecule it is part of.

        Args:
            positions: (n_frames, n_atoms, 3) in Å.
            cell: Cells of the frames, (n_frames, 3, 3) in Å; that of the system if None.
        """
        from_first = self._system.separations(positions, self._pairs, cell)
        weighted = self._shares.to(positions)[:, None] * from_first
        first = self._pairs[:, 1].to(positions.device)
        mean = torch.zeros_like(positions).index_add(1, first, weighted)
        return positions - from_first + mean[:, first]
