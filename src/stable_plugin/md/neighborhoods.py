"""Neighborhoods: parts of a large system that are samples of their own in the local estimator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from stable_plugin.md.cells import each_cell, optional
from stable_plugin.md.system import System
from stable_plugin.runtime import checks
from stable_plugin.runtime.representation import ReprMixin


@dataclass(frozen=True)
class Members:
    """Atoms of each sample as a sparse list of entries; an atom may be in several samples.

    Attributes:
        sample: Sample of each entry, (n_entries,).
        atom: Atom of each entry, numbered over all frames as frame * n_atoms + atom, (n_entries,).
        n_samples: Number of samples.
        shape: Number of frames, and of atoms in each.
    """

    sample: Tensor
    atom: Tensor
    n_samples: int
    shape: tuple[int, int]

    def __len__(self) -> int:
        return self.n_samples

    def energies(self, atomic: Tensor) -> Tensor:
        """Return the energy of each sample, (n_samples,), as the sum of its atomic energies (n_frames, n_atoms)."""
        return atomic.new_zeros(self.n_samples).index_add(0, self.sample, atomic.flatten()[self.atom])

    def scatter(self, weights: Tensor) -> Tensor:
        """Return weights of the atomic energies, (n_frames, n_atoms), from those of the samples, (n_samples,).

        This is the transpose of :meth:`energies`.
        """
        flat = weights.new_zeros(self.shape[0] * self.shape[1])
        return flat.index_add(0, self.atom, weights[self.sample]).reshape(self.shape)

    def select(self, chosen: Tensor) -> Members:
        """Return some of the samples, ``chosen`` (n_chosen,) without repetition, in that order."""
        new_index = torch.full((self.n_samples,), -1, dtype=torch.long, device=self.sample.device)
        new_index[chosen] = torch.arange(len(chosen), device=self.sample.device)
        kept = new_index[self.sample] >= 0
        return Members(new_index[self.sample][kept], self.atom[kept], len(chosen), self.shape)


class Neighborhoods(ReprMixin, ABC):
    """Base class of divisions of a frame into sites, each with the atoms whose energies belong to its observable.

    Subclasses implement :attr:`site_index` and ``_memberships``.

    Source: the localized Boltzmann estimator of Raja et al., TMLR 2025, arXiv:2402.13984, section 4.3.
    """

    def __init__(self) -> None:
        self._system: System | None = None

    @property
    def system(self) -> System:
        """System passed to :meth:`bind`.

        Raises:
            RuntimeError: If there is none yet.
        """
        if self._system is None:
            raise RuntimeError(f"{type(self).__name__} has no system yet: call bind(system) first.")
        return self._system

    def bind(self, system: System) -> None:
        """Set up the neighborhoods for a system.

        Args:
            system: The system.

        Raises:
            ValueError: If the system has no such neighborhoods.
        """
        self._system = system

    @property
    @abstractmethod
    def site_index(self) -> Tensor:
        """Site of each atom, (n_atoms,), from zero without gaps."""

    @abstractmethod
    def _memberships(self, frame: Tensor, cell: Tensor | None = None) -> Tensor:
        """Return whether an atom is in the neighborhood of a site, (n_sites, n_atoms), for one frame (n_atoms, 3)."""

    def members(self, positions: Tensor, cell: Tensor | None = None) -> Members:
        """Return the neighborhoods of all sites of all frames; sample = frame * n_sites + site.

        Args:
            positions: (n_frames, n_atoms, 3) in Å.
            cell: Cells of the frames, (n_frames, 3, 3) in Å; that of the system if None.
        """
        n_frames, n_atoms, _ = positions.shape
        n_sites = int(self.site_index.max()) + 1
        empty = torch.empty(0, dtype=torch.long, device=positions.device)
        samples, atoms = [empty], [empty]
        for index, (frame, own) in enumerate(zip(positions, each_cell(cell, n_frames), strict=True)):
            site, atom = self._memberships(frame, *optional(own)).nonzero(as_tuple=True)
            samples.append(site + index * n_sites)
            atoms.append(atom + index * n_atoms)
        return Members(torch.cat(samples), torch.cat(atoms), n_frames * n_sites, (n_frames, n_atoms))


class Molecules(Neighborhoods):
    """Each molecule is a site, and its neighborhood is the molecule itself.

    Example:
        >>> from ase.build import molecule
        >>> from stable_plugin import Molecules, System
        >>> dimer = molecule("N2")
        >>> other = molecule("N2")
        >>> other.positions[:, 0] += 4.0
        >>> dimer += other
        >>> molecules = Molecules()
        >>> molecules.bind(System.from_atoms(dimer))
        >>> molecules.site_index.tolist()
        [0, 0, 1, 1]
    """

    def bind(self, system: System) -> None:
        if system.is_extended and int(system.molecules.max()) == 0:
            raise ValueError(
                f"{self!r} finds no molecules: the bonds of the system extend across the whole cell, as in a metal or an "
                "ionic crystal. Use AtomsWithin(radius_A=...), or pass the bonds of the molecules, "
                "System.from_atoms(..., bonds=...)."
            )
        if int(system.molecules.max()) == 0:
            raise ValueError(
                f"{self!r} finds a single molecule, for which the local estimator is the global one: remove local."
            )
        super().bind(system)
        self._site_index = system.molecules

    @property
    def site_index(self) -> Tensor:
        return self._site_index

    def _memberships(self, frame: Tensor, cell: Tensor | None = None) -> Tensor:
        sites = torch.arange(int(self.site_index.max()) + 1, device=self.site_index.device)
        return (sites[:, None] == self.site_index).to(frame.device)


class NearestMolecules(Molecules):
    """Each molecule is a site, and its neighborhood are the molecules with the nearest geometric centers.

    Args:
        n: Number of molecules in a neighborhood, including the one at its center.

    Raises:
        ValueError: If ``n`` is not a positive integer.
    """

    def __init__(self, n: int = 5) -> None:
        super().__init__()
        self.n = checks.count("n", n)

    def bind(self, system: System) -> None:
        super().bind(system)
        n_molecules = int(system.molecules.max()) + 1
        if self.n > n_molecules:
            raise ValueError(
                f"n={self.n} is more than the {n_molecules} molecules of the system: pass at most that number."
            )
        self._anchor = torch.stack([(self.site_index == site).nonzero()[0, 0] for site in range(n_molecules)])

    def _memberships(self, frame: Tensor, cell: Tensor | None = None) -> Tensor:
        site_index, anchor = self.site_index.to(frame.device), self._anchor.to(frame.device)
        # Relative to the first atom of the molecule, so that the center of a molecule across the boundary is right.
        pairs = torch.stack([torch.arange(len(site_index)).to(site_index), anchor[site_index]], dim=1)
        arms = self.system.separations(frame, pairs, cell)
        count = torch.bincount(site_index)
        offset = torch.zeros(len(count), 3).to(frame).index_add(0, site_index, arms) / count[:, None]
        centers = frame[anchor] + offset
        pairs = torch.cartesian_prod(torch.arange(len(count)), torch.arange(len(count)))
        distances = self.system.distances(centers, pairs, cell).reshape(len(count), len(count))
        near = torch.zeros_like(distances, dtype=torch.bool).scatter_(
            1, distances.topk(self.n, largest=False).indices, True
        )
        return near[:, site_index]


class AtomsWithin(Neighborhoods):
    """Each atom is a site, and its neighborhood are the atoms within a radius.

    Args:
        radius_A: Radius in Å; in a periodic system at most half the smallest height of the cell.

    Raises:
        ValueError: If ``radius_A`` is not positive.
    """

    def __init__(self, radius_A: float) -> None:
        super().__init__()
        self.radius_A = checks.number("radius_A", radius_A, above=0)

    def bind(self, system: System) -> None:
        if self.radius_A > system.minimum_image_cutoff:
            raise ValueError(
                f"radius_A={self.radius_A:g} is more than the cell allows, {system.minimum_image_cutoff:.2f} Å (half its "
                "smallest height): pass a smaller radius_A, or use a larger cell."
            )
        super().bind(system)
        self._site_index = torch.arange(system.n_atoms, device=system.bonds.device)

    @property
    def site_index(self) -> Tensor:
        return self._site_index

    def _memberships(self, frame: Tensor, cell: Tensor | None = None) -> Tensor:
        n_atoms = len(frame)
        pairs = torch.cartesian_prod(torch.arange(n_atoms), torch.arange(n_atoms))
        return self.system.distances(frame, pairs, cell).reshape(n_atoms, n_atoms) <= self.radius_A


def even_sample(
    deviation: Tensor, n_bins: int, per_bin: int, generator: torch.Generator, largest: Tensor | None = None
) -> Tensor:
    """Return indices of samples drawn evenly from the bins of their deviation, ascending, (n_drawn,).

    Stratified sampling: broken neighborhoods are rare, so a uniform sample would miss most of them. The mean over such a
    sample is not that of the ensemble, because broken neighborhoods are overrepresented; the bias vanishes with them.

    Source: Raja et al., TMLR 2025, arXiv:2402.13984: 100 bins, 5 samples per bin and replica.

    Args:
        deviation: Deviation of each sample from the target, (n_samples,), not negative.
        n_bins: Number of bins from zero to ``largest``.
        per_bin: Most samples to draw from a bin.
        generator: Random number generator, on the CPU.
        largest: Upper end of the last bin; the largest deviation if None.
    """
    largest = deviation.max() if largest is None else largest
    width = largest.clamp_min(torch.finfo(deviation.dtype).tiny) / n_bins
    bins = (deviation / width).long().clamp_max(n_bins - 1)
    order = torch.randperm(len(deviation), generator=generator).to(deviation.device)
    # The rank of each sample within its bin is random, because the stable sort keeps the shuffled order.
    shuffled = bins[order]
    by_bin = shuffled.argsort(stable=True)
    counts = torch.bincount(shuffled, minlength=n_bins)
    first = counts.cumsum(0) - counts
    rank = torch.arange(len(by_bin), device=deviation.device) - first[shuffled[by_bin]]
    return order[by_bin[rank < per_bin]].sort().values
