"""Frames of one window as samples of the Boltzmann estimator: whole frames, sites, or both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stable_plugin.algorithm.estimator import BoltzmannEstimator, Estimate
from stable_plugin.algorithm.reweighting import ess_fraction, reweight, uniform_weights
from stable_plugin.config import Loss, mean_squared_error
from stable_plugin.md.cells import optional
from stable_plugin.md.neighborhoods import Members, Neighborhoods, even_sample
from stable_plugin.observables.base import Observable
from stable_plugin.observables.local import LocalObservable
from stable_plugin.observables.potential import PotentialObservable


@dataclass
class SampleGroup:
    """Observables of one kind of sample, with the samples' energies under the weights they were simulated with.

    Attributes:
        values: Per observable, (n_samples, n_values).
        energies: (n_samples,) in eV.
        sites: Indices of the sites that are used, counted through all frames, (n_samples,); None for whole frames.
    """

    values: list[Tensor]
    energies: Tensor
    sites: Tensor | None


@dataclass
class WindowData:
    """Frames of one window, as samples.

    Attributes:
        positions: (n_frames, n_atoms, 3) in Å.
        groups: Whole frames, sites, or both.
        cell: Cells of the frames, (n_frames, 3, 3) in Å; None if all are that of the system.
    """

    positions: Tensor
    groups: list[SampleGroup]
    cell: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return plain data for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], device: torch.device) -> WindowData:
        """Return the data that :meth:`state_dict` was taken from."""
        groups = [
            SampleGroup(
                [value.to(device) for value in group["values"]],
                group["energies"].to(device),
                None if group["sites"] is None else group["sites"].to(device),
            )
            for group in state["groups"]
        ]
        cell = state["cell"]
        return cls(state["positions"].to(device), groups, None if cell is None else cell.to(device))


class WindowEstimator:
    """Turns the frames of a window into samples, and estimates from them while their effective sample size lasts.

    Args:
        estimator: Estimator of the potential in training.
        observables: Observables to reproduce, bound to system and reference.
        loss: Loss of an observable's mean and its target.
        local: Samples of the local estimator, for the observables that are local; all observables use whole frames if
            None.
        even_sampling: Number of bins of deviation from which the local estimator draws evenly, and samples drawn per bin
            and replica; every site of every frame is used if None.

    Raises:
        ValueError: If ``local`` has no local observable to work on, or the system has no such neighborhoods.
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
        self.context = estimator.context
        self.loss = loss
        self.local = local
        self.even_sampling = even_sampling
        self.observables = list(observables)
        self._by_site = [obs for obs in observables if local is not None and isinstance(obs, LocalObservable)]
        self._by_frame = [obs for obs in observables if local is None or not isinstance(obs, LocalObservable)]
        if even_sampling is not None and local is None:
            raise ValueError(
                f"even_sampling={even_sampling} needs the local estimator: set local=, or leave even_sampling out."
            )
        for observable in self.observables:
            if isinstance(observable, PotentialObservable):
                observable.attach(estimator.potential, estimator.temperature_K, estimator.chunk)
        if local is not None:
            local.bind(estimator.potential.system)
            if not self._by_site:
                raise ValueError(
                    f"local={local} has no observable to work on: add a local one, such as LocalBondLengths, or leave "
                    "local out."
                )

    def collect(
        self, positions: Tensor, n_replicas: int, generator: torch.Generator, cell: Tensor | None = None
    ) -> WindowData:
        """Return the samples that frames make under the present weights.

        Args:
            positions: (n_frames, n_atoms, 3) in Å.
            n_replicas: Number of replicas that the frames come from.
            generator: Random stream that draws sites, if they are drawn evenly.
            cell: Cells of the frames, (n_frames, 3, 3) in Å; that of the system if None.
        """
        atomic = self.estimator.atomic_energies(positions, cell)
        groups = []
        if self._by_frame:
            values = [_per_frame(observable, positions, cell) for observable in self._by_frame]
            groups.append(SampleGroup(values, atomic.sum(dim=1), sites=None))
        if self.local is not None:
            values = [_per_site(observable, positions, self.local.site_index, cell) for observable in self._by_site]
            sites = self._draw_sites(values[0], n_replicas, generator)
            energies = self.local.members(positions, cell).select(sites).energies(atomic)
            groups.append(SampleGroup([value[sites] for value in values], energies, sites))
        return WindowData(positions, groups, cell=cell)

    def estimate(self, data: WindowData, weights: Sequence[Tensor] | None = None) -> Estimate:
        """Return the estimate from samples.

        Args:
            data: The samples.
            weights: Statistical weights by group, as :meth:`reweight` returns them; equal weights, for samples that have
                just been simulated, if None.
        """
        is_reweighted = weights is not None
        if weights is None:
            weights = [uniform_weights(len(group.energies), group.energies, self.context) for group in data.groups]
        terms = []
        for group, each in zip(data.groups, weights, strict=True):
            observables: Sequence[Observable] = self._by_frame if group.sites is None else self._by_site
            losses = [partial(observable.loss, self.loss) for observable in observables]
            explicit = [each.of_frames if isinstance(each, PotentialObservable) else None for each in observables]
            values = [
                # The parameters have changed since the frames were collected.
                _per_frame(observable, data.positions, data.cell) if is_reweighted and function else value
                for observable, function, value in zip(observables, explicit, group.values, strict=True)
            ]
            members = self._members(group, data)
            terms.append(self.estimator.surrogate_term(data.positions, values, losses, each, members, explicit))
        return self.estimator.combine(data.positions, terms, data.cell)

    def reweight(self, data: WindowData) -> tuple[list[Tensor], float]:
        """Return statistical weights under the present parameters, by group, and the smallest effective fraction."""
        atomic = self.estimator.atomic_energies(data.positions, data.cell)
        weights = []
        for group in data.groups:
            members = self._members(group, data)
            energies = atomic.sum(dim=1) if members is None else members.energies(atomic)
            weights.append(reweight(energies, group.energies, self.estimator.temperature_K, self.context))
        fractions = [ess_fraction(each, self.context) for each in weights]
        # Tensor.min() propagates NaN, which Python's min() may drop.
        return weights, torch.tensor(fractions, dtype=torch.float64).min().item()

    def observed_loss(self, positions: Tensor, cell: Tensor | None = None) -> float:
        """Return the loss of all observables over the frames of all processes.

        Args:
            positions: Frames of this process, (n_frames, n_atoms, 3) in Å.
            cell: Cells of the frames, (n_frames, 3, 3) in Å; that of the system if None.
        """
        total = 0.0
        n_frames = self.context.count(len(positions), positions.device)
        for observable in [*self._by_frame, *self._by_site]:
            mean = self.context.sum(_per_frame(observable, positions, cell).double().sum(dim=0)) / n_frames
            total += observable.loss(self.loss, mean).item()
        return total

    def _members(self, group: SampleGroup, data: WindowData) -> Members | None:
        if group.sites is None or self.local is None:
            return None
        return self.local.members(data.positions, data.cell).select(group.sites)

    def _draw_sites(self, values: Tensor, n_replicas: int, generator: torch.Generator) -> Tensor:
        """Return the sites that have a value, or a sample of them that is even in their deviation."""
        present = (~torch.isnan(values).all(dim=1)).nonzero()[:, 0]
        if self.even_sampling is None:
            return present
        n_bins, per_bin = self.even_sampling
        target = self._by_site[0].known_target
        deviation = (values[present] - target.to(values)).abs().nan_to_num(0.0).amax(dim=1)
        largest = self.context.max(torch.cat([deviation, deviation.new_zeros(1)]).max())
        return present[even_sample(deviation, n_bins, per_bin * n_replicas, generator, largest)]


def _per_frame(observable: Observable, positions: Tensor, cell: Tensor | None) -> Tensor:
    """Return the observable of each frame, (n_frames, n_means); a process whose replicas all broke has no frame."""
    if len(positions) == 0:
        return positions.new_empty(0, observable.n_means)
    return observable.per_frame(positions, *optional(cell))


def _per_site(observable: LocalObservable, positions: Tensor, site_index: Tensor, cell: Tensor | None) -> Tensor:
    """Return the observable of the sites of all frames, (n_frames * n_sites, n_values)."""
    if len(positions) == 0:
        return positions.new_empty(0, len(observable.known_target))
    return observable.per_site(positions, site_index, *optional(cell)).flatten(0, 1)
