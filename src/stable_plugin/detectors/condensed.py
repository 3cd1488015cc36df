"""Detectors for solids and liquids: displacements from sites, coordination numbers, and averages over time."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from stable_plugin.detectors.base import Detector
from stable_plugin.detectors.geometry import rows_per_chunk
from stable_plugin.md.cells import optional
from stable_plugin.md.system import System
from stable_plugin.observables.base import Observable
from stable_plugin.runtime import checks


class VolumeDeviation(Detector):
    r"""Relative deviation of the volume from its mean in the reference, for simulations at constant pressure.

    .. math:: v = \left| \frac{V}{\langle V \rangle_\mathrm{ref}} - 1 \right|

    Args:
        threshold: Relative deviation; a liquid that evaporates, or a crystal that collapses, goes further.
        discard: Likewise; no limit if None.

    Example:
        >>> import torch
        >>> from ase.build import bulk
        >>> from stable_plugin import System, VolumeDeviation
        >>> copper = bulk("Cu", cubic=True)
        >>> positions, cell = torch.tensor(copper.positions)[None], torch.tensor(copper.cell.array)[None]
        >>> detector = VolumeDeviation()
        >>> detector.bind(System.from_atoms(copper), positions)
        >>> round(detector.measure(positions, positions, 1.1 * cell).item(), 3)
        0.331
    """

    def __init__(self, threshold: float = 0.2, discard: float | None = None) -> None:
        checks.number("threshold", threshold, above=0)
        super().__init__(threshold, discard)
        self._system: System | None = None
        self._mean = 0.0

    def bind(self, system: System, reference: Tensor, cell: Tensor | None = None) -> None:
        system.require_periodic(f"{type(self).__name__} needs a volume", "choose another detector")
        self._system = system
        self._mean = system.volume(cell).mean().item()

    def measure(self, positions: Tensor, velocities: Tensor, cell: Tensor | None = None) -> Tensor:
        if self._system is None:
            raise RuntimeError("VolumeDeviation has no reference yet: call bind(system, reference) first.")
        return (self._system.volume(cell).to(positions) / self._mean - 1.0).abs().expand(len(positions))


class LindemannCriterion(Detector):
    r"""Mean square displacement of the atoms of a replica from their reference sites, in Å²; for solids.

    .. math:: v = \frac{1}{N} \sum_{i=1}^{N} \left| \mathbf{u}_i - \mathbf{u}_\mathrm{com} \right|^2, \qquad
        \mathbf{u}_i = \mathbf{r}_i - \langle \mathbf{r}_i \rangle_\mathrm{ref}

    The sites are the mean positions of the reference, and scale with the cell of the replica. The atoms are those of the
    framework, if the system has one: molecules on a surface move. The displacement :math:`\mathbf{u}_\mathrm{com}` of the
    center of mass is subtracted, because it diffuses under Langevin dynamics.

    The Lindemann ratio is :math:`\delta = \sqrt{v} / a` with the nearest-neighbor distance a, and crystals melt at
    :math:`\delta \approx 0.1`. For a ratio δ, pass ``threshold = (δ a)²``: 0.065 Å² for copper, with a = 2.55 Å. The value
    is that of a single frame, which fluctuates around the thermal average of the criterion. There is no default, because
    it depends on a.

    Source: F. A. Lindemann, Phys. Z. 11, 609 (1910), with the ratio of J. J. Gilvarry, Phys. Rev. 102, 308 (1956).

    Args:
        threshold: In Å².
        discard: In Å²; no limit if None.

    Example:
        >>> import torch
        >>> from ase.build import bulk
        >>> from stable_plugin import LindemannCriterion, System
        >>> copper = bulk("Cu", cubic=True) * 2
        >>> positions = torch.tensor(copper.positions)[None]
        >>> detector = LindemannCriterion(threshold=0.065)
        >>> detector.bind(System.from_atoms(copper), reference=positions)
        >>> moved = positions.clone()
        >>> moved[0, 0, 0] += 2.0
        >>> [round(value, 3) for value in detector.measure(moved, torch.zeros_like(moved)).tolist()]  # 4/32 (1 - 1/32)
        [0.121]
    """

    unit = "Å²"

    def __init__(self, threshold: float, discard: float | None = None) -> None:
        checks.number("threshold", threshold, above=0)
        super().__init__(threshold, discard)
        self._sites: Tensor | None = None
        self._mass_fractions: Tensor | None = None

    def bind(self, system: System, reference: Tensor, cell: Tensor | None = None) -> None:
        if cell is not None:
            raise ValueError(
                "LindemannCriterion measures displacements from sites in one cell, but the cells of the reference frames "
                "differ: pass reference frames with the same cell, or another detector."
            )
        sites = system.framework if system.is_extended else torch.ones_like(system.framework)
        self._atoms = sites.nonzero().squeeze(1)
        masses = system.masses * sites
        self._mass_fractions = masses / masses.sum()
        # The frames may be wrapped differently, so average minimum-image displacements from the first one.
        atoms = torch.arange(system.n_atoms, device=reference.device)
        pairs = torch.stack([atoms, atoms + system.n_atoms], dim=1)
        frame_and_first = torch.cat([reference, reference[:1].expand_as(reference)], dim=1)
        self._inverse_cell = torch.linalg.pinv(system.cell)  # an isolated system has no cell
        self._sites = reference[0] + system.separations(frame_and_first, pairs).mean(dim=0)

    def measure(self, positions: Tensor, velocities: Tensor, cell: Tensor | None = None) -> Tensor:
        return self._squared_displacements(positions, cell)[:, self._atoms].mean(dim=-1)

    def offending_atoms(
        self, positions: Tensor, velocities: Tensor, cell: Tensor | None = None
    ) -> list[tuple[int, ...]]:
        """Return the atom that is furthest from its site."""
        squares = self._squared_displacements(positions, cell)[:, self._atoms]
        worst = torch.nan_to_num(squares, nan=torch.inf).argmax(dim=-1)
        return [(int(atom),) for atom in self._atoms[worst]]

    def _squared_displacements(self, positions: Tensor, cell: Tensor | None = None) -> Tensor:
        if self._sites is None or self._mass_fractions is None:
            raise RuntimeError("LindemannCriterion has no reference yet: call bind(system, reference) first.")
        sites = self._sites.to(positions)
        if cell is not None:
            sites = sites @ (self._inverse_cell.to(cell) @ cell)
        displacements = positions - sites
        of_center = (self._mass_fractions.to(positions)[:, None] * displacements).sum(dim=1, keepdim=True)
        return (displacements - of_center).square().sum(dim=-1)


class CoordinationNumber(Detector):
    r"""Deviation of the mean coordination number from that of the reference, in neighbors per atom.

    .. math:: v = \left| n - \langle n \rangle_\mathrm{ref} \right|, \qquad
        n = \frac{2}{N} \sum_{i<j} \Theta(r_\mathrm{c} - r_{ij})

    The pairs are atoms of different molecules, or all pairs if the system has no separate molecules. Detects a liquid
    that collapses or evaporates, and a solid that loses its structure. The default threshold of one neighbor per atom is
    a rule of thumb; compare it with the spread over the reference.

    Args:
        distance: Cutoff :math:`r_\mathrm{c}` in Å; in a periodic system at most half the smallest height of the cell.
        threshold: In neighbors per atom.
        discard: In neighbors per atom; no limit if None.

    Example:
        >>> import torch
        >>> from ase import Atoms
        >>> from stable_plugin import CoordinationNumber, System
        >>> dimer = Atoms("Ar2", positions=[[0.0, 0.0, 0.0], [3.8, 0.0, 0.0]])
        >>> positions = torch.tensor(dimer.positions)[None]
        >>> detector = CoordinationNumber(distance=5.0)
        >>> detector.bind(System.from_atoms(dimer), reference=positions)
        >>> detector.measure(2.0 * positions, torch.zeros_like(positions)).tolist()
        [1.0]
    """

    unit = "neighbors per atom"

    def __init__(self, distance: float, threshold: float = 1.0, discard: float | None = None) -> None:
        super().__init__(checks.number("threshold", threshold, above=0), discard)
        self.distance = checks.number("distance", distance, above=0)
        self._system: System | None = None
        self._pairs: Tensor | None = None
        self._expected: Tensor | None = None

    def bind(self, system: System, reference: Tensor, cell: Tensor | None = None) -> None:
        if self.distance > system.minimum_image_cutoff:
            raise ValueError(
                f"distance={self.distance:g} is more than the cell allows, {system.minimum_image_cutoff:.2f} Å (half its "
                "smallest height): pass a smaller distance, or use a larger cell."
            )
        pairs = torch.combinations(torch.arange(system.n_atoms), 2)
        molecules = system.molecules.cpu()[pairs]
        intermolecular = molecules[:, 0] != molecules[:, 1]
        counted = pairs[intermolecular] if intermolecular.any() and not system.is_extended else pairs
        self._system, self._pairs = system, counted.to(system.bonds.device)
        self._expected = self._mean_coordination(reference).mean()

    def measure(self, positions: Tensor, velocities: Tensor, cell: Tensor | None = None) -> Tensor:
        if self._expected is None:
            raise RuntimeError("CoordinationNumber has no reference yet: call bind(system, reference) first.")
        return (self._mean_coordination(positions, cell) - self._expected.to(positions)).abs()

    def _mean_coordination(self, positions: Tensor, cell: Tensor | None = None) -> Tensor:
        assert self._system is not None and self._pairs is not None
        chunk = rows_per_chunk(len(positions))
        counts = [
            (self._system.distances(positions, part, cell) < self.distance).sum(dim=-1)
            for part in self._pairs.split(chunk)
        ]
        coordination = 2.0 * torch.stack(counts).sum(dim=0).to(positions) / self._system.n_atoms
        # A comparison with NaN is false, so NaN positions would count as no neighbors.
        return torch.where(torch.isfinite(positions).flatten(1).all(dim=1), coordination, torch.nan)

    def __str__(self) -> str:
        return f"CoordinationNumber(distance={self.distance:g}, threshold={self.threshold:g})"


class ObservableDeviation(Detector):
    r"""Mean absolute error of an observable against its target, averaged over the last samples of each replica.

    .. math:: v = \frac{w}{K} \sum_{k=1}^{K} \left| \frac{1}{M} \sum_{m=1}^{M} g_k(t_m) - g_k^\mathrm{target} \right|

    with the K values of the observable g and the M latest samples. The factor w is 1, or with ``norm="integral"`` the range
    of the curve, so that v approximates :math:`\int |g - g^\mathrm{target}| \, dr`. Stateful: the samples are cleared when a
    simulation starts.

    Source: Fu et al., TMLR 2023, arXiv:2210.07237, and Raja et al., TMLR 2025, arXiv:2402.13984, for liquid water: 3.0 (the
    default) with ``norm="integral"``, averaged over ten samples in 1 and 10 ps. ``detector="mdsim"`` and
    ``detector="stable"`` set all of it.

    Args:
        observable: For instance a :class:`~stable_plugin.RadialDistribution`.
        threshold: In units of the observable, times the unit of its axis with ``norm="integral"``.
        n_samples: Number of samples M to average over.
        min_samples: Number of samples before which the value is zero; a quarter of ``n_samples`` if None.
        discard: In the unit of ``threshold``; no limit if None.
        norm: ``"mean"`` over the values, or ``"integral"`` over the axis of a curve.
        interval_fs: Time between two samples in fs, rounded to checks of the simulator; a sample at every check if None.
        overlapping: Whether a new sample replaces the oldest one. Otherwise the samples are cleared after each average.

    Example:
        >>> import torch
        >>> from ase.build import molecule
        >>> from stable_plugin import BondLengths, ObservableDeviation, System
        >>> nitrogen = molecule("N2")
        >>> positions = torch.tensor(nitrogen.positions)[None]
        >>> detector = ObservableDeviation(BondLengths(), threshold=0.1, n_samples=4, min_samples=2)
        >>> detector.bind(System.from_atoms(nitrogen), reference=positions)
        >>> frames = [1.2 * positions, 1.2 * positions, positions]
        >>> [round(detector.measure(frame, torch.zeros_like(frame)).item(), 3) for frame in frames]
        [0.0, 0.226, 0.151]
    """

    capturable = False

    def __init__(
        self,
        observable: Observable,
        threshold: float = 3.0,
        n_samples: int = 100,
        min_samples: int | None = None,
        discard: float | None = None,
        norm: Literal["mean", "integral"] = "mean",
        interval_fs: float | None = None,
        overlapping: bool = True,
    ) -> None:
        super().__init__(checks.number("threshold", threshold, above=0), discard)
        if norm not in ("mean", "integral"):
            raise ValueError(f"norm={norm!r} is not a norm: pass 'mean' or 'integral'.")
        self.observable = observable
        self.norm = norm
        self.interval_fs = interval_fs if interval_fs is None else checks.number("interval_fs", interval_fs, above=0)
        self.overlapping = checks.flag("overlapping", overlapping)
        self.n_samples = checks.count("n_samples", n_samples)
        default = max(1, n_samples // 4)
        self.min_samples = min(n_samples, default if min_samples is None else checks.count("min_samples", min_samples))
        self._samples: list[Tensor] = []
        self._value: Tensor | None = None
        self._checks_per_sample = 1
        self._n_checks = 0
        self._weight = 1.0

    @property
    def averaging_fs(self) -> float:
        """Time in fs over which the first average is taken; 0 if ``interval_fs`` is None."""
        return self.min_samples * (self.interval_fs or 0.0)

    def bind(self, system: System, reference: Tensor, cell: Tensor | None = None) -> None:
        self.observable.bind(system, reference, *optional(cell))
        self._weight = 1.0 if self.norm == "mean" else _axis_range(self.observable)
        self.reset(0)

    def set_check_interval(self, interval_fs: float) -> None:
        self._checks_per_sample = max(1, round((self.interval_fs or interval_fs) / interval_fs))

    def reset(self, n_replicas: int) -> None:
        self._samples = []
        self._value = None
        self._n_checks = 0

    def state_dict(self) -> Any:
        return {"samples": list(self._samples), "value": self._value, "n_checks": self._n_checks}

    def load_state_dict(self, state: Any) -> None:
        self._samples, self._value, self._n_checks = list(state["samples"]), state["value"], state["n_checks"]

    def measure(self, positions: Tensor, velocities: Tensor, cell: Tensor | None = None) -> Tensor:
        """Add a sample of each replica if one is due, and return the error of the last mean, (n_replicas,)."""
        self._n_checks += 1
        if self._n_checks % self._checks_per_sample == 0:
            self._value = self._next_value(positions, cell)
        # Zero times a position, so that NaN is detected before there is a value.
        nothing = 0.0 * positions.sum(dim=(-1, -2))
        return nothing if self._value is None else self._value + nothing

    def _next_value(self, positions: Tensor, cell: Tensor | None) -> Tensor | None:
        """Return the error of the mean after a new sample of each replica, (n_replicas,); None if samples are missing."""
        if not self.overlapping and len(self._samples) == self.n_samples:
            self._samples = []
        self._samples = [*self._samples, self.observable.per_frame(positions, *optional(cell))][-self.n_samples :]
        if len(self._samples) < self.min_samples:
            return self._value
        mean = torch.stack(self._samples).mean(dim=0)
        return self._weight * (mean - self.observable.known_target.to(positions)).abs().mean(dim=-1)

    def check_reference(self, frames: Tensor, name: str = "reference", cell: Tensor | None = None) -> None:
        """Accept all frames, because the threshold is for a mean over many frames."""

    def __str__(self) -> str:
        return f"ObservableDeviation({self.observable.name}, threshold={self.threshold:g})"


def _axis_range(observable: Observable) -> float:
    """Return the range of the axis of a curve: its number of values times their spacing.

    Args:
        observable: Bound to a system.

    Raises:
        ValueError: If the observable is not a curve.
    """
    axis = observable.axis()
    if axis["kind"] != "curve":
        raise ValueError(f"norm='integral' needs a curve, but {observable.name} is not one: set norm='mean'.")
    x = axis["x"]
    return float(x[-1] - x[0]) * len(x) / (len(x) - 1)
