"""Radial distribution functions of periodic systems."""

from __future__ import annotations

from collections.abc import Sequence
from math import pi
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stable_plugin.md.cells import each_cell
from stable_plugin.md.system import System
from stable_plugin.observables.base import smeared_counts
from stable_plugin.observables.local import LocalObservable
from stable_plugin.observables.measured import MeasuredCurve
from stable_plugin.runtime import checks

DEFAULT_R_MAX = 8.0
"""Default range in Å, if the cell allows it."""

TOLERANCE = 0.02
"""Default difference from a measured g(r) that counts as one, beside the error of the measurement: that of the estimate from
some picoseconds of a hundred molecules."""

MAX_DISTANCES = 4_000_000
"""Most distances held in memory at a time."""


class RadialDistribution(LocalObservable):
    r"""Radial distribution function g(r) of a periodic system.

    .. math:: g(r) = \frac{V}{N_\mathrm{pairs} V_\mathrm{shell}(r)} \sum_{i<j}
        \int_{\text{bin at } r} \mathcal{N}(r'; r_{ij}, \sigma) \, dr'

    which is the number of pairs in a shell over that of an ideal gas of the same density. It is exact up to half the
    smallest height of the cell. With the local estimator, each site has a g(r) of its own, of the pairs that it is part
    of.

    Input of ``update``: ``positions``, (n_frames, n_atoms, 3) in Å, wrapped or not.

    Output of ``compute``: (n_bins,); the bin centers are the attribute ``centers``, in Å.

    Args:
        pair: Two elements, such as ``("O", "H")``; all pairs of atoms if None.
        r_max: Upper end of the range in Å; if None, half the smallest height of the cell, and at most 8 Å.
        bin_width: In Å.
        smearing: Standard deviation σ of the Gaussians in Å; 0 for a plain histogram.
        intramolecular: Whether to count pairs within a molecule.
        r_min: Lower end of the range in Å. It leaves out the intramolecular peaks of a measured curve, which are wider than
            those of classical nuclei.
        target: Values per bin, (n_bins,); those of the reference frames if None.
        target_file: Text file with columns r in Å and g(r), for example from a diffraction experiment; interpolated
            linearly at the bin centers. Excludes ``target``.
        target_columns: Columns of r and g(r) in this file, counted from zero, if it has more than two. A third one is the
            standard error of g(r). A difference then counts as one if it is the root of the sum of the squares of this error
            and of ``scale``, 0.02 by default.
        kwargs: ``scale``, and arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If an argument is out of range, or the file is not such a curve.
        FileNotFoundError: If the file does not exist.

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
        r_min: float = 0.0,
        target: Sequence[float] | None = None,
        target_file: str | Path | None = None,
        target_columns: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(target, **kwargs)
        if pair is not None and (isinstance(pair, str) or len(pair) != 2):
            raise ValueError(f"pair={pair!r} is not a pair of elements: pass for instance ('O', 'H').")
        if target is not None and target_file is not None:
            raise ValueError(f"target={target!r} and target_file={str(target_file)!r} exclude each other: remove one.")
        self.pair = None if pair is None else (pair[0], pair[1])
        self.bin_width = checks.number("bin_width", bin_width, above=0)
        self.smearing = checks.number("smearing", smearing, at_least=0, at_most=DEFAULT_R_MAX)
        self.r_min = checks.number("r_min", r_min, at_least=0)
        self.r_max = None if r_max is None else checks.number("r_max", r_max, at_least=r_min + 2 * bin_width)
        self.intramolecular = intramolecular
        self._curve = None if target_file is None else MeasuredCurve.from_file(target_file, target_columns)
        self._tolerance = (
            self.scale if kwargs.get("scale") is not None else torch.tensor(TOLERANCE, dtype=torch.float64)
        )
        self.centers = torch.empty(0, dtype=torch.float64)
        self._pairs = torch.empty(0, 2, dtype=torch.long)

    @property
    def name(self) -> str:
        """Name in logs and reports, with the elements."""
        name = "radial_distribution" if self.intramolecular else "intermolecular_radial_distribution"
        return name if self.pair is None else f"{name}_{self.pair[0]}_{self.pair[1]}"

    def bind(self, system: System, reference: Tensor, cell: Tensor | None = None) -> None:
        system.require_periodic(f"{type(self).__name__} needs a density", "use DistanceDistribution for molecules")
        r_max = min(DEFAULT_R_MAX, system.minimum_image_cutoff) if self.r_max is None else self.r_max
        if r_max > system.minimum_image_cutoff:
            raise ValueError(
                f"r_max={r_max:g} is more than the cell allows, {system.minimum_image_cutoff:.2f} Å (half its smallest "
                "height): pass a smaller r_max, or use a larger cell."
            )
        n_bins = int((r_max - self.r_min) / checks.bins("bin_width", self.bin_width, r_max) + 1e-9)
        if n_bins < 2:
            raise ValueError(
                f"bin_width={self.bin_width:g} is more than half of the range, from {self.r_min:g} to {r_max:.2f} Å: pass a "
                "smaller bin_width or r_min."
            )
        edges = self.r_min + torch.arange(n_bins + 1, dtype=torch.float64) * self.bin_width
        self.centers = 0.5 * (edges[1:] + edges[:-1])
        self._pairs = self._select_pairs(system)
        shells = 4.0 / 3.0 * pi * (edges**3).diff()
        self._normalization = system.volume().cpu() / (shells * len(self._pairs))
        if self._curve is not None:
            self._given_target, errors = self._curve.at(self.centers)
            if errors is not None:
                self.scale = torch.hypot(self._tolerance, errors)
        super().bind(system, reference, cell)

    def per_frame(self, positions: Tensor, cell: Tensor | None = None) -> Tensor:
        one_row = torch.zeros(len(self._pairs), dtype=torch.long, device=positions.device)
        return self._histograms(positions, [one_row], n_rows=1, cell=cell)[:, 0]

    def per_site(self, positions: Tensor, site_index: Tensor, cell: Tensor | None = None) -> Tensor:
        n_sites = int(site_index.max()) + 1
        ends = site_index.to(positions.device)[self._pairs.to(positions.device)].unbind(dim=1)
        # Each end of a pair counts half, so that the mean over the sites is the g(r) of the frame.
        return 0.5 * n_sites * self._histograms(positions, ends, n_sites, cell)

    def _histograms(self, positions: Tensor, ends: Sequence[Tensor], n_rows: int, cell: Tensor | None) -> Tensor:
        """Return g(r) of the pairs of each row, (n_frames, n_rows, n_bins).

        Args:
            positions: (n_frames, n_atoms, 3) in Å.
            ends: Rows that each pair counts in, tensors of shape (n_pairs,).
            n_rows: Number of rows.
            cell: Cells of the frames, (n_frames, 3, 3) in Å; that of the system if None.
        """
        system, pairs, centers = self.system, self._pairs.to(positions.device), self.centers.to(positions)
        # Pairs further apart contribute to no bin: smeared_counts truncates the Gaussians.
        cutoff = self.centers[-1].item() + self.bin_width + 6.0 * self.smearing
        normalization: Tensor = self._normalization.to(positions)
        frames = []
        for frame, own_cell in zip(positions, each_cell(cell, len(positions)), strict=True):
            counts = frame.new_zeros(n_rows, len(centers))
            for part in torch.arange(len(pairs), device=pairs.device).split(MAX_DISTANCES):
                distances = system.distances(frame, pairs[part], own_cell)
                near = distances < cutoff
                for rows in ends:
                    counts += smeared_counts(distances[near], rows[part[near]], n_rows, centers, self.smearing)
            frames.append(
                counts if own_cell is None else counts * (system.volume(own_cell) / system.volume()).to(counts)
            )
        return torch.stack(frames) * normalization

    def axis(self) -> dict[str, Any]:
        pair = "" if self.pair is None else f" {self.pair[0]}-{self.pair[1]}"
        return {"kind": "curve", "x": self.centers.tolist(), "xlabel": f"distance{pair} / Å", "ylabel": "g(r)"}

    def _select_pairs(self, system: System) -> Tensor:
        pairs = torch.combinations(torch.arange(system.n_atoms), 2)
        if self.pair is not None:
            unknown = sorted(set(self.pair) - set(system.symbols))
            if unknown:
                raise ValueError(
                    f"pair={self.pair} contains {', '.join(unknown)}, but the system consists of "
                    f"{', '.join(sorted(set(system.symbols)))}: pass two of these."
                )
            first, second = (torch.tensor([symbol == end for symbol in system.symbols]) for end in self.pair)
            one, other = pairs.unbind(dim=1)
            pairs = pairs[(first[one] & second[other]) | (second[one] & first[other])]
        if not self.intramolecular:
            molecules = system.molecules.cpu()[pairs]
            pairs = pairs[molecules[:, 0] != molecules[:, 1]]
        if len(pairs) == 0:
            raise ValueError(f"{self!r} finds no such pair of atoms in the system: pass other elements.")
        return pairs
