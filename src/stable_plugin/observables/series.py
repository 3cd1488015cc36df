"""Observables of trajectories: correlations over time, which no single frame has."""

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


class TimeCorrelation(Metric):
    """The mean over atoms, replicas and time origins of something that two frames of a trajectory have together.

    Trajectories are given in consecutive blocks of frames; only the frames of the last ``max_lag_ps`` are kept. In a
    periodic simulation with friction and noise the centre of mass of the whole system diffuses by itself, which says
    nothing about its atoms: it is subtracted, unless told otherwise.

    Errors are those of independent stretches: every replica's trajectory is cut into stretches as long as
    ``max_lag_ps``, and the spread of their results gives the standard error of the mean.

    Args:
        interval_fs: Time between two frames.
        max_lag_ps: Longest time between two frames that are compared.
        symbols: Elements that are looked at; all if not given.
        remove_drift: Whether to subtract the centre of mass.
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
        # Of each stretch, (n_replicas, n_lags).
        self.add_state("sums", [], dist_reduce_fx="cat")
        self.add_state("counts", [], dist_reduce_fx="cat")
        self.start_trajectory()

    @property
    def name(self) -> str:
        """Name in logs and reports, with the elements."""
        return "_".join([snake_case(type(self).__name__), *(self.symbols or ())])

    @property
    def lags_ps(self) -> Tensor:
        """Times between the frames that are compared, (n_lags,) in ps."""
        return torch.arange(self.n_lags, dtype=torch.float64) * (self.interval_fs / 1000.0)

    @property
    def known_target(self) -> Tensor:
        """The target, shaped as what :meth:`compute` gives.

        Raises:
            RuntimeError: If none is bound yet.
        """
        if self.target is None:
            raise RuntimeError(f"{type(self).__name__} has no target yet: call bind(system, positions, ...) first.")
        return self.target

    def bind(self, system: System, positions: Tensor | None = None, velocities: Tensor | None = None) -> None:
        """Take masses and elements from the system, and the target from a reference trajectory.

        Args:
            system: What moves.
            positions: Reference, (n_frames, n_replicas, n_atoms, 3) in Å, unwrapped; no target if not given.
            velocities: Likewise, in Å per ASE time.

        Raises:
            ValueError: If the system has none of the elements, or the reference is too short.
        """
        unknown = sorted(set(self.symbols or ()) - set(system.symbols))
        if unknown:
            raise ValueError(
                f"symbols={self.symbols} names {', '.join(unknown)}, but the system consists of "
                f"{', '.join(sorted(set(system.symbols)))}."
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
        """Forget all frames."""
        super().reset()
        self.start_trajectory()

    def start_trajectory(self) -> None:
        """Begin a trajectory that does not continue the one before, and keep what that one gave."""
        self._earlier: Tensor | None = None
        self._alive: Tensor | None = None
        self._n_frames = 0

    def update(self, positions: Tensor, velocities: Tensor | None = None, valid: Tensor | None = None) -> None:
        """Add the next frames.

        Args:
            positions: (n_frames, n_replicas, n_atoms, 3) in Å, unwrapped.
            velocities: Likewise, in Å per ASE time.
            valid: Frames that count, (n_frames, n_replicas); a replica counts no more after its first that does not.

        Raises:
            ValueError: If velocities are needed and not given.
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
            shares = self._masses.to(signal) / self._masses.sum()
            signal = signal - (shares[:, None] * signal).sum(dim=2, keepdim=True)
        signal = torch.where(alive[..., None, None], signal, 0.0)[:, :, self._chosen.to(signal.device)]
        self._add(signal, alive)
        self._alive, self._n_frames = alive[-1], self._n_frames + len(signal)

    def _add(self, signal: Tensor, alive: Tensor) -> None:
        together = signal if self._earlier is None else torch.cat([self._earlier, signal])
        n_earlier = len(together) - len(signal)
        stretch = (torch.arange(len(signal), device=signal.device) + self._n_frames) // (self.n_lags - 1)
        ids, place = stretch.unique(return_inverse=True)
        sums = signal.new_zeros(len(ids), signal.shape[1], self.n_lags)
        counts = torch.zeros_like(sums)
        for lag in range(min(self.n_lags, len(together))):
            first = max(0, lag - n_earlier)
            before = together[n_earlier + first - lag : len(together) - lag]
            values = torch.where(alive[first:], self._compare(before, signal[first:]), 0.0)
            sums[..., lag].index_add_(0, place[first:], values)
            counts[..., lag].index_add_(0, place[first:], alive[first:].to(values))
        goes_on = self._n_frames % (self.n_lags - 1) > 0
        for index in range(len(ids)):
            if index == 0 and goes_on:
                self.sums[-1], self.counts[-1] = self.sums[-1] + sums[0], self.counts[-1] + counts[0]
            else:
                self.sums.append(sums[index])
                self.counts.append(counts[index])
        self._earlier = together[-(self.n_lags - 1) :].clone()

    def compute(self) -> Tensor:
        """The observable, over all that was seen."""
        if not self.complete:
            raise ValueError(
                f"max_lag_ps={self.max_lag_ps:g} is longer than the trajectory, which reaches over "
                f"{max(self._longest_lag, 0) * self.interval_fs / 1000.0:g} ps: lower it, or simulate longer."
            )
        sums, counts = (dim_zero_cat(states).sum(dim=0) for states in (self.sums, self.counts))
        return self._from_correlation((sums / counts)[None])[0]

    @property
    def complete(self) -> bool:
        """Whether two frames as far apart as the longest lag have been seen."""
        return self._longest_lag == self.n_lags - 1

    @property
    def _longest_lag(self) -> int:
        if len(self.counts) == 0:
            return -1
        return int((dim_zero_cat(self.counts).sum(dim=0) > 0).sum()) - 1

    def standard_error(self) -> Tensor:
        """Standard error of :meth:`compute`, shaped like it; NaN with fewer than two whole stretches."""
        sums, counts = dim_zero_cat(self.sums), dim_zero_cat(self.counts)
        # The first stretch has few frames to look back to, and the last may be cut short.
        whole = (counts == self.n_lags - 1).all(dim=1)
        if whole.sum() < 2:
            return torch.full_like(self.compute(), torch.nan)
        results = self._from_correlation((sums / counts)[whole])
        return results.std(dim=0) / sqrt(len(results))

    def mean_absolute_error(self) -> float:
        """Mean over the values of the absolute difference to the target."""
        found = self.compute()
        return (found - self.known_target.to(found)).abs().mean().item()

    @abstractmethod
    def axis(self) -> dict[str, Any]:
        """How to draw the values: ``kind`` (bars or curve), ``x``, ``xlabel`` and ``ylabel``."""

    @abstractmethod
    def _signal(self, positions: Tensor, velocities: Tensor | None) -> Tensor:
        """What is compared, (n_frames, n_replicas, n_atoms, 3)."""

    @abstractmethod
    def _compare(self, before: Tensor, later: Tensor) -> Tensor:
        """Mean over the atoms, (n_frames, n_replicas), of frames (n_frames, n_replicas, n_chosen, 3)."""

    def _from_correlation(self, curves: Tensor) -> Tensor:
        """The observable, (n_curves, ...), from correlations (n_curves, n_lags)."""
        return curves
