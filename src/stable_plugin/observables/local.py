"""Observables of single molecules or atoms, for the local estimator."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from stable_plugin.md.system import System
from stable_plugin.observables.base import Observable


class LocalObservable(Observable):
    r"""Base class of observables of a site: a molecule, or an atom with its neighborhood.

    .. math:: g(\mathbf{r}_f) = \frac{1}{S} \sum_{s=1}^{S} g_s(\mathbf{r}_f)

    The value of a frame is the mean over its sites. With the local estimator, each site is a sample of its own.

    Source: the localized Boltzmann estimator of Raja et al., TMLR 2025, arXiv:2402.13984, section 4.3.
    """

    @abstractmethod
    def per_site(self, positions: Tensor, site_index: Tensor, cell: Tensor | None = None) -> Tensor:
        """Return the observable of each site, (n_frames, n_sites, n_values); NaN for a value that a site does not have.

        Args:
            positions: (n_frames, n_atoms, 3) in Å.
            site_index: Site that each atom belongs to, (n_atoms,).
            cell: Cells of the frames, (n_frames, 3, 3) in Å; that of the system if None.
        """


class _BondTypes(LocalObservable):
    """Base class of one value per bond type, the pair of elements: the mean over the bonds of the site."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kinds: list[str] = []

    def bind(self, system: System, reference: Tensor, cell: Tensor | None = None) -> None:
        if len(system.bonds) == 0:
            raise ValueError(
                f"{type(self).__name__} finds no bonds in the system: pass them, System.from_atoms(..., bonds=...)."
            )
        names = ["-".join(sorted(system.symbols[atom] for atom in pair)) for pair in system.bonds.tolist()]
        self._system, self.kinds = system, sorted(set(names))
        self._kind = torch.tensor([self.kinds.index(name) for name in names], device=system.bonds.device)
        self._prepare(reference, cell)
        super().bind(system, reference, cell)

    def _prepare(self, reference: Tensor, cell: Tensor | None = None) -> None:
        """Compute what the observable needs from the reference in addition to the target."""

    def per_frame(self, positions: Tensor, cell: Tensor | None = None) -> Tensor:
        return self.per_site(positions, self.system.molecules, cell).nanmean(dim=1)

    def per_site(self, positions: Tensor, site_index: Tensor, cell: Tensor | None = None) -> Tensor:
        lengths = self.system.distances(positions, self.system.bonds, cell)
        values = self._bond_values(lengths)
        site_index, bonds = site_index.to(values.device), self.system.bonds.to(values.device)
        ends = site_index[bonds]
        kind = self._kind.to(values.device)
        n_sites, n_kinds = int(site_index.max()) + 1, len(self.kinds)
        total = values.new_zeros(len(values), n_sites * n_kinds)
        count = values.new_zeros(n_sites * n_kinds)
        # A bond within a site counts once, a bond between two sites counts for both.
        between = ends[:, 1] != ends[:, 0]
        for site, chosen in ((ends[:, 0], torch.ones_like(between)), (ends[:, 1], between)):
            flat_index = (site * n_kinds + kind)[chosen]
            total.index_add_(1, flat_index, values[:, chosen])
            count.index_add_(0, flat_index, torch.ones_like(flat_index, dtype=count.dtype))
        return (total / count).reshape(len(values), n_sites, n_kinds)  # 0/0 = NaN marks a missing bond type

    @abstractmethod
    def _bond_values(self, lengths: Tensor) -> Tensor:
        """Return the values of the bonds from their lengths, both (n_frames, n_bonds)."""


class LocalBondLengths(_BondTypes):
    r"""Mean length of each bond type, such as O-H, in a molecule, in Å.

    .. math:: g_{s,k} = \frac{1}{|B_{s,k}|} \sum_{b \in B_{s,k}} r_b \quad \text{over the bonds of type } k \text{ at site } s

    Source: the O-H bond lengths of single water molecules of Raja et al., TMLR 2025, arXiv:2402.13984.

    Input of ``update``: ``positions``, (n_frames, n_atoms, 3) in Å.

    Output of ``compute``: (n_kinds,) in Å; the bond types are the attribute ``kinds``, in alphabetical order.

    Args:
        target: Mean lengths, (n_kinds,) in Å; those of the reference frames if None.

    Example:
        >>> import torch
        >>> from ase.build import molecule
        >>> from stable_plugin import LocalBondLengths, System
        >>> mixture = molecule("H2O")
        >>> methane = molecule("CH4")
        >>> methane.positions += 5.0
        >>> mixture += methane
        >>> positions = torch.tensor(mixture.positions)[None]
        >>> lengths = LocalBondLengths()
        >>> lengths.bind(System.from_atoms(mixture), reference=positions)
        >>> lengths.update(positions)
        >>> dict(zip(lengths.kinds, [round(length, 3) for length in lengths.compute().tolist()]))
        {'C-H': 1.09, 'H-O': 0.969}
    """

    def _bond_values(self, lengths: Tensor) -> Tensor:
        return lengths

    def axis(self) -> dict[str, Any]:
        return {"kind": "bars", "x": self.kinds, "xlabel": "bond", "ylabel": "length / Å"}


class LocalBondAmplitudes(_BondTypes):
    r"""Mean square deviation of each bond type in a molecule from its mean length in the reference, in Å².

    .. math:: g_{s,k} = \frac{1}{|B_{s,k}|} \sum_{b \in B_{s,k}} \left( r_b - \langle r \rangle_{k,\mathrm{ref}} \right)^2

    Input of ``update``: ``positions``, (n_frames, n_atoms, 3) in Å.

    Output of ``compute``: (n_kinds,) in Å²; the bond types are the attribute ``kinds``, in alphabetical order.

    Args:
        target: Mean square deviations, (n_kinds,) in Å²; those of the reference frames if None.

    Example:
        >>> import torch
        >>> from ase.build import molecule
        >>> from stable_plugin import LocalBondAmplitudes, System
        >>> nitrogen = molecule("N2")  # 1.13 Å long
        >>> positions = torch.tensor(nitrogen.positions)[None]
        >>> amplitudes = LocalBondAmplitudes()
        >>> amplitudes.bind(System.from_atoms(nitrogen), reference=positions)
        >>> amplitudes.update(torch.cat([0.9 * positions, 1.1 * positions]))
        >>> amplitudes.kinds, round(amplitudes.compute().item(), 4)
        (['N-N'], 0.0128)
    """

    def _prepare(self, reference: Tensor, cell: Tensor | None = None) -> None:
        lengths = self.system.distances(reference, self.system.bonds, cell).mean(dim=0)
        total = lengths.new_zeros(len(self.kinds)).index_add(0, self._kind, lengths)
        counts = torch.bincount(self._kind, minlength=len(self.kinds))
        self._mean_lengths = (total / counts)[self._kind]

    def _bond_values(self, lengths: Tensor) -> Tensor:
        return (lengths - self._mean_lengths.to(lengths)).square()

    def axis(self) -> dict[str, Any]:
        return {"kind": "bars", "x": self.kinds, "xlabel": "bond", "ylabel": "mean square deviation / Å²"}
