"""Observables of a trajectory in order: sums over pairs of frames, by the time between them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from stable_plugin import checks
from stable_plugin.observables.lagged import lagged_products
from stable_plugin.systems import System

N_BLOCKS = 32
"""Blocks of time origins kept per replica; when they are full, each two become one."""

ENOUGH_REPLICAS = 16
"""From so many replicas on, they alone tell the error."""

NUMBERS_AT_ONCE = 2**23
"""Products of frames held in memory at a time."""


class SeriesObservable(Metric):
    """An observable of pairs of frames, as a :class:`torchmetrics.Metric`: ``update`` with blocks of a trajectory.

    Blocks follow each other without a gap; :meth:`start_new` begins another trajectory. Sums are in double precision, on
    the device of the frames, and do not depend on how the trajectory is cut. Only the frames of the last ``max_lag_ps``
    are kept. A subclass gives :meth:`_features` and :meth:`_from_means`.

    Args:
        interval_fs: Time between frames in fs.
        max_lag_ps: Longest time between the two frames of a pair in ps, rounded down to whole intervals.
        symbols: Elements that are counted; all if not given.
        remove_drift: Whether to take the motion of the centre of mass of the whole system from that of its atoms. In a
            periodic system a Langevin thermostat pushes the centre of mass about, which diffuses by itself: that says
            nothing about the material, and depends on the size of the system.
        target: Values that the potential should reproduce, (n_values,); taken from the reference if not given.
        kwargs: Passed to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If a number is out of range, or ``max_lag_ps`` is shorter than the interval.
    """

    # Calling the metric then sets all states aside for the batch's own value, the kept frames with them.
    full_state_update = True
    is_differentiable = False
    higher_is_better = None
    needs_velocities = False
    squared_differences = False

    sums: Tensor
    counts: Tensor
    kept: Tensor
    alive: Tensor
    clock: Tensor

    def __init__(
        self,
        interval_fs: float,
        max_lag_ps: float,
        symbols: Sequence[str] | None = None,
        remove_drift: bool = True,
        target: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.interval_fs = float(checks.number("interval_fs", interval_fs, above=0))
        self.max_lag_ps = float(
            checks.number(
                "max_lag_ps", max_lag_ps, least=1e-3 * interval_fs, hint="It takes at least one interval between frames."
            )
        )
        self.last_lag = int(1e3 * max_lag_ps / interval_fs + 1e-6)
        self.symbols = _elements(symbols)
        self.remove_drift = remove_drift
        self.target: Tensor | None = None
        self.target_error: Tensor | None = None
        self._given_target = None if target is None else torch.as_tensor(target, dtype=torch.float64).reshape(-1)
        self._system: System | None = None
        empty = torch.zeros(0, N_BLOCKS, self.last_lag + 1, dtype=torch.float64)
        self.add_state("sums", empty, dist_reduce_fx="cat")
        self.add_state("counts", empty.clone(), dist_reduce_fx="cat")
        self.add_state("kept", torch.zeros(0, 0, 0, dtype=torch.float64), dist_reduce_fx=None)
        self.add_state("alive", torch.zeros(0, dtype=torch.bool), dist_reduce_fx=None)
        # Frames so far, those of this trajectory, and the length of a block. Blocks twice as long as the longest lag
        # share few frames with the next: for diffusion the error comes out 7 % too small where it is worst.
        self.add_state("clock", torch.tensor([0, 0, 2 * self.last_lag]), dist_reduce_fx=None)

    @property
    def name(self) -> str:
        """Name in logs and reports, with the elements."""
        words = "".join(f"_{c.lower()}" if c.isupper() else c for c in type(self).__name__).lstrip("_")
        return "_".join([words, *self.symbols])

    @property
    def lags_ps(self) -> Tensor:
        """Times between the frames of a pair in ps, (n_lags,), from zero."""
        return torch.arange(self.last_lag + 1, dtype=torch.float64) * (1e-3 * self.interval_fs)

    def bind(self, system: System, positions: Tensor | None = None, velocities: Tensor | None = None) -> None:
        """Take masses and elements from the system, and the target from a reference trajectory.

        Args:
            system: What is simulated.
            positions: Reference (n_frames, n_replicas, n_atoms, 3) in unwrapped Å; without it there is no target, unless
                one was given.
            velocities: The same in Å per ASE time.

        Raises:
            ValueError: If the system has none of ``symbols``, the reference is shorter than ``max_lag_ps``, or a target
                was given and has another length.
        """
        unknown = sorted(set(self.symbols) - set(system.symbols))
        if unknown:
            raise ValueError(
                f"symbols={list(self.symbols)} names {', '.join(unknown)}, but the system consists of "
                f"{', '.join(sorted(set(system.symbols)))}."
            )
        self._system = system
        n_values = self._from_means(torch.ones(self.last_lag + 1, dtype=torch.float64)).shape
        if self._given_target is not None and self._given_target.shape != n_values:
            raise ValueError(
                f"target of {type(self).__name__} has shape {tuple(self._given_target.shape)}, but the observable has "
                f"{tuple(n_values)}: give one number per value."
            )
        self.target, self.target_error = self._given_target, None
        if positions is None or self._given_target is not None:
            return
        if len(positions) <= self.last_lag:
            raise ValueError(
                f"max_lag_ps={self.max_lag_ps:g} takes {self.last_lag + 1} frames every {self.interval_fs:g} fs, but the "
                f"reference has {len(positions)}: lower max_lag_ps, or give a longer trajectory."
            )
        probe = self.clone()
        probe.reset()
        probe.update(positions, velocities)
        self.target, self.target_error = probe._values(), probe.standard_error()

    def update(self, positions: Tensor, velocities: Tensor | None = None, valid: Tensor | None = None) -> None:
        """Add the next frames of a trajectory.

        Args:
            positions: (n_frames, n_replicas, n_atoms, 3) in Å, not wrapped into the cell.
            velocities: The same in Å per ASE time.
            valid: Which frames to trust, (n_frames, n_replicas); all if not given. From its first frame that is not
                valid on, a replica adds nothing, until :meth:`start_new`.

        Raises:
            RuntimeError: If no system is bound.
            ValueError: If a shape does not fit, or velocities are needed and missing.
        """
        moving, valid = self._checked(positions, velocities, valid)
        n_frames, n_replicas = valid.shape
        if n_frames == 0:
            return
        device = positions.device
        seen, in_trajectory, block_length = self.clock.tolist()
        if in_trajectory == 0:
            self.alive = torch.ones(n_replicas, dtype=torch.bool, device=device)
            self.kept = torch.zeros(n_replicas, 0, 0, dtype=torch.float64, device=device)
            self._make_room(n_replicas, device)
        while seen + n_frames > N_BLOCKS * block_length:
            self.sums, self.counts = _each_two(self.sums), _each_two(self.counts)
            block_length *= 2
        alive = self.alive & valid.cummin(dim=0).values
        self.alive = alive[-1].clone()
        # Pieces no longer than the lag waste little of the product; fewer frames where replicas are many.
        room = int(0.5 * (sqrt(self.last_lag**2 + 4 * NUMBERS_AT_ONCE / n_replicas) - self.last_lag))
        size = max(1, min(room, max(self.last_lag, 64)))
        for piece, flags in zip(moving.split(size), alive.split(size), strict=True):
            self._add(piece, flags.T, seen, in_trajectory, block_length)
            seen, in_trajectory = seen + len(piece), in_trajectory + len(piece)
        self.clock = torch.tensor([seen, in_trajectory, block_length], device=self.clock.device)

    def start_new(self) -> None:
        """Begin another trajectory: its frames form no pairs with those before. Sums are kept, all replicas valid."""
        self.clock = self.clock * torch.tensor([1, 0, 1], device=self.clock.device)
        self.kept, self.alive = self.kept[:0], self.alive[:0]

    def compute(self) -> Tensor:
        """The values over all pairs seen, (n_values,); torchmetrics gives a single value without its axis, ().

        A lag that no pair of valid frames spans is NaN.
        """
        return self._values()

    def standard_error(self) -> Tensor:
        """Standard error of :meth:`compute`, (n_values,), by leaving out one group of pairs after another (jackknife).

        With 16 replicas or more each is a group. With fewer, a group is a block of time origins of one replica, of twice
        ``max_lag_ps`` or longer: at most 32 a replica. That is honest if what happens is forgotten within a block. NaN
        with fewer than two groups: then give more replicas or a longer trajectory.

        Source: Efron and Stein, Ann. Stat. 9, 586 (1981).
        """
        sums, counts = (state.reshape(-1, N_BLOCKS, self.last_lag + 1) for state in (self.sums, self.counts))
        if int((counts[:, :, 0].sum(dim=1) > 0).sum()) >= ENOUGH_REPLICAS:
            sums, counts = sums.sum(dim=1), counts.sum(dim=1)
        else:
            sums, counts = sums.flatten(0, 1), counts.flatten(0, 1)
        used = counts[:, 0] > 0
        sums, counts = sums[used], counts[used]
        n_groups = len(sums)
        if n_groups < 2:
            return torch.full_like(self._values(), torch.nan)
        without = self._from_means((sums.sum(dim=0) - sums) / (counts.sum(dim=0) - counts))
        return ((n_groups - 1) * without.var(dim=0, correction=0)).sqrt()

    @property
    def known_target(self) -> Tensor:
        """The target, (n_values,).

        Raises:
            RuntimeError: If none is bound yet.
        """
        if self.target is None:
            raise RuntimeError(f"{type(self).__name__} has no target yet: call bind(system, positions) first.")
        return self.target

    def mean_absolute_error(self) -> float:
        """Mean over the values of the absolute difference to the target."""
        return (self.compute() - self.known_target.to(self.sums.device)).abs().mean().item()

    @abstractmethod
    def axis(self) -> dict[str, Any]:
        """How to draw the values: ``kind`` (bars or curve), ``x``, ``xlabel`` and ``ylabel``."""

    @abstractmethod
    def _weights(self, masses: Tensor) -> Tensor:
        """What each counted atom weighs in the sum over atoms, from masses in u, both (n_counted,)."""

    @abstractmethod
    def _from_means(self, means: Tensor) -> Tensor:
        """The values, (..., n_values), from the mean product or squared difference of each lag, (..., n_lags)."""

    def _values(self) -> Tensor:
        sums, counts = (state.reshape(-1, self.last_lag + 1).sum(dim=0) for state in (self.sums, self.counts))
        return self._from_means(sums / counts)

    def _add(self, piece: Tensor, alive: Tensor, seen: int, in_trajectory: int, block_length: int) -> None:
        """Add the pairs that end in the frames of ``piece`` (n_frames, n_replicas, n_atoms, 3), alive (n_replicas, n_frames)."""
        new = self._features(piece, alive)
        known = new if in_trajectory == 0 else torch.cat([self.kept, new], dim=1)
        products = lagged_products(known, len(piece), self.last_lag, self.squared_differences)
        products = products * alive[..., None]
        ends = torch.arange(len(piece), device=new.device)[:, None]
        origins = ends - torch.arange(self.last_lag + 1, device=new.device)
        exists = origins >= -in_trajectory
        blocks = (origins + seen).div(block_length, rounding_mode="floor")
        first, last = (seen - min(in_trajectory, self.last_lag)) // block_length, (seen + len(piece) - 1) // block_length
        for block in range(first, last + 1):
            chosen = (exists & (blocks == block)).double()
            self.sums[:, block] += torch.einsum("rtl,tl->rl", products, chosen)
            self.counts[:, block] += alive.double() @ chosen
        self.kept = known[:, max(0, known.shape[1] - self.last_lag) :].clone()

    def _features(self, piece: Tensor, alive: Tensor) -> Tensor:
        """Numbers whose products are summed, (n_replicas, n_frames, 3 n_counted), zero where not alive."""
        system = self._known_system()
        masses = system.masses.to(piece.device, torch.float64)
        values = torch.where(alive.T[..., None, None], piece.double(), 0.0)
        if self.remove_drift:
            values = values - (masses[:, None] * values).sum(dim=2, keepdim=True) / masses.sum()
        if self.symbols:
            atoms = torch.tensor([symbol in self.symbols for symbol in system.symbols], device=piece.device)
            values, masses = values[:, :, atoms], masses[atoms]
        return (values * self._weights(masses).sqrt()[:, None]).flatten(2).transpose(0, 1)

    def _make_room(self, n_replicas: int, device: torch.device) -> None:
        """Have sums for so many replicas; those of an earlier trajectory are kept."""
        missing = max(0, n_replicas - len(self.sums))
        for state in ("sums", "counts"):
            rows = getattr(self, state).to(device)
            setattr(self, state, torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]))

    def _checked(self, positions: Tensor, velocities: Tensor | None, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _known_system(self) -> System:
        if self._system is None:
            raise RuntimeError(f"{type(self).__name__} has no system yet: call bind(system, positions) first.")
        return self._system
