"""How close molecules come to each other, for the local estimator."""

from __future__ import annotations

from abc import abstractmethod
from itertools import combinations_with_replacement
from typing import Any

import torch
from torch import Tensor

from stable_plugin.md.system import System
from stable_plugin.observables.local import LocalObservable


class _Closest(LocalObservable):
    """One value per pair of elements: of the shortest distance between a site's atoms and all others."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._system: System | None = None
        self.kinds: list[str] = []

    def bind(self, system: System, reference: Tensor) -> None:
        if system.is_extended or int(system.molecules.max()) == 0:
            raise ValueError(f"{type(self).__name__} finds no two molecules in the system: use it for liquids.")
        elements = sorted(set(system.symbols))
        pairs = list(combinations_with_replacement(range(len(elements)), 2))
        element = torch.tensor([elements.index(symbol) for symbol in system.symbols])
        smaller, larger = torch.minimum(element[:, None], element), torch.maximum(element[:, None], element)
        kind = torch.stack([(smaller == one) & (larger == other) for one, other in pairs])
        molecules = system.molecules.cpu()
        # A lone atom of its kind, one H3O+ among waters say, meets no other.
        met = (kind & (molecules[:, None] != molecules)).flatten(1).any(dim=1)
        self._system, self._kind = system, kind[met]
        self.kinds = [
            f"{elements[one]}-{elements[other]}" for (one, other), flag in zip(pairs, met.tolist(), strict=True) if flag
        ]
        self._prepare(reference)
        super().bind(system, reference)

    def _prepare(self, reference: Tensor) -> None:
        """Take more from the reference than the target."""

    def per_frame(self, positions: Tensor) -> Tensor:
        return self.per_site(positions, self._known_system().molecules).nanmean(dim=1)

    def per_site(self, positions: Tensor, site_index: Tensor) -> Tensor:
        return self._of_distances(self._shortest(positions, site_index.to(positions.device)))

    @abstractmethod
    def _of_distances(self, shortest: Tensor) -> Tensor:
        """Values from shortest distances, both (n_frames, n_sites, n_kinds)."""

    def _shortest(self, positions: Tensor, site_index: Tensor) -> Tensor:
        """Shortest distances, (n_frames, n_sites, n_kinds), NaN where a site has no such atom.

        At most what the cell lets one see for sure: half its smallest height.
        """
        system, n_atoms = self._known_system(), positions.shape[1]
        atoms = torch.arange(n_atoms)
        pairs = torch.cartesian_prod(atoms, atoms)
        apart = site_index[:, None] != site_index
        counted = self._kind.to(positions.device) & apart
        rows = []
        for frame in positions:
            distances = system.distances(frame, pairs).reshape(n_atoms, n_atoms)
            by_atom = torch.where(counted, distances, torch.inf).amin(dim=2)  # (n_kinds, n_atoms)
            by_site = by_atom.new_full((len(by_atom), int(site_index.max()) + 1), torch.inf)
            rows.append(by_site.scatter_reduce(1, site_index.expand_as(by_atom), by_atom, "amin").T)
        shortest = torch.stack(rows)
        return torch.where(shortest.isinf(), torch.nan, shortest.clamp_max(system.minimum_image_cutoff))

    def _known_system(self) -> System:
        if self._system is None:
            raise RuntimeError(f"{type(self).__name__} has no system yet: call bind(system, reference) first.")
        return self._system


class LocalContacts(_Closest):
    """Shortest distance from a molecule to the others, for each pair of elements, in Å.

    Args:
        target: Mean shortest distances, (n_kinds,) in Å, kinds in alphabetical order.

    Example:
        >>> import torch
        >>> from ase.build import molecule
        >>> from stable_plugin import LocalContacts, System
        >>> pair = molecule("N2")
        >>> other = molecule("N2")
        >>> other.positions[:, 0] += 3.0
        >>> pair += other
        >>> positions = torch.tensor(pair.positions)[None]
        >>> contacts = LocalContacts()
        >>> contacts.bind(System.from_atoms(pair), reference=positions)
        >>> contacts.kinds, contacts.target.tolist()
        (['N-N'], [3.0])
    """

    def _of_distances(self, shortest: Tensor) -> Tensor:
        return shortest

    def axis(self) -> dict[str, Any]:
        return {"kind": "bars", "x": self.kinds, "xlabel": "atoms", "ylabel": "closest approach / Å"}


class LocalContactAmplitudes(_Closest):
    """Mean square deviation of a molecule's shortest distances from their mean in the reference, in Å².

    Molecules that run into each other are rare; they hardly move the mean, and multiply this.

    Args:
        target: Mean square deviations, (n_kinds,) in Å², kinds in alphabetical order.
    """

    def _prepare(self, reference: Tensor) -> None:
        self._means = self._shortest(reference, self._known_system().molecules.to(reference.device)).nanmean(dim=(0, 1))

    def _of_distances(self, shortest: Tensor) -> Tensor:
        return (shortest - self._means.to(shortest)).square()

    def axis(self) -> dict[str, Any]:
        return {"kind": "bars", "x": self.kinds, "xlabel": "atoms", "ylabel": "mean square deviation / Å²"}
