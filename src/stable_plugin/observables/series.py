"""Base class of observables of trajectories: correlations over time."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from stable_plugin.md.system import System
from stable_plugin.observables.base import snake_case
from stable_plugin.runtime import checks
from stable_plugin.runtime.representation import ReprMixin


class TimeCorrelation(ReprMixin, Metric):
    r"""Base class of time correlation functions, averaged over atoms, replicas and time origins.

    .. math:: C(\tau) = \left\langle f\big(a_i(t), a_i(t + \tau)\big) \right\rangle_{i, t}

    Subclasses define the signal a, from positions or velocities, and the comparison f of two frames.

    Trajectories are passed in consecutive blocks of frames, of which only the last ``max_lag_ps`` are kept. Under Langevin
    dynamics the center of mass of the whole system diffuses, which says nothing about its atoms, so it is subtracted by
    default.

    The standard error is that of independent segments: the trajectory of each replica is cut into segments as long as
    ``max_lag_ps``, and the spread of their results gives the standard error of the mean.

    Input of ``update``: ``positions`` and ``velocities``, (n_frames, n_replicas, n_atoms, 3) in Å and Å per ASE time, the
    positions unwrapped.

    Output of ``compute``: (n_lags,), at the lags of the attribute ``lags_ps``, unless a subclass says otherwise.

    Args:
        interval_fs: Time between two frames in fs.
        max_lag_ps: Longest lag τ in ps, a multiple of ``interval_fs``.
        symbols: Elements to include; all if None.
        remove_drift: Whether to subtract the center of mass.
        kwargs: Passed to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If a number is out of range.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None
    sums: list[Tensor]
    counts: list[Tensor]

    def __init__(
        self,
        interval_fs: float,
        max_lag_ps: float = 1.0,
        symbols: Sequence[str] | None = None,
        remove_drift: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.interval_fs = checks.number("interval_fs", interval_fs, above=0)
        self.max_lag_ps = checks.number("max_lag_ps", max_lag_ps, at_least=interval_fs / 1000.0)
        checks.bins("interval_fs", interval_fs, max_lag_ps * 1000.0)
        self.n_lags = 1 + checks.steps("max_lag_ps", max_lag_ps * 1000.0, interval_fs)
        self.symbols = None if symbols is None else tuple(symbols)
        self.remove_drift = remove_drift
        self.target: Tensor | None = None
        self._masses: Tensor | None = None
        # One entry per segment, (n_replicas, n_lags).
        self.add_state("sums", [], dist_reduce_fx="cat")
        self.add_state("counts", [], dist_reduce_fx="cat")
        self.start_trajectory()

    @property
    def name(self) -> str:
        """Name in logs and reports, with the elements."""
        return "_".join([snake_case(type(self).__name__), *(self.symbols or ())])

    @property
    def lags_ps(self) -> Tensor:
        """Lags, (n_lags,) in ps."""
        return torch.arange(self.n_lags, dtype=torch.float64) * (self.interval_fs / 1000.0)

    @property
    def known_target(self) -> Tensor:
        """The target, of the shape of :meth:`compute`.

        Raises:
            RuntimeError: If :meth:`bind` was not called with a reference trajectory.
        """
        if self.target is None:
            raise RuntimeError(f"{type(self).__name__} has no target yet: call bind(system, positions, ...) first.")
        return self.target

    def bind(self, system: System, positions: Tensor | None = None, velocities: Tensor | None = None) -> None:
        """Set up the observable for a system, and compute the target from a reference trajectory.

        Args:
            system: System that moves.
            positions: Reference, (n_frames, n_replicas, n_atoms, 3) in Å, unwrapped; no target if None.
            velocities: Reference, of the same shape, in Å per ASE time.

        Raises:
            ValueError: If the system does not contain one of the elements, or the reference is shorter than the longest
                lag.
        """
        unknown = sorted(set(self.symbols or ()) - set(system.symbols))
        if unknown:
            raise ValueError(
                f"symbols={self.symbols} contains {', '.join(unknown)}, but the system consists of "
                f"{', '.join(sorted(set(system.symbols)))}: pass some of these, or None for all."
            )
        self._masses = system.masses.double()
        chosen = [self.symbols is None or symbol in self.symbols for symbol in system.symbols]
        self._chosen = torch.tensor(chosen, device=system.masses.device).nonzero()[:, 0]
        if positions is not None:
            self.reset()
            self.update(positions, velocities)
            self.target = self.compute()
            self.reset()

    def reset(self) -> None:
        """Discard all frames and results."""
        super().reset()
        self.start_trajectory()

    def start_trajectory(self) -> None:
        """Start a trajectory that does not continue the previous one, whose results are kept."""
        self._previous: Tensor | None = None
        self._alive: Tensor | None = None
        self._n_frames = 0

    def update(self, positions: Tensor, velocities: Tensor | None = None, valid: Tensor | None = None) -> None:
        """Add the next frames of the trajectory.

        Args:
            positions: (n_frames, n_replicas, n_atoms, 3) in Å, unwrapped.
            velocities: Same shape, in Å per ASE time.
            valid: Valid frames, (n_frames, n_replicas); a replica is left out from its first invalid frame on.

        Raises:
            ValueError: If the observable needs velocities and they are None.
        """
        if self._masses is None:
            raise RuntimeError(f"{type(self).__name__} has no system yet: call bind(system) first.")
        signal = self._signal(positions, velocities).double()
        shape = signal.shape[:2]
        alive = torch.ones(shape, dtype=torch.bool, device=signal.device) if valid is None else valid.to(signal.device)
        if self._alive is not None:
            alive = alive & self._alive
        alive = alive.int().cummin(dim=0).values.bool()
        if self.remove_drift:
            mass_fractions = self._masses.to(signal) / self._masses.sum()
            signal = signal - (mass_fractions[:, None] * signal).sum(dim=2, keepdim=True)
        signal = torch.where(alive[..., None, None], signal, 0.0)[:, :, self._chosen.to(signal.device)]
        self._accumulate(signal, alive)
        self._alive, self._n_frames = alive[-1], self._n_frames + len(signal)

    def _accumulate(self, signal: Tensor, alive: Tensor) -> None:
        """Add the products of new frames with themselves and with previous frames to their segments."""
        frames = signal if self._previous is None else torch.cat([self._previous, signal])
        n_previous = len(frames) - len(signal)
        segment = (torch.arange(len(signal), device=signal.device) + self._n_frames) // (self.n_lags - 1)
        ids, row = segment.unique(return_inverse=True)
        sums = signal.new_zeros(len(ids), signal.shape[1], self.n_lags)
        counts = torch.zeros_like(sums)
        for lag in range(min(self.n_lags, len(frames))):
            first = max(0, lag - n_previous)
            before = frames[n_previous + first - lag : len(frames) - lag]
            values = torch.where(alive[first:], self._compare(before, signal[first:]), 0.0)
            sums[..., lag].index_add_(0, row[first:], values)
            counts[..., lag].index_add_(0, row[first:], alive[first:].to(values))
        continues_segment = self._n_frames % (self.n_lags - 1) > 0
        for index in range(len(ids)):
            if index == 0 and continues_segment:
                self.sums[-1], self.counts[-1] = self.sums[-1] + sums[0], self.counts[-1] + counts[0]
            else:
                self.sums.append(sums[index])
                self.counts.append(counts[index])
        self._previous = frames[-(self.n_lags - 1) :].clone()

    def compute(self) -> Tensor:
        """Return the observable over all frames.

        Raises:
            ValueError: If the trajectory is shorter than the longest lag.
        """
        if not self.complete:
            raise ValueError(
                f"max_lag_ps={self.max_lag_ps:g} is longer than the trajectory, "
                f"{max(self._longest_lag, 0) * self.interval_fs / 1000.0:g} ps: pass a smaller max_lag_ps, or simulate "
                "longer."
            )
        sums, counts = (dim_zero_cat(states).sum(dim=0) for states in (self.sums, self.counts))
        return self._from_correlation((sums / counts)[None])[0]

    @property
    def complete(self) -> bool:
        """Whether there are two frames as far apart as the longest lag."""
        return self._longest_lag == self.n_lags - 1

    @property
    def _longest_lag(self) -> int:
        if len(self.counts) == 0:
            return -1
        return int((dim_zero_cat(self.counts).sum(dim=0) > 0).sum()) - 1

    def standard_error(self) -> Tensor:
        """Return the standard error of :meth:`compute`, of its shape; NaN for less than two complete segments."""
        sums, counts = dim_zero_cat(self.sums), dim_zero_cat(self.counts)
        # The first segment has few previous frames, and the last may be cut short.
        whole = (counts == self.n_lags - 1).all(dim=1)
        if whole.sum() < 2:
            return torch.full_like(self.compute(), torch.nan)
        results = self._from_correlation((sums / counts)[whole])
        return results.std(dim=0) / sqrt(len(results))

    def mean_absolute_error(self) -> float:
        """Return the absolute difference to the target, averaged over the values."""
        found = self.compute()
        return (found - self.known_target.to(found)).abs().mean().item()

    @abstractmethod
    def axis(self) -> dict[str, Any]:
        """Return how to plot the values: ``kind`` ("bars" or "curve"), ``x``, ``xlabel`` and ``ylabel``."""

    @abstractmethod
    def _signal(self, positions: Tensor, velocities: Tensor | None) -> Tensor:
        """Return what is correlated, (n_frames, n_replicas, n_atoms, 3)."""

    @abstractmethod
    def _compare(self, before: Tensor, later: Tensor) -> Tensor:
        """Return f averaged over the atoms, (n_frames, n_replicas), for signals (n_frames, n_replicas, n_chosen, 3)."""

    def _from_correlation(self, curves: Tensor) -> Tensor:
        """Return the observable, (n_curves, ...), from correlations (n_curves, n_lags)."""
        return curves
