"""Parts of a large system that count as samples of their own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from stable_plugin.md.system import System
from stable_plugin.runtime import checks


@dataclass(frozen=True)
class Members:
    """Which atoms of which frame make up each sample; an atom may be in several.

    Attributes:
        sample: WindowData of each entry, (n_entries,).
        atom: Its atom, counted through the frames as frame * n_atoms + atom, (n_entries,).
        n_samples: Number of samples.
        shape: Number of frames and of atoms in each.
    """

    sample: Tensor
    atom: Tensor
    n_samples: int
    shape: tuple[int, int]

    def __len__(self) -> int:
        return self.n_samples

    def energies(self, atomic: Tensor) -> Tensor:
        """Sums over the atoms of each sample, (n_samples,), of atomic energies (n_frames, n_atoms)."""
        return atomic.new_zeros(self.n_samples).index_add(0, self.sample, atomic.flatten()[self.atom])

    def scatter(self, weights: Tensor) -> Tensor:
        """Weights of atomic energies, (n_frames, n_atoms), that weigh the samples' energies by ``weights`` (n_samples,)."""
        flat = weights.new_zeros(self.shape[0] * self.shape[1])
        return flat.index_add(0, self.atom, weights[self.sample]).reshape(self.shape)

    def select(self, chosen: Tensor) -> Members:
        """Some of the samples, ``chosen`` (n_chosen,) without repetition, in that order."""
        place = torch.full((self.n_samples,), -1, dtype=torch.long, device=self.sample.device)
        place[chosen] = torch.arange(len(chosen), device=self.sample.device)
        kept = place[self.sample] >= 0
        return Members(place[self.sample][kept], self.atom[kept], len(chosen), self.shape)


class Neighborhoods(ABC):
    """Divides a frame into sites, each with the atoms whose energy its observable is paired with.

    Source: the localized Boltzmann estimator of Raja et al., TMLR 2025, arXiv:2402.13984, section 4.3.
    """

    def __init__(self) -> None:
        self._system: System | None = None

    @property
    def system(self) -> System:
        """What :meth:`bind` was called with."""
        if self._system is None:
            raise RuntimeError(f"{type(self).__name__} has no system yet: call bind(system) first.")
        return self._system

    def bind(self, system: System) -> None:
        """Take the system.

        Raises:
            ValueError: If it has no such neighbourhoods.
        """
        self._system = system

    @property
    @abstractmethod
    def site_index(self) -> Tensor:
        """Site that each atom belongs to, (n_atoms,), from zero without gaps."""

    @abstractmethod
    def _belongs(self, frame: Tensor) -> Tensor:
        """Atoms of each site's neighbourhood, (n_sites, n_atoms), for one frame (n_atoms, 3)."""

    def members(self, positions: Tensor) -> Members:
        """The neighbourhoods of all sites of all frames, sample = frame * n_sites + site.

        Args:
            positions: (n_frames, n_atoms, 3) in Å.
        """
        n_frames, n_atoms, _ = positions.shape
        n_sites = int(self.site_index.max()) + 1
        none = torch.empty(0, dtype=torch.long, device=positions.device)
        samples, atoms = [none], [none]
        for index, frame in enumerate(positions):
            site, atom = self._belongs(frame).nonzero(as_tuple=True)
            samples.append(site + index * n_sites)
            atoms.append(atom + index * n_atoms)
        return Members(torch.cat(samples), torch.cat(atoms), n_frames * n_sites, (n_frames, n_atoms))

    def __str__(self) -> str:
        return f"{type(self).__name__}()"


class Molecules(Neighborhoods):
    """Every molecule by itself."""

    def bind(self, system: System) -> None:
        if system.is_extended:
            raise ValueError(
                f"{self} finds no molecules: the bonds of the system go on across the whole box, as in a metal or an "
                "ionic crystal. Use AtomsWithin(radius_A=...), or give the bonds of the molecules."
            )
        if int(system.molecules.max()) == 0:
            raise ValueError(
                f"{self} finds a single molecule, which the global estimator serves better: leave local out."
            )
        super().bind(system)
        self._site_index = system.molecules

    @property
    def site_index(self) -> Tensor:
        return self._site_index

    def _belongs(self, frame: Tensor) -> Tensor:
        sites = torch.arange(int(self.site_index.max()) + 1, device=self.site_index.device)
        return (sites[:, None] == self.site_index).to(frame.device)


