"""Structural observables of molecules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stable_plugin.md.system import System
from stable_plugin.observables.base import Observable, smeared_histogram
from stable_plugin.runtime import checks


class BondLengths(Observable):
    """Length of every bond, in Å.

    Args:
        target: Mean lengths, (n_bonds,) in Å, in the order of ``System.bonds``.

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

    def __init__(self, target: Sequence[float] | None = None, **kwargs: Any) -> None:
        super().__init__(target, **kwargs)
        self._system: System | None = None

    def bind(self, system: System, reference: Tensor) -> None:
        if len(system.bonds) == 0:
            raise ValueError("BondLengths finds no bonds in the system: give System.from_atoms(..., bonds=...).")
        self._system = system
        super().bind(system, reference)

    def per_frame(self, positions: Tensor) -> Tensor:
        system = _bound(self._system, self)
        return system.distances(positions, system.bonds)

    def axis(self) -> dict[str, Any]:
        labels = [] if self._system is None else self._system.bond_labels
        return {"kind": "bars", "x": labels, "xlabel": "bond", "ylabel": "length / Å"}


class BondAmplitudes(Observable):
    """Mean square deviation of every bond from its mean length in the reference, in Å².

    The square of the vibrational amplitude that gas electron diffraction measures. A bond that breaks in one frame of a
    hundred hardly moves its mean length; it multiplies its amplitude.

    Args:
        target: Mean square deviations, (n_bonds,) in Å², in the order of ``System.bonds``.
    """

    def __init__(self, target: Sequence[float] | None = None, **kwargs: Any) -> None:
        super().__init__(target, **kwargs)
        self._lengths = BondLengths()

    def bind(self, system: System, reference: Tensor) -> None:
        self._lengths.bind(system, reference)
        super().bind(system, reference)

    def per_frame(self, positions: Tensor) -> Tensor:
        lengths = self._lengths.per_frame(positions)
        assert self._lengths.target is not None
        return (lengths - self._lengths.target.to(positions)).square()

    def axis(self) -> dict[str, Any]:
        return {**self._lengths.axis(), "ylabel": "mean square deviation / Å²"}


class DistanceDistribution(Observable):
    """Distribution h(r) of all interatomic distances, in percent per bin: it sums to 100 over an unbounded range.

    Source: Raja et al., TMLR 2025, arXiv:2402.13984: 0 to 10 Å, bins of 0.02 Å, Gaussians of 0.01 Å.

    Args:
        r_max: Upper end of the range in Å.
        bin_width: In Å.
        smearing: Standard deviation of the Gaussians in Å.
        target: Values per bin.
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
        checks.number("r_max", r_max, at_least=2 * bin_width)
        self.smearing = checks.number("smearing", smearing, above=0, at_most=r_max)
        n_bins = round(r_max / checks.bins("bin_width", bin_width, r_max))
        self.centers = (torch.arange(n_bins, dtype=torch.float64) + 0.5) * bin_width
        self._system: System | None = None

    def bind(self, system: System, reference: Tensor) -> None:
        if system.periodic:
            raise ValueError(
                "DistanceDistribution counts each pair of atoms once, which a periodic system has no end of: use it for "
                "molecules."
            )
        self._system = system
        super().bind(system, reference)

    def per_frame(self, positions: Tensor) -> Tensor:
        system = _bound(self._system, self)
        distances = system.distances(positions, torch.combinations(torch.arange(system.n_atoms), 2))
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
    """Distribution of all bond angles, in percent per bin: it sums to 100, less what is smeared beyond 0 and 180 degrees.

    Args:
        n_bins: Bins from 0 to 180 degrees.
        smearing: Standard deviation of the Gaussians in degrees.
        target: Values per bin.
    """

    def __init__(
        self, n_bins: int = 180, smearing: float = 1.0, target: Sequence[float] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(target, **kwargs)
        checks.count("n_bins", n_bins, at_least=2, at_most=checks.MAX_BINS)
        self.smearing = checks.number("smearing", smearing, above=0, at_most=180)
        self.centers = (torch.arange(n_bins, dtype=torch.float64) + 0.5) * (180.0 / n_bins)
        self._system: System | None = None

    def bind(self, system: System, reference: Tensor) -> None:
        if len(system.angles) == 0:
            raise ValueError("AngleDistribution finds no bond angle in the system: use another observable.")
        self._system = system
        super().bind(system, reference)

    def per_frame(self, positions: Tensor) -> Tensor:
        system = _bound(self._system, self)
        first, second = (system.separations(positions, system.angles[:, [end, 1]]) for end in (0, 2))
        cosine = torch.nn.functional.cosine_similarity(first, second, dim=-1).clamp(-1.0, 1.0)
        angles = torch.rad2deg(torch.arccos(cosine))
        return smeared_histogram(angles, self.centers.to(positions), self.smearing) * (100.0 / angles.shape[-1])

    def axis(self) -> dict[str, Any]:
        return {
            "kind": "curve",
            "x": self.centers.tolist(),
            "xlabel": "bond angle / degrees",
            "ylabel": "share / % per bin",
        }


def _bound(system: System | None, observable: Observable) -> System:
    if system is None:
        raise RuntimeError(f"{type(observable).__name__} has no system yet: call bind(system, reference) first.")
    return system
