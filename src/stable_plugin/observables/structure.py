"""Structural observables of molecules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stable_plugin.md.internal_coordinates import angles
from stable_plugin.md.system import System
from stable_plugin.observables.base import Observable, smeared_histogram
from stable_plugin.runtime import checks


class BondLengths(Observable):
    r"""Mean length of each bond, in Å.

    .. math:: g_b = |\mathbf{r}_j - \mathbf{r}_i| \quad \text{for each bond } b = (i, j)

    Input of ``update``: ``positions``, (n_frames, n_atoms, 3) in Å.

    Output of ``compute``: (n_bonds,) in Å, in the order of ``System.bonds``.

    Args:
        target: Mean lengths, (n_bonds,) in Å; those of the reference frames if None.
        kwargs: ``scale``, and arguments of :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from ase.build import molecule
        >>> from stable_plugin import BondLengths, System
        >>> water = molecule("H2O")
        >>> positions = torch.tensor(water.positions)[None]
        >>> bonds = BondLengths()
        >>> bonds.bind(System.from_atoms(water), reference=positions)
        >>> bonds.update(1.1 * positions)
        >>> [round(length, 3) for length in bonds.compute().tolist()]
        [1.065, 1.065]
        >>> round(bonds.mean_absolute_error(), 3)
        0.097
    """

    def bind(self, system: System, reference: Tensor, cell: Tensor | None = None) -> None:
        if len(system.bonds) == 0:
            raise ValueError("BondLengths finds no bonds in the system: pass them, System.from_atoms(..., bonds=...).")
        super().bind(system, reference, cell)

    def per_frame(self, positions: Tensor, cell: Tensor | None = None) -> Tensor:
        return self.system.distances(positions, self.system.bonds, cell)

    def axis(self) -> dict[str, Any]:
        labels = [] if self._system is None else self._system.bond_labels
        return {"kind": "bars", "x": labels, "xlabel": "bond", "ylabel": "length / Å"}


class BondAmplitudes(Observable):
    r"""Mean square deviation of each bond from its mean length in the reference, in Å².

    .. math:: g_b = \left( r_b - \langle r_b \rangle_\mathrm{ref} \right)^2

    This is the square of the vibrational amplitude that gas electron diffraction measures. A bond that breaks in one
    frame of a hundred hardly changes its mean length, but changes its amplitude by orders of magnitude.

    Input of ``update``: ``positions``, (n_frames, n_atoms, 3) in Å.

    Output of ``compute``: (n_bonds,) in Å², in the order of ``System.bonds``.

    Args:
        target: Mean square deviations, (n_bonds,) in Å²; those of the reference frames if None.
        kwargs: ``scale``, and arguments of :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from ase.build import molecule
        >>> from stable_plugin import BondAmplitudes, System
        >>> nitrogen = molecule("N2")  # 1.13 Å long
        >>> positions = torch.tensor(nitrogen.positions)[None]
        >>> amplitudes = BondAmplitudes()
        >>> amplitudes.bind(System.from_atoms(nitrogen), reference=positions)
        >>> amplitudes.update(torch.cat([0.9 * positions, 1.1 * positions]))
        >>> round(amplitudes.compute().item(), 4)
        0.0128
    """

    def __init__(self, target: Sequence[float] | None = None, **kwargs: Any) -> None:
        super().__init__(target, **kwargs)
        self._lengths = BondLengths()

    def bind(self, system: System, reference: Tensor, cell: Tensor | None = None) -> None:
        self._lengths.bind(system, reference, cell)
        super().bind(system, reference, cell)

    def per_frame(self, positions: Tensor, cell: Tensor | None = None) -> Tensor:
        lengths = self._lengths.per_frame(positions, cell)
        return (lengths - self._lengths.known_target.to(positions)).square()

    def axis(self) -> dict[str, Any]:
        return {**self._lengths.axis(), "ylabel": "mean square deviation / Å²"}


class DistanceDistribution(Observable):
    r"""Distribution h(r) of all interatomic distances, in percent per bin.

    .. math:: h(r) = \frac{100}{N_\mathrm{pairs}} \sum_{i<j} \int_{\text{bin at } r} \mathcal{N}(r'; r_{ij}, \sigma) \, dr'

    It sums to 100 if the range holds all distances. In a system that is periodic in one or two directions, such as a slab,
    the distances are those to the nearest image, and the range ends at half the smallest height of the cell.

    Source: Raja et al., TMLR 2025, arXiv:2402.13984: 0 to 10 Å, bins of 0.02 Å, Gaussians of 0.01 Å (the defaults).

    Input of ``update``: ``positions``, (n_frames, n_atoms, 3) in Å.

    Output of ``compute``: (n_bins,) in percent; the bin centers are the attribute ``centers``, in Å.

    Args:
        r_max: Upper end of the range in Å.
        bin_width: In Å.
        smearing: Standard deviation σ of the Gaussians in Å.
        target: Values per bin, (n_bins,); those of the reference frames if None.
        kwargs: ``scale``, and arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> import torch
        >>> from ase.build import molecule
        >>> from stable_plugin import DistanceDistribution, System
        >>> water = molecule("H2O")
        >>> positions = torch.tensor(water.positions)[None]
        >>> h = DistanceDistribution(r_max=2.0, bin_width=0.4)
        >>> h.bind(System.from_atoms(water), reference=positions)
        >>> h.update(positions)
        >>> [round(percent, 1) for percent in h.compute().tolist()]  # two bonds of 0.97 Å, and H-H at 1.53 Å
        [0.0, 0.0, 66.7, 33.3, 0.0]
    """

    def __init__(
        self,
        r_max: float = 10.0,
        bin_width: float = 0.02,
        smearing: float = 0.01,
        target: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(target, **kwargs)
        checks.number("bin_width", bin_width, above=0)
        self.r_max = checks.number("r_max", r_max, at_least=2 * bin_width)
        self.smearing = checks.number("smearing", smearing, above=0, at_most=r_max)
        n_bins = round(r_max / checks.bins("bin_width", bin_width, r_max))
        self.centers = (torch.arange(n_bins, dtype=torch.float64) + 0.5) * bin_width

    def bind(self, system: System, reference: Tensor, cell: Tensor | None = None) -> None:
        if all(system.pbc):
            raise ValueError(
                "DistanceDistribution is not defined for a periodic system, which has infinitely many pairs: use "
                "RadialDistribution, or remove the periodic boundaries."
            )
        if self.r_max > system.minimum_image_cutoff:
            raise ValueError(
                f"r_max={self.r_max:g} is more than the cell allows, {system.minimum_image_cutoff:.2f} Å (half its smallest "
                "height): pass a smaller r_max, or use a larger cell."
            )
        super().bind(system, reference, cell)

    def per_frame(self, positions: Tensor, cell: Tensor | None = None) -> Tensor:
        distances = self.system.distances(positions, torch.combinations(torch.arange(self.system.n_atoms), 2), cell)
        counts = smeared_histogram(distances, self.centers.to(positions), self.smearing)
        return counts * (100.0 / distances.shape[-1])

    def axis(self) -> dict[str, Any]:
        return {
            "kind": "curve",
            "x": self.centers.tolist(),
            "xlabel": "interatomic distance / Å",
            "ylabel": "h(r) / % per bin",
        }


class AngleDistribution(Observable):
    r"""Distribution of all bond angles, in percent per bin.

    .. math:: p(\theta) = \frac{100}{N_\mathrm{angles}} \sum_{a}
        \int_{\text{bin at } \theta} \mathcal{N}(\theta'; \theta_a, \sigma) \, d\theta'

    It sums to 100, less what is smeared beyond 0 and 180 degrees.

    Input of ``update``: ``positions``, (n_frames, n_atoms, 3) in Å.

    Output of ``compute``: (n_bins,) in percent; the bin centers are the attribute ``centers``, in degrees.

    Args:
        n_bins: Number of bins from 0 to 180 degrees.
        smearing: Standard deviation σ of the Gaussians in degrees.
        target: Values per bin, (n_bins,); those of the reference frames if None.
        kwargs: ``scale``, and arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> import torch
        >>> from ase.build import molecule
        >>> from stable_plugin import AngleDistribution, System
        >>> water = molecule("H2O")
        >>> positions = torch.tensor(water.positions)[None]
        >>> angles = AngleDistribution(n_bins=6)
        >>> angles.bind(System.from_atoms(water), reference=positions)
        >>> angles.update(positions)
        >>> [round(percent) for percent in angles.compute().tolist()]  # 104 degrees
        [0, 0, 0, 100, 0, 0]
    """

    def __init__(
        self, n_bins: int = 180, smearing: float = 1.0, target: Sequence[float] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(target, **kwargs)
        checks.count("n_bins", n_bins, at_least=2, at_most=checks.MAX_BINS)
        self.smearing = checks.number("smearing", smearing, above=0, at_most=180)
        self.centers = (torch.arange(n_bins, dtype=torch.float64) + 0.5) * (180.0 / n_bins)

    def bind(self, system: System, reference: Tensor, cell: Tensor | None = None) -> None:
        if len(system.angles) == 0:
            raise ValueError("AngleDistribution finds no bond angle in the system: use another observable.")
        super().bind(system, reference, cell)

    def per_frame(self, positions: Tensor, cell: Tensor | None = None) -> Tensor:
        values = angles(self.system, positions, self.system.angles, cell)
        return smeared_histogram(values, self.centers.to(positions), self.smearing) * (100.0 / values.shape[-1])

    def axis(self) -> dict[str, Any]:
        return {
            "kind": "curve",
            "x": self.centers.tolist(),
            "xlabel": "bond angle / degrees",
            "ylabel": "probability / % per bin",
        }
