"""Base class of observables: values of each frame, their mean, and the target for it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from stable_plugin.md.cells import optional
from stable_plugin.md.system import System
from stable_plugin.runtime import checks
from stable_plugin.runtime.representation import ReprMixin


class Observable(ReprMixin, Metric):
    r"""Base class of ensemble averages of a vector-valued function of the positions.

    .. math:: \langle g \rangle = \frac{1}{F} \sum_{f=1}^{F} g(\mathbf{r}_f)

    Subclasses implement :meth:`per_frame`, and extend :meth:`bind` if they need more than the system.

    Input of ``update``: ``positions``, (n_frames, n_atoms, 3) in Å.

    Output of ``compute``: mean over the frames, (n_values,); torchmetrics returns a single value without its axis, ().

    Args:
        target: Mean that the potential should reproduce, (n_values,); that of the reference frames if None.
        scale: Difference from the target that counts as one in the loss, for all values or (n_values,); 1 if None. It
            weighs observables of different units, such as g(r) and a pressure, against each other.
        kwargs: Passed to :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from ase.build import molecule
        >>> from stable_plugin import Observable, System
        >>> class Height(Observable):
        ...     def per_frame(self, positions):
        ...         return positions[..., 2].mean(dim=-1, keepdim=True)
        >>> water = molecule("H2O")
        >>> positions = torch.zeros(2, 3, 3)
        >>> height = Height(target=[0.0])
        >>> height.bind(System.from_atoms(water), reference=positions)
        >>> height.update(positions + torch.tensor([1.0, 2.0])[:, None, None])
        >>> height.compute().item(), height.mean_absolute_error()
        (1.5, 1.5)
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None
    total: Tensor
    count: Tensor
    squares: Tensor
    blocks: Tensor

    def __init__(
        self, target: Sequence[float] | None = None, scale: float | Sequence[float] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.scale = _positive("scale", scale)
        self._system: System | None = None
        self._given_target = None if target is None else torch.as_tensor(target, dtype=torch.float64)
        self.target: Tensor | None = None
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        # Squares of the block means, weighted by the frames of each block, and the number of blocks.
        self.add_state("squares", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("blocks", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @property
    def name(self) -> str:
        """Name in logs and reports."""
        return snake_case(type(self).__name__)

    @property
    def system(self) -> System:
        """System passed to :meth:`bind`.

        Raises:
            RuntimeError: If there is none yet.
        """
        if self._system is None:
            raise RuntimeError(f"{type(self).__name__} has no system yet: call bind(system, reference) first.")
        return self._system

    def bind(self, system: System, reference: Tensor, cell: Tensor | None = None) -> None:
        """Set up the observable for a system, and compute the target from reference frames if none was passed.

        Args:
            system: System to be simulated.
            reference: (n_frames, n_atoms, 3) in Å.
            cell: Cells of these frames, (n_frames, 3, 3) in Å; that of the system if None.

        Raises:
            ValueError: If target or scale passed to the constructor have a different shape from the observable.
        """
        self._system = system
        self._set_target(self.per_frame(reference, *optional(cell)).double().mean(dim=0))

    def _set_target(self, from_reference: Tensor) -> None:
        """Set the target to that of the user, or else to the mean in the reference; check the shapes of what was passed."""
        for name, given in (("target", self._given_target), ("scale", self.scale if self.scale.dim() else None)):
            if given is not None and given.shape != from_reference.shape:
                raise ValueError(
                    f"{name} of {type(self).__name__} has shape {tuple(given.shape)}, but the observable has "
                    f"{tuple(from_reference.shape)}: pass one number per value."
                )
        self.target = from_reference if self._given_target is None else self._given_target.to(from_reference.device)

    @abstractmethod
    def per_frame(self, positions: Tensor, cell: Tensor | None = None) -> Tensor:
        """Return the observable of each frame, (n_frames, n_values).

        Args:
            positions: (n_frames, n_atoms, 3) in Å.
            cell: Cells of the frames, (n_frames, 3, 3) in Å; that of the system if None. A subclass without this argument
                serves frames with one cell.
        """

    def update(self, positions: Tensor, cell: Tensor | None = None) -> None:
        """Add a block of frames.

        Frames of one block may be correlated. For :meth:`standard_error`, blocks must be independent: pass a segment of
        one replica at a time, longer than the correlation time.

        Args:
            positions: (n_frames, n_atoms, 3) in Å.
            cell: Cells of the frames, (n_frames, 3, 3) in Å; that of the system if None.
        """
        if len(positions) == 0:
            return
        self._add_block(self.per_frame(positions, *optional(cell)).double().sum(dim=0), len(positions))

    def _add_block(self, total: Tensor, n_frames: int) -> None:
        """Add the sum of :meth:`per_frame` over a block of frames."""
        self.total = self.total + total
        self.count = self.count + n_frames
        self.squares = self.squares + total.square() / n_frames
        self.blocks = self.blocks + 1

    def of_means(self, means: Tensor) -> Tensor:
        """Return the observable from the means of :meth:`per_frame`: these means, unless it is a fluctuation.

        Args:
            means: (n_means,).

        Returns:
            (n_values,), differentiable.
        """
        return means

    def compute(self) -> Tensor:
        """Return the observable over all frames, (n_values,)."""
        return self.of_means(self.total / self.count)

    def standard_error(self) -> Tensor:
        """Return the standard error of :meth:`compute` from the spread of the block means; NaN for less than two blocks.

        Source: block averaging, Flyvbjerg and Petersen, J. Chem. Phys. 91, 461 (1989), with a fixed block length.
        """
        spread = (self.squares / self.count - (self.total / self.count).square()).clamp_min(0.0)
        return (spread / (self.blocks - 1)).sqrt() if self.blocks > 1 else torch.full_like(spread, torch.nan)

    @property
    def known_target(self) -> Tensor:
        """The target, (n_values,).

        Raises:
            RuntimeError: If :meth:`bind` was not called.
        """
        if self.target is None:
            raise RuntimeError(f"{type(self).__name__} has no target yet: call bind(system, reference) first.")
        return self.target

    @property
    def n_means(self) -> int:
        """Number of values of :meth:`per_frame`."""
        return len(self.known_target)

    def scaled(self, values: Tensor) -> Tensor:
        """Return values of the observable in units of its scale, (..., n_values)."""
        return values / self.scale.to(values)

    def loss(self, function: Callable[[Tensor, Tensor], Tensor], means: Tensor) -> Tensor:
        """Return the loss of the observable, whose difference from the target is measured in units of its scale, ().

        Args:
            function: Loss of a value and its target.
            means: Means of :meth:`per_frame`, (n_means,).
        """
        return function(self.scaled(self.of_means(means)), self.scaled(self.known_target.to(means)))

    def mean_absolute_error(self) -> float:
        """Return the absolute difference of mean and target, averaged over the values."""
        return (self.compute() - self.known_target.to(self.total.device)).abs().mean().item()

    def axis(self) -> dict[str, Any]:
        """Return how to plot the values: ``kind`` ("bars" or "curve"), ``x``, ``xlabel`` and ``ylabel``."""
        n_values = 0 if self.target is None else len(self.target)
        return {"kind": "bars", "x": list(range(n_values)), "xlabel": "value", "ylabel": self.name}


def _positive(name: str, value: float | Sequence[float] | None) -> Tensor:
    """Return a positive number, one if None, or several, as a tensor, () or (n_values,)."""
    if isinstance(value, Sequence) and value and not isinstance(value, str):
        return torch.tensor([checks.number(name, each, above=0) for each in value], dtype=torch.float64)
    number: Any = 1.0 if value is None else value
    return torch.tensor(checks.number(name, number, above=0, hint="Or pass one for each value."), dtype=torch.float64)


def snake_case(name: str) -> str:
    """Return a class name in snake case: ``BondLengths`` as ``bond_lengths``."""
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")


def smeared_histogram(values: Tensor, centers: Tensor, width: float) -> Tensor:
    """Return the Gaussian-smeared histogram of each frame, (n_frames, n_bins).

    Each sample is a Gaussian of unit area, integrated over each bin.

    Args:
        values: (n_frames, n_samples).
        centers: Evenly spaced bin centers, (n_bins,).
        width: Standard deviation of the Gaussian, in units of ``values``.
    """
    rows = torch.arange(len(values), device=values.device)[:, None].expand_as(values)
    return smeared_counts(values.flatten(), rows.flatten(), len(values), centers, width)


def smeared_counts(values: Tensor, rows: Tensor, n_rows: int, centers: Tensor, width: float) -> Tensor:
    """Return Gaussian-smeared histograms of rows with different numbers of samples, (n_rows, n_bins).

    Args:
        values: (n_samples,).
        rows: Row of each sample, (n_samples,).
        n_rows: Number of rows.
        centers: Evenly spaced bin centers, (n_bins,).
        width: Standard deviation of the Gaussian, in units of ``values``.
    """
    spacing = centers[1] - centers[0]
    n_bins = len(centers)
    # Five standard deviations hold all but 6e-7 of the Gaussian, so the other bins can be skipped.
    half_range = int(torch.ceil(torch.as_tensor(5.0 * width) / spacing)) + 1
    nearest = ((values - centers[0]) / spacing).round()
    bins = nearest[:, None] + torch.arange(-half_range, half_range + 1, device=values.device)
    edges = torch.cat([bins - 0.5, bins[:, -1:] + 0.5], dim=1)
    distance = centers[0] + edges * spacing - values[:, None]
    # A width of zero is a plain histogram.
    weight = 0.5 * torch.erf(distance / (max(width, 1e-9) * 2.0**0.5)).diff(dim=1)
    inside = (bins >= 0) & (bins < n_bins)
    flat_bin = rows[:, None] * n_bins + bins.clamp(0, n_bins - 1).long()
    counts = values.new_zeros(n_rows * n_bins)
    return counts.index_add(0, flat_bin[inside], weight[inside]).reshape(n_rows, n_bins)