class NearestMolecules(Molecules):
    """Every molecule with those nearest to it, by their geometric centres.

    Args:
        n: Molecules in a neighbourhood, the central one included.
    """

    def __init__(self, n: int = 5) -> None:
        super().__init__()
        self.n = checks.count("n", n)

    def bind(self, system: System) -> None:
        super().bind(system)
        n_molecules = int(system.molecules.max()) + 1
        if self.n > n_molecules:
            raise ValueError(f"n={self.n} is more than the {n_molecules} molecules of the system: lower it.")
        self._anchor = torch.stack([(self.site_index == site).nonzero()[0, 0] for site in range(n_molecules)])

    def _belongs(self, frame: Tensor) -> Tensor:
        site_index, anchor = self.site_index.to(frame.device), self._anchor.to(frame.device)
        # From the molecule's first atom, so that one on the boundary is whole.
        arms = self.system.separations(
            frame, torch.stack([torch.arange(len(site_index)).to(site_index), anchor[site_index]], dim=1)
        )
        count = torch.bincount(site_index)
        offset = torch.zeros(len(count), 3).to(frame).index_add(0, site_index, arms) / count[:, None]
        centres = frame[anchor] + offset
        pairs = torch.cartesian_prod(torch.arange(len(count)), torch.arange(len(count)))
        distances = self.system.distances(centres, pairs).reshape(len(count), len(count))
        near = torch.zeros_like(distances, dtype=torch.bool).scatter_(
            1, distances.topk(self.n, largest=False).indices, True
        )
        return near[:, site_index]

    def __str__(self) -> str:
        return f"NearestMolecules(n={self.n})"


class AtomsWithin(Neighborhoods):
    """Every atom with those within a radius.

    Args:
        radius_A: In Å; in a periodic system at most half the smallest height of the cell.
    """

    def __init__(self, radius_A: float) -> None:
        super().__init__()
        self.radius_A = checks.number("radius_A", radius_A, above=0)

    def bind(self, system: System) -> None:
        if self.radius_A > system.minimum_image_cutoff:
            raise ValueError(
                f"radius_A={self.radius_A:g} is more than the cell allows, {system.minimum_image_cutoff:.2f} Å (half its smallest "
                "height): lower it, or use a larger cell."
            )
        super().bind(system)
        self._site_index = torch.arange(system.n_atoms, device=system.bonds.device)

    @property
    def site_index(self) -> Tensor:
        return self._site_index

    def _belongs(self, frame: Tensor) -> Tensor:
        n_atoms = len(frame)
        pairs = torch.cartesian_prod(torch.arange(n_atoms), torch.arange(n_atoms))
        return self.system.distances(frame, pairs).reshape(n_atoms, n_atoms) <= self.radius_A

    def __str__(self) -> str:
        return f"AtomsWithin(radius_A={self.radius_A:g})"


def even_sample(
    deviation: Tensor, n_bins: int, per_bin: int, generator: torch.Generator, largest: Tensor | None = None
) -> Tensor:
    """Samples drawn evenly over bins of their deviation, so that the rare broken ones are not swamped.

    The mean over such a sample is not that of the ensemble: broken neighbourhoods count for more than their share, which
    is what makes them felt, and vanishes as they do.

    Source: Raja et al., TMLR 2025, arXiv:2402.13984: 100 bins, 5 samples per bin and replica.

    Args:
        deviation: Of each sample, (n_samples,), not negative.
        n_bins: Bins from zero to the largest deviation.
        per_bin: Samples drawn from each bin, at most.
        generator: Source of the random numbers, on the CPU.
        largest: Where the last bin ends; at the largest deviation if not given.

    Returns:
        Indices of the samples, ascending, (n_drawn,).
    """
    largest = deviation.max() if largest is None else largest
    width = largest.clamp_min(torch.finfo(deviation.dtype).tiny) / n_bins
    bins = (deviation / width).long().clamp_max(n_bins - 1)
    order = torch.randperm(len(deviation), generator=generator).to(deviation.device)
    # Ranks within each bin, in random order.
    shuffled = bins[order]
    by_bin = shuffled.argsort(stable=True)
    counts = torch.bincount(shuffled, minlength=n_bins)
    first = counts.cumsum(0) - counts
    rank = torch.arange(len(by_bin), device=deviation.device) - first[shuffled[by_bin]]
    return order[by_bin[rank < per_bin]].sort().values
