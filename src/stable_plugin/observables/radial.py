"""Radial distribution functions of periodic systems."""

from __future__ import annotations

from collections.abc import Sequence
from math import pi
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stable_plugin.md.system import System
from stable_plugin.observables.base import smeared_counts
from stable_plugin.observables.local import LocalObservable
from stable_plugin.runtime import checks

LONGEST_A = 8.0
"""Range in Å that is looked at if none is asked for, where the cell allows it."""

MAX_DISTANCES = 4_000_000
"""Distances held in memory at a time."""


class RadialDistribution(LocalObservable):
    """Radial distribution function g(r): pairs per shell over those of an ideal gas of the same density.

    Exact up to half the smallest height of the cell. With the local estimator each site has its own, of the pairs that
    touch it.

    Args:
        pair: Two elements, such as ``("O", "H")``; all atoms if not given.
        r_max: Upper end of the range in Å; what the cell allows if not given, at most 8 Å.
        bin_width: In Å.
        smearing: Standard deviation of the Gaussians in Å.
        intramolecular: Whether pairs of the same molecule count.
        target: Values per bin.
        target_file: Text file with two columns, r in Å and g(r), such as a measured curve; interpolated onto the bins.

    Raises:
        ValueError: If a number is out of range, or the file is not such a curve.

    Example:
        >>> import torch
        >>> from ase.build import bulk
        >>> from stable_plugin import RadialDistribution, System
        >>> copper = bulk("Cu", cubic=True) * 3
        >>> g = RadialDistribution(bin_width=0.1, smearing=0.02)
        >>> g.bind(System.from_atoms(copper), reference=torch.tensor(copper.positions)[None])
        >>> round(g.centers[g.target.argmax()].item(), 2)  # a/sqrt(2)
        2.55
    """

    def __init__(
        self,
        pair: Sequence[str] | None = None,
        r_max: float | None = None,
        bin_width: float = 0.05,
        smearing: float = 0.03,
        intramolecular: bool = True,
        target: Sequence[float] | None = None,
        target_file: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(target, **kwargs)
        if pair is not None and (isinstance(pair, str) or len(pair) != 2):
            raise ValueError(f"pair={pair!r} is not two elements: give for instance ('O', 'H').")
        if target is not None and target_file is not None:
            raise ValueError("target and target_file are both given: keep one.")
        self.pair = None if pair is None else (pair[0], pair[1])
        self.bin_width = checks.number("bin_width", bin_width, above=0)
        self.smearing = checks.number("smearing", smearing, above=0, at_most=LONGEST_A)
        self.r_max = None if r_max is None else checks.number("r_max", r_max, at_least=2 * bin_width)
        self.intramolecular = intramolecular
        self._curve = None if target_file is None else read_curve(target_file)
        self.centers = torch.empty(0, dtype=torch.float64)
        self._system: System | None = None
        self._pairs = torch.empty(0, 2, dtype=torch.long)

    @property
    def name(self) -> str:
        """Name in logs and reports, with the elements."""
        words = "radial_distribution" if self.intramolecular else "intermolecular_radial_distribution"
        return words if self.pair is None else f"{words}_{self.pair[0]}_{self.pair[1]}"

    def bind(self, system: System, reference: Tensor) -> None:
        if not all(system.pbc):
            raise ValueError(
                f"{type(self).__name__} needs a system that is periodic in all directions (pbc={list(system.pbc)}), which "
                "has a density: use DistanceDistribution for molecules."
            )
        r_max = min(LONGEST_A, system.minimum_image_cutoff) if self.r_max is None else self.r_max
        if r_max > system.minimum_image_cutoff:
            raise ValueError(
                f"r_max={r_max:g} is more than the cell allows, {system.minimum_image_cutoff:.2f} Å (half its smallest height): lower it, "
                "or use a larger cell."
            )
        n_bins = int(r_max / checks.bins("bin_width", self.bin_width, r_max) + 1e-9)
        if n_bins < 2:
            raise ValueError(f"bin_width={self.bin_width:g} is more than half of the range, {r_max:.2f} Å: lower it.")
        self.centers = (torch.arange(n_bins, dtype=torch.float64) + 0.5) * self.bin_width
        self._system, self._pairs = system, self._chosen_pairs(system)
        shells = 4.0 / 3.0 * pi * self.bin_width**3 * (torch.arange(n_bins + 1, dtype=torch.float64) ** 3).diff()
        volume = torch.linalg.det(system.cell.double()).abs().cpu()
        self._per_pair = volume / (shells * len(self._pairs))
        if self._curve is not None:
            self._given_target = _interpolated(self._curve, self.centers)
        super().bind(system, reference)

    def per_frame(self, positions: Tensor) -> Tensor:
        one_row = torch.zeros(len(self._chosen()), dtype=torch.long, device=positions.device)
        return self._histograms(positions, [one_row], n_rows=1)[:, 0]

    def per_site(self, positions: Tensor, site_index: Tensor) -> Tensor:
        n_sites = int(site_index.max()) + 1
        ends = site_index.to(positions.device)[self._chosen().to(positions.device)].unbind(dim=1)
        # Half of each pair is its either end's, so that the sites' mean is the frame's g(r).
        return 0.5 * n_sites * self._histograms(positions, ends, n_sites)

    def _histograms(self, positions: Tensor, ends: Sequence[Tensor], n_rows: int) -> Tensor:
        """g(r) of the pairs of each row, (n_frames, n_rows, n_bins); ``ends`` say in which rows a pair counts."""
        system, pairs, centres = self._system, self._chosen().to(positions.device), self.centers.to(positions)
        assert system is not None
        reach = self.centers[-1].item() + self.bin_width + 6.0 * self.smearing
        per_pair: Tensor = self._per_pair.to(positions)
        frames = []
        for frame in positions:
            counts = frame.new_zeros(n_rows, len(centres))
            for part in torch.arange(len(pairs), device=pairs.device).split(MAX_DISTANCES):
                distances = system.distances(frame, pairs[part])
                near = distances < reach
                for rows in ends:
                    counts += smeared_counts(distances[near], rows[part[near]], n_rows, centres, self.smearing)
            frames.append(counts)
        return torch.stack(frames) * per_pair

    def _chosen(self) -> Tensor:
        if self._system is None:
            raise RuntimeError(f"{type(self).__name__} has no system yet: call bind(system, reference) first.")
        return self._pairs

    def axis(self) -> dict[str, Any]:
        pair = "" if self.pair is None else f" {self.pair[0]}-{self.pair[1]}"
        return {"kind": "curve", "x": self.centers.tolist(), "xlabel": f"distance{pair} / Å", "ylabel": "g(r)"}

    def _chosen_pairs(self, system: System) -> Tensor:
        pairs = torch.combinations(torch.arange(system.n_atoms), 2)
        if self.pair is not None:
            unknown = sorted(set(self.pair) - set(system.symbols))
            if unknown:
                raise ValueError(
                    f"pair={self.pair} names {', '.join(unknown)}, but the system consists of "
                    f"{', '.join(sorted(set(system.symbols)))}."
                )
            first, second = (torch.tensor([symbol == end for symbol in system.symbols]) for end in self.pair)
            one, other = pairs.unbind(dim=1)
            pairs = pairs[(first[one] & second[other]) | (second[one] & first[other])]
        if not self.intramolecular:
            molecules = system.molecules.cpu()[pairs]
            pairs = pairs[molecules[:, 0] != molecules[:, 1]]
        if len(pairs) == 0:
            raise ValueError(f"{self.name} finds no pair of atoms in the system: choose other elements.")
        return pairs


def read_curve(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Read r in Å and g(r) from a text file with two columns; lines that begin with # are left out.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it does not hold such a curve.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"target_file={str(path)!r} is not a file: give a text file with columns r and g(r).")
    try:
        table = np.loadtxt(path, ndmin=2)
    except ValueError as error:
        raise ValueError(f"target_file={str(path)!r} is not a table of numbers ({error}).") from error
    problem = None
    if table.shape[0] < 2 or table.shape[1] != 2:
        problem = f"has {table.shape[0]} rows of {table.shape[1]} numbers: give at least two rows of r and g(r)"
    elif not np.isfinite(table).all():
        problem = "holds numbers that are not finite: remove those rows"
    elif (table < 0).any():
        problem = "holds a negative r or g(r): a radial distribution has none"
    elif (np.diff(table[:, 0]) <= 0).any():
        problem = "is not sorted by r: let each r be larger than the one before"
    if problem is not None:
        raise ValueError(f"target_file={str(path)!r} {problem}.")
    return table[:, 0], table[:, 1]


def _interpolated(curve: tuple[np.ndarray, np.ndarray], centres: Tensor) -> Tensor:
    r, g = curve
    first, last = centres[0].item(), centres[-1].item()
    # Below the first r that is given nothing comes that close, if the curve begins at zero.
    if r[-1] < last or (r[0] > first and g[0] > 0.0):
        raise ValueError(
            f"target_file covers r from {r[0]:g} to {r[-1]:g} Å, but the observable's bins go from {first:g} to "
            f"{last:g} Å: set r_max, or give the whole curve."
        )
    return torch.from_numpy(np.interp(centres.numpy(), r, g))
