"""Shortest distances between molecules, for the local estimator."""

from __future__ import annotations

from abc import abstractmethod
from itertools import combinations_with_replacement
from typing import Any

import torch
from torch import Tensor

from stable_plugin.md.cells import each_cell
from stable_plugin.md.neighbors.contacts import ContactSearch
from stable_plugin.md.system import System
from stable_plugin.observables.local import LocalObservable

MAX_LISTED_ATOMS = 1000
"""Most atoms of a system whose distances are all computed; close pairs are searched for in a larger one."""

MAX_SEARCH_A = 8.0
"""Longest contact in Å that is searched for in a large system."""


class _ShortestDistances(LocalObservable):
    """Base class of one value per pair of elements, from the shortest distance of a site's atoms to all others."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kinds: list[str] = []

    def bind(self, system: System, reference: Tensor, cell: Tensor | None = None) -> None:
        if int(system.molecules.max()) == 0:
            raise ValueError(f"{type(self).__name__} finds no two molecules in the system: use it for liquids.")
        elements = sorted(set(system.symbols))
        kinds = list(combinations_with_replacement(range(len(elements)), 2))
        element = torch.tensor([elements.index(symbol) for symbol in system.symbols])
        molecules = system.molecules.cpu()
        present = [kind for kind in kinds if _is_present(kind, element, molecules)]
        self._system = system
        self._kind_of = torch.full((len(elements), len(elements)), -1, dtype=torch.long)
        for index, (one, other) in enumerate(present):
            self._kind_of[one, other] = self._kind_of[other, one] = index
        self._element = element
        self.kinds = [f"{elements[one]}-{elements[other]}" for one, other in present]
        self._prepare(reference, cell)
        super().bind(system, reference, cell)

    def _prepare(self, reference: Tensor, cell: Tensor | None = None) -> None:
        """Compute what the observable needs from the reference in addition to the target."""

    def per_frame(self, positions: Tensor, cell: Tensor | None = None) -> Tensor:
        return self.per_site(positions, self.system.molecules, cell).nanmean(dim=1)

    def per_site(self, positions: Tensor, site_index: Tensor, cell: Tensor | None = None) -> Tensor:
        return self._values(self._shortest(positions, site_index.to(positions.device), cell))

    @abstractmethod
    def _values(self, shortest: Tensor) -> Tensor:
        """Return the values from the shortest distances, both (n_frames, n_sites, n_kinds)."""

    def _shortest(self, positions: Tensor, site_index: Tensor, cell: Tensor | None = None) -> Tensor:
        """Return the shortest distances, (n_frames, n_sites, n_kinds); NaN for a pair that a site does not have.

        They are clipped to half the smallest height of the cell, up to which minimum-image distances are exact, and in a
        large system to ``MAX_SEARCH_A``.
        """
        if positions.shape[1] > MAX_LISTED_ATOMS:
            return self._searched(positions, site_index, cell)
        system, n_atoms = self.system, positions.shape[1]
        atoms = torch.arange(n_atoms)
        pairs = torch.cartesian_prod(atoms, atoms)
        between = site_index[:, None] != site_index
        kind = self._kind_of[self._element[:, None], self._element]
        counted = (kind == torch.arange(len(self.kinds))[:, None, None]).to(positions.device) & between
        rows = []
        for frame, own_cell in zip(positions, each_cell(cell, len(positions)), strict=True):
            distances = system.distances(frame, pairs, own_cell).reshape(n_atoms, n_atoms)
            by_atom = torch.where(counted, distances, torch.inf).amin(dim=2)  # (n_kinds, n_atoms)
            by_site = by_atom.new_full((len(by_atom), int(site_index.max()) + 1), torch.inf)
            rows.append(by_site.scatter_reduce(1, site_index.expand_as(by_atom), by_atom, "amin").T)
        shortest = torch.stack(rows)
        return torch.where(shortest.isinf(), torch.nan, shortest.clamp_max(system.minimum_image_cutoff))

    def _searched(self, positions: Tensor, site_index: Tensor, cell: Tensor | None) -> Tensor:
        """Return the same from a search of close pairs, which needs linear memory."""
        radius = min(MAX_SEARCH_A, self.system.minimum_image_cutoff)
        n_sites, n_kinds = int(site_index.max()) + 1, len(self.kinds)
        search = ContactSearch(self.system, labels=site_index)
        rows = []
        for frame, own_cell in zip(positions, each_cell(cell, len(positions)), strict=True):
            _, atoms, distances = search.pairs(frame[None], radius, None if own_cell is None else own_cell[None])
            kind = self._kind_of.to(atoms.device)[tuple(self._element.to(atoms.device)[atoms].unbind(dim=1))]
            flat = self._missing(site_index).to(positions)
            for end in atoms.unbind(dim=1):
                flat = flat.scatter_reduce(0, site_index[end] * n_kinds + kind, distances, "amin")
            rows.append(flat.reshape(n_sites, n_kinds))
        return torch.stack(rows).clamp_max(radius)

    def _missing(self, site_index: Tensor) -> Tensor:
        """Return inf for each kind that a site has, and NaN for the others, (n_sites * n_kinds,)."""
        sites, n_elements = site_index.cpu(), len(self._kind_of)
        count = torch.zeros(int(sites.max()) + 1, n_elements, dtype=torch.long)
        count.index_put_((sites, self._element), torch.ones_like(sites), accumulate=True)
        beside = count.sum(dim=0) > count
        values = torch.full((len(count), len(self.kinds)), torch.nan)
        for one, other in (self._kind_of >= 0).nonzero().tolist():
            has = (count[:, one] > 0) & beside[:, other]
            values[has, int(self._kind_of[one, other])] = torch.inf
        return values.flatten()


def _is_present(kind: tuple[int, int], element: Tensor, molecules: Tensor) -> bool:
    """Return whether different molecules have atoms of the two elements; a single ion has no partner of its own kind."""
    one, other = (molecules[element == end].unique() for end in kind)
    return len(one) > 0 and len(other) > 0 and len(torch.cat([one, other]).unique()) > 1


class LocalContacts(_ShortestDistances):
    r"""Shortest distance from a molecule to the others, for each pair of elements, in Å.

    .. math:: g_{s,k} = \min_{i \in s,\ j \notin s,\ (i, j) \text{ of kind } k} r_{ij}

    Input of ``update``: ``positions``, (n_frames, n_atoms, 3) in Å.

    Output of ``compute``: (n_kinds,) in Å; the pairs of elements are the attribute ``kinds``, in alphabetical order.

    Args:
        target: Mean shortest distances, (n_kinds,) in Å; those of the reference frames if None.

    Example:
        >>> import torch
        >>> from ase.build import molecule
        >>> from stable_plugin import LocalContacts, System
        >>> dimer = molecule("N2")
        >>> other = molecule("N2")
        >>> other.positions[:, 0] += 3.0
        >>> dimer += other
        >>> positions = torch.tensor(dimer.positions)[None]
        >>> contacts = LocalContacts()
        >>> contacts.bind(System.from_atoms(dimer), reference=positions)
        >>> contacts.kinds, contacts.target.tolist()
        (['N-N'], [3.0])
    """

    def _values(self, shortest: Tensor) -> Tensor:
        return shortest

    def axis(self) -> dict[str, Any]:
        return {"kind": "bars", "x": self.kinds, "xlabel": "atoms", "ylabel": "closest approach / Å"}


class LocalContactAmplitudes(_ShortestDistances):
    r"""Mean square deviation of a molecule's shortest distances from their mean in the reference, in Å².

    .. math:: g_{s,k} = \left( d_{s,k} - \langle d_k \rangle_\mathrm{ref} \right)^2

    with the shortest distances d of :class:`LocalContacts`. Rare collisions of molecules hardly change the mean of d, but
    they dominate its mean square deviation.

    Input of ``update``: ``positions``, (n_frames, n_atoms, 3) in Å.

    Output of ``compute``: (n_kinds,) in Å²; the pairs of elements are the attribute ``kinds``, in alphabetical order.

    Args:
        target: Mean square deviations, (n_kinds,) in Å²; those of the reference frames if None.

    Example:
        >>> import torch
        >>> from ase.build import molecule
        >>> from stable_plugin import LocalContactAmplitudes, System
        >>> dimer = molecule("N2")
        >>> other = molecule("N2")
        >>> other.positions[:, 0] += 3.0
        >>> dimer += other
        >>> positions = torch.tensor(dimer.positions)[None]
        >>> amplitudes = LocalContactAmplitudes()
        >>> amplitudes.bind(System.from_atoms(dimer), reference=positions)
        >>> closer = positions.clone()
        >>> closer[0, 2:, 0] -= 0.5
        >>> amplitudes.update(closer)
        >>> amplitudes.compute().item()
        0.25
    """

    def _prepare(self, reference: Tensor, cell: Tensor | None = None) -> None:
        self._means = self._shortest(reference, self.system.molecules.to(reference.device), cell).nanmean(dim=(0, 1))

    def _values(self, shortest: Tensor) -> Tensor:
        return (shortest - self._means.to(shortest)).square()

    def axis(self) -> dict[str, Any]:
        return {"kind": "bars", "x": self.kinds, "xlabel": "atoms", "ylabel": "mean square deviation / Å²"}
