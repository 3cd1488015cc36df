"""Observables of single molecules or atoms, for the local estimator."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from stable_plugin.md.system import System
from stable_plugin.observables.base import Observable


class LocalObservable(Observable):
    """An observable that every site of a frame has: a molecule, or an atom with its surroundings.

    Its value for a frame is the mean over the sites; with the local estimator each site is a sample of its own.
    """

    @abstractmethod
    def per_site(self, positions: Tensor, site_index: Tensor) -> Tensor:
        """The observable of each site.

        Args:
            positions: (n_frames, n_atoms, 3) in Å.
            site_index: Site that each atom belongs to, (n_atoms,).

        Returns:
            (n_frames, n_sites, n_values), NaN where a site has no such value.
        """


class _BondKinds(LocalObservable):
    """One value per kind of bond, by its two elements: the mean over those bonds that touch the site."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._system: System | None = None
        self.kinds: list[str] = []

    def bind(self, system: System, reference: Tensor) -> None:
        if len(system.bonds) == 0:
            raise ValueError(f"{type(self).__name__} finds no bonds: give System.from_atoms(..., bonds=...).")
        names = ["-".join(sorted(system.symbols[atom] for atom in pair)) for pair in system.bonds.tolist()]
        self._system, self.kinds = system, sorted(set(names))
        self._kind = torch.tensor([self.kinds.index(name) for name in names], device=system.bonds.device)
        self._prepare(reference)
        super().bind(system, reference)

    def _prepare(self, reference: Tensor) -> None:
        """Take more from the reference than the target."""

    def per_frame(self, positions: Tensor) -> Tensor:
        system = self._known_system()
        return self.per_site(positions, system.molecules).nanmean(dim=1)

    def per_site(self, positions: Tensor, site_index: Tensor) -> Tensor:
        system = self._known_system()
        lengths = system.distances(positions, system.bonds)
        values = self._of_bonds(lengths)
        site_index, bonds = site_index.to(values.device), system.bonds.to(values.device)
        ends = site_index[bonds]
        kind = self._kind.to(values.device)
        n_sites, n_kinds = int(site_index.max()) + 1, len(self.kinds)
        total = values.new_zeros(len(values), n_sites * n_kinds)
        count = values.new_zeros(n_sites * n_kinds)
        # A bond within a site counts once, one between two sites for both.
        second = ends[:, 1] != ends[:, 0]
        for site, chosen in ((ends[:, 0], torch.ones_like(second)), (ends[:, 1], second)):
            place = (site * n_kinds + kind)[chosen]
            total.index_add_(1, place, values[:, chosen])
            count.index_add_(0, place, torch.ones_like(place, dtype=count.dtype))
        return (total / count).reshape(len(values), n_sites, n_kinds)  # 0/0 is NaN: no such bond

    @abstractmethod
    def _of_bonds(self, lengths: Tensor) -> Tensor:
        """Values of bonds, (n_frames, n_bonds), from their lengths."""

    def _known_system(self) -> System:
        if self._system is None:
            raise RuntimeError(f"{type(self).__name__} has no system yet: call bind(system, reference) first.")
        return self._system


class LocalBondLengths(_BondKinds):
    """Mean length of each kind of bond, such as O-H, in a molecule, in Å.

    Source: the O-H bond lengths of single water molecules of Raja et al., TMLR 2025, arXiv:2402.13984.

    Args:
        target: Mean lengths, (n_kinds,) in Å, kinds in alphabetical order.

    Example:
        >>> import torch
        >>> from ase.build import molecule
        >>> from stable_plugin import LocalBondLengths, System
        >>> pair = molecule("H2O")
        >>> far = molecule("CH4")
        >>> far.positions += 5.0
        >>> pair += far
        >>> positions = torch.tensor(pair.positions)[None]
        >>> lengths = LocalBondLengths()
        >>> lengths.bind(System.from_atoms(pair), reference=positions)
        >>> lengths.update(positions)
        >>> dict(zip(lengths.kinds, [round(length, 3) for length in lengths.compute().tolist()]))
        {'C-H': 1.09, 'H-O': 0.969}
    """

    def _of_bonds(self, lengths: Tensor) -> Tensor:
        return lengths

    def axis(self) -> dict[str, Any]:
        return {"kind": "bars", "x": self.kinds, "xlabel": "bond", "ylabel": "length / Å"}


class LocalBondAmplitudes(_BondKinds):
    """Mean square deviation of each kind of bond from its mean length in the reference, in a molecule, in Å².

    Args:
        target: Mean square deviations, (n_kinds,) in Å², kinds in alphabetical order.
    """

    def _prepare(self, reference: Tensor) -> None:
        system = self._known_system()
        lengths = system.distances(reference, system.bonds).mean(dim=0)
        of_kind = lengths.new_zeros(len(self.kinds)).index_add(0, self._kind, lengths)
        counts = torch.bincount(self._kind, minlength=len(self.kinds))
        self._mean_lengths = (of_kind / counts)[self._kind]

    def _of_bonds(self, lengths: Tensor) -> Tensor:
        return (lengths - self._mean_lengths.to(lengths)).square()

    def axis(self) -> dict[str, Any]:
        return {"kind": "bars", "x": self.kinds, "xlabel": "bond", "ylabel": "mean square deviation / Å²"}
