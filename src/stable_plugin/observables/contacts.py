"""Shortest distances between molecules, for the local estimator."""

from __future__ import annotations

from abc import abstractmethod
from itertools import combinations_with_replacement
from typing import Any

import torch
from torch import Tensor

from stable_plugin.md.system import System, each_cell
from stable_plugin.observables.local import LocalObservable


class _ShortestDistances(LocalObservable):
    """Base class of one value per pair of elements, from the shortest distance of a site's atoms to all others."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kinds: list[str] = []

    def bind(self, system: System, reference: Tensor, cell: Tensor | None = None) -> None:
        if int(system.molecules.max()) == 0:
            raise ValueError(f"{type(self).__name__} finds no two molecules in the system: use it for liquids.")
        elements = sorted(set(system.symbols))
        pairs = list(combinations_with_replacement(range(len(elements)), 2))
        element = torch.tensor([elements.index(symbol) for symbol in system.symbols])
        smaller, larger = torch.minimum(element[:, None], element), torch.maximum(element[:, None], element)
        kind = torch.stack([(smaller == one) & (larger == other) for one, other in pairs])
        molecules = system.molecules.cpu()
        # An element that occurs in a single molecule, such as one ion in water, has no partner of its own kind.
        present = (kind & (molecules[:, None] != molecules)).flatten(1).any(dim=1)
        self._system, self._kind = system, kind[present]
        self.kinds = [
            f"{elements[one]}-{elements[other]}"
            for (one, other), flag in zip(pairs, present.tolist(), strict=True)
            if flag
        ]
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

        They are clipped to half the smallest height of the cell, up to which minimum-image distances are exact.
        """
        system, n_atoms = self.system, positions.shape[1]
        atoms = torch.arange(n_atoms)
        pairs = torch.cartesian_prod(atoms, atoms)
        between = site_index[:, None] != site_index
        counted = self._kind.to(positions.device) & between
        rows = []
        for frame, own_cell in zip(positions, each_cell(cell, len(positions)), strict=True):
            distances = system.distances(frame, pairs, own_cell).reshape(n_atoms, n_atoms)
            by_atom = torch.where(counted, distances, torch.inf).amin(dim=2)  # (n_kinds, n_atoms)
            by_site = by_atom.new_full((len(by_atom), int(site_index.max()) + 1), torch.inf)
            rows.append(by_site.scatter_reduce(1, site_index.expand_as(by_atom), by_atom, "amin").T)
        shortest = torch.stack(rows)
        return torch.where(shortest.isinf(), torch.nan, shortest.clamp_max(system.minimum_image_cutoff))


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
