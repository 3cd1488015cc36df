"""What a simulated window offers the estimator, in whole frames and in sites, and how long it lasts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from stable_plugin.algorithm.estimator import (
    BoltzmannEstimator,
    Estimate,
    Loss,
    ess_fraction,
    mean_squared_error,
    reweighting,
    uniform_weights,
)
from stable_plugin.md.neighborhoods import Members, Neighborhoods, even_sample
from stable_plugin.observables.base import Observable
from stable_plugin.observables.local import LocalObservable
from stable_plugin.runtime import checks
from stable_plugin.runtime.distributed import DistributedContext


@dataclass
class SampleGroup:
    """Observables of one kind of sample, with the samples' energies under the weights they were simulated with.

    Attributes:
        values: Per observable, (n_samples, n_values).
        energies: (n_samples,) in eV.
        chosen: The sites that are used, of those of all frames, (n_samples,); None for whole frames.
    """

    values: list[Tensor]
    energies: Tensor
    chosen: Tensor | None


@dataclass
class WindowData:
    """Frames of one learning window, and the optimizer steps that they have served for.

    Attributes:
        positions: (n_frames, n_atoms, 3) in Å.
        parts: Whole frames, sites, or both.
        steps: Optimizer steps so far.
    """

    positions: Tensor
    parts: list[SampleGroup]
    steps: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> WindowData:
        """The sample that :meth:`state_dict` was taken of."""
        parts = [
            SampleGroup(
                [value.to(device) for value in part["values"]],
                part["energies"].to(device),
                None if part["chosen"] is None else part["chosen"].to(device),
            )
            for part in state["parts"]
        ]
        return cls(state["positions"].to(device), parts, state["steps"])


class WindowEstimator:
    """Makes samples of frames, and estimates from them while they last.

    Args:
        estimator: Of the potential in training.
        observables: What should be reproduced, bound to system and reference.
        loss: Of an observable's mean and its target.
        local: What the local estimator takes as a sample, for the observables that are local; those count by whole
            frames, as all others do, if not given.
        even_sampling: Bins of deviation from which the local estimator draws evenly, and samples drawn per bin and
            replica; it takes every site of every frame if not given.

    Raises:
        ValueError: If ``local`` has no observable to work on, or the system no such neighbourhoods.
    """

    def __init__(
        self,
        estimator: BoltzmannEstimator,
        observables: Sequence[Observable],
        *,
        loss: Loss = mean_squared_error,
        local: Neighborhoods | None = None,
        even_sampling: Sequence[int] | None = None,
    ) -> None:
        self.estimator = estimator
        self.loss = loss
        self.local = local
        self.even_sampling = _checked_sampling(even_sampling, local)
        self._by_site = [obs for obs in observables if local is not None and isinstance(obs, LocalObservable)]
        self._whole = [obs for obs in observables if local is None or not isinstance(obs, LocalObservable)]
        if local is not None:
            local.bind(estimator.potential.system)
            if not self._by_site:
                raise ValueError(
                    f"local={local} has no observable to work on: add one of molecules, such as LocalBondLengths, or "
                    "leave local out."
                )

    def sample(self, positions: Tensor, n_replicas: int, generator: torch.Generator) -> WindowData:
        """The sample that frames make under the present weights.

        Args:
            positions: (n_frames, n_atoms, 3) in Å.
            n_replicas: Replicas that the frames are of.
            generator: Draws the sites, if they are drawn evenly.
        """
        atomic = self.estimator.atomic_energies(positions)
        parts = []
        if self._whole:
            values = [_per_frame(observable, positions) for observable in self._whole]
            parts.append(SampleGroup(values, atomic.sum(dim=1), chosen=None))
        if self.local is not None:
            values = [_per_site(observable, positions, self.local.site_index) for observable in self._by_site]
            chosen = self._choose(values[0], n_replicas, generator)
            energies = self.local.members(positions).select(chosen).energies(atomic)
            parts.append(SampleGroup([value[chosen] for value in values], energies, chosen))
        return WindowData(positions, parts)

    def estimate(self, sample: WindowData, weights: Sequence[Tensor] | None = None) -> Estimate:
        """From a sample that has just been simulated, or with the weights that :meth:`reweighted` gives."""
        if weights is None:
            weights = [uniform_weights(len(part.energies), part.energies, self.processes) for part in sample.parts]
        pulls = []
        for part, each in zip(sample.parts, weights, strict=True):
            observables: Sequence[Observable] = self._whole if part.chosen is None else self._by_site
            targets = [observable.known_target for observable in observables]
            members = self._members(part, sample.positions)
            pulls.append(
                self.estimator.surrogate_term(sample.positions, part.values, targets, self.loss, each, members)
            )
        return self.estimator.combine(sample.positions, pulls)

    def reweighted(self, sample: WindowData) -> tuple[list[Tensor], float]:
        """Statistical weights under the present parameters, by part, and the smallest effective share among the parts."""
        atomic = self.estimator.atomic_energies(sample.positions)
        weights = []
        for part in sample.parts:
            members = self._members(part, sample.positions)
            energies = atomic.sum(dim=1) if members is None else members.energies(atomic)
            weights.append(reweighting(energies, part.energies, self.estimator.temperature_K, self.processes))
        shares = [ess_fraction(each, self.processes) for each in weights]
        return weights, torch.tensor(shares, dtype=torch.float64).min().item()  # NaN if one of them is

    def observed_loss(self, positions: Tensor) -> float:
        """Loss of all observables over frames, (n_frames, n_atoms, 3) in Å, and over those of all processes."""
        total = 0.0
        n_frames = self.processes.count(len(positions), positions.device)
        for observable in [*self._whole, *self._by_site]:
            mean = self.processes.sum(_per_frame(observable, positions).double().sum(dim=0)) / n_frames
            total += self.loss(mean, observable.known_target.to(mean)).item()
        return total

    @property
    def processes(self) -> DistributedContext:
        """Those that have samples."""
        return self.estimator.processes

    def _members(self, part: SampleGroup, positions: Tensor) -> Members | None:
        if part.chosen is None or self.local is None:
            return None
        return self.local.members(positions).select(part.chosen)

    def _choose(self, values: Tensor, n_replicas: int, generator: torch.Generator) -> Tensor:
        """Sites that have any value, or an even sample of them."""
        present = (~torch.isnan(values).all(dim=1)).nonzero()[:, 0]
        if self.even_sampling is None:
            return present
        n_bins, per_bin = self.even_sampling
        target = self._by_site[0].known_target
        deviation = (values[present] - target.to(values)).abs().nan_to_num(0.0).amax(dim=1)
        largest = self.processes.max(torch.cat([deviation, deviation.new_zeros(1)]).max())
        return present[even_sample(deviation, n_bins, per_bin * n_replicas, generator, largest)]


def _per_frame(observable: Observable, positions: Tensor) -> Tensor:
    """Of frames, (n_frames, n_values), also of none: where the replicas of a process all broke at once."""
    if len(positions) == 0:
        return positions.new_empty(0, len(observable.known_target))
    return observable.per_frame(positions)


def _per_site(observable: LocalObservable, positions: Tensor, site_index: Tensor) -> Tensor:
    """Of the sites of all frames, (n_frames * n_sites, n_values), likewise."""
    if len(positions) == 0:
        return positions.new_empty(0, len(observable.known_target))
    return observable.per_site(positions, site_index).flatten(0, 1)


def _checked_sampling(even_sampling: Any, local: Neighborhoods | None) -> tuple[int, int] | None:
    if even_sampling is None:
        return None
    if local is None:
        raise ValueError(f"even_sampling={even_sampling} needs the local estimator: give local=, or leave it out.")
    if not isinstance(even_sampling, Sequence) or len(even_sampling) != 2:
        raise ValueError(
            f"even_sampling={even_sampling!r} is not two numbers: give (bins, samples per bin and replica)."
        )
    n_bins, per_bin = even_sampling
    return checks.count("even_sampling", n_bins), checks.count("even_sampling", per_bin)
