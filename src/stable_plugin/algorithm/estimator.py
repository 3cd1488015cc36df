"""The Boltzmann estimator: gradients of observables without differentiating through the simulation.

For samples x_i of exp(-U/kT) and an observable g with mean ⟨g⟩,

    ∇θ ⟨g⟩ = -β Cov(g, ∇θ U),

so the gradient of a loss L(⟨g⟩) is that of one weighted sum of energies, Σ_i w_i U(x_i), whose weights are constants.
One backward pass over the frames, in chunks, replaces the energy gradient of every frame.

In a large system one broken molecule drowns in the mean over all. The local estimator takes a neighbourhood's observable
and the energy of its atoms as a sample of its own; its gradient is still that of one sum, of atomic energies with a
weight each.

Where several processes train one potential, each holds samples of its own: means, covariances and the effective sample
size are over the samples of all.

Source: Raja, Amin, Pedregosa and Krishnapriyan, TMLR 2025, arXiv:2402.13984, eq. 4 and section 4.3; reweighting to
changed parameters as in Thaler and Zavadlav, Nat. Commun. 12, 6884 (2021), eq. 3 to 5.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from stable_plugin.md.neighborhoods import Members
from stable_plugin.models.base import Potential
from stable_plugin.runtime.distributed import DistributedContext
from stable_plugin.runtime.memory import OUT_OF_MEMORY, is_out_of_memory
from stable_plugin.units import BOLTZMANN

log = logging.getLogger(__name__)

T = TypeVar("T")

ALONE = DistributedContext()

Loss = Callable[[Tensor, Tensor], Tensor]
"""A differentiable scalar of the mean observable and its target, both (n_values,)."""


@dataclass(frozen=True)
class Estimate:
    """A loss on an observable's mean and its gradient.

    Attributes:
        loss: The loss at the (reweighted) mean.
        mean: The (reweighted) mean, (n_values,).
        gradients: One tensor per trainable parameter, shaped like it.
        ess_fraction: Effective sample size over the number of frames, in (0, 1].
    """

    loss: float
    mean: Tensor
    gradients: list[Tensor]
    ess_fraction: float


@dataclass(frozen=True)
class SurrogateTerm:
    """A loss on observables, as weights of atomic energies: ∇θ L = ∇θ Σ_ia w_ia U_a(x_i).

    Attributes:
        loss: The loss at the (reweighted) mean.
        mean: The (reweighted) mean, (n_values,).
        atomic: The weights, (n_frames, n_atoms).
        ess_fraction: Effective sample size over the number of samples, in (0, 1].
    """

    loss: float
    mean: Tensor
    atomic: Tensor
    ess_fraction: float


def uniform_weights(n_frames: int, like: Tensor, processes: DistributedContext = ALONE) -> Tensor:
    """Statistical weights of an unbiased sample, (n_frames,), summing to one over all processes."""
    n_all = processes.count(n_frames, like.device)
    return torch.full((n_frames,), 1.0 / max(n_all, 1), dtype=torch.float64, device=like.device)


def reweighting(
    energies: Tensor, sampled_energies: Tensor, temperature_K: float, processes: DistributedContext = ALONE
) -> Tensor:
    """Statistical weights ω_i ∝ exp(-β (U_θ(x_i) - U_θ0(x_i))), (n_frames,), summing to one over all processes.

    Args:
        energies: Under the present parameters, (n_frames,) in eV.
        sampled_energies: Under those that the frames were sampled with, (n_frames,) in eV.
        temperature_K: Temperature of the sample in K.
        processes: Those that have samples.
    """
    exponent = (sampled_energies.double() - energies.double()) / (BOLTZMANN * temperature_K)
    largest = processes.max(torch.cat([exponent, exponent.new_full((1,), -torch.inf)]).max())
    weights = torch.exp(exponent - largest)
    return weights / processes.sum(weights.sum())


def ess_fraction(weights: Tensor, processes: DistributedContext = ALONE) -> float:
    """Kish's effective sample size 1/Σω² over the number of frames, of all processes."""
    n_all = processes.count(len(weights), weights.device)
    return (1.0 / (processes.sum(weights.square().sum()) * n_all)).item()


def surrogate_weights(
    values: Tensor, upstream: Tensor, weights: Tensor, temperature_K: float, processes: DistributedContext = ALONE
) -> Tensor:
    """The w_i for which ∇θ L = ∇θ Σ_i w_i U(x_i).

    w_i = -β Σ_k v_k ω_ik (g_ik - ⟨g_k⟩) / (1 - Σ_i ω_ik²); with equal weights this is the unbiased
    -β v·(g_i - ⟨g⟩) / (n - 1).

    Args:
        values: Observable of each sample, (n_samples, n_values).
        upstream: v = ∂L/∂⟨g⟩, (n_values,).
        weights: Statistical weights, (n_samples,) or for each value its own, (n_samples, n_values); they sum to one
            over all processes.
        temperature_K: Temperature of the sample in K.
        processes: Those that have samples.

    Returns:
        (n_samples,) in 1/eV times the units of the loss.
    """
    values, upstream = values.double(), upstream.double()
    weights = weights[:, None] if weights.dim() == 1 else weights
    centred = values - processes.sum((weights * values).sum(dim=0))
    # All weight on one sample: its deviation is zero, and so is the gradient; not zero over zero.
    unbiasing = (1.0 - processes.sum(weights.square().sum(dim=0))).clamp_min(torch.finfo(weights.dtype).eps)
    return -((weights * centred / unbiasing) @ upstream) / (BOLTZMANN * temperature_K)


def mean_squared_error(mean: Tensor, target: Tensor) -> Tensor:
    """Mean over the values of (mean - target)²."""
    return (mean - target).square().mean()


class BoltzmannEstimator:
    """Estimates loss and gradient from frames of a simulation.

    Args:
        potential: Whose parameters the gradient is for.
        temperature_K: Temperature of the simulation in K.
        chunk: Frames per model call; bounds the memory. Halved where memory does not suffice.
        processes: Those that have samples; each calls every method with its own, and all get the same estimate.
    """

    def __init__(
        self, potential: Potential, temperature_K: float, chunk: int = 32, processes: DistributedContext = ALONE
    ) -> None:
        self.potential = potential
        self.temperature_K = temperature_K
        self.chunk = chunk
        self.processes = processes

    @torch.no_grad()
    def atomic_energies(self, positions: Tensor) -> Tensor:
        """Atomic energies under the present parameters, (n_frames, n_atoms) in eV, float64.

        Args:
            positions: (n_frames, n_atoms, 3) in Å.
        """
        with self.potential.frozen():
            parts = self._in_chunks(len(positions), lambda part: self._atomic(positions[part]))
        return torch.cat([positions.new_empty(0, positions.shape[1], dtype=torch.float64), *parts])

    def energies(self, positions: Tensor) -> Tensor:
        """Energies of frames under the present parameters, (n_frames,) in eV, float64."""
        return self.atomic_energies(positions).sum(dim=1)

    def estimate(
        self,
        positions: Tensor,
        values: Sequence[Tensor],
        targets: Sequence[Tensor],
        loss: Loss = mean_squared_error,
        weights: Tensor | None = None,
        members: Members | None = None,
    ) -> Estimate:
        """Loss and gradient of one or several observables; their losses are added.

        Args:
            positions: (n_frames, n_atoms, 3) in Å.
            values: Per observable, its value in each sample, (n_samples, n_values); NaN where a sample has none.
            targets: Per observable, (n_values,).
            loss: Of a mean and its target.
            weights: Statistical weights of the samples, (n_samples,); equal if not given.
            members: The atoms of each sample; whole frames if not given.

        Raises:
            ValueError: If there are fewer than two samples.
        """
        n_samples = len(positions) if members is None else len(members)
        weights = uniform_weights(n_samples, positions, self.processes) if weights is None else weights
        return self.combine(positions, [self.surrogate_term(positions, values, targets, loss, weights, members)])

    def surrogate_term(
        self,
        positions: Tensor,
        values: Sequence[Tensor],
        targets: Sequence[Tensor],
        loss: Loss,
        weights: Tensor,
        members: Members | None,
    ) -> SurrogateTerm:
        """What observables ask of the atomic energies; the arguments are those of :meth:`estimate`."""
        n_samples = self.processes.count(len(weights), weights.device)
        if n_samples < 2:
            raise ValueError(
                f"the estimator got {n_samples} frame(s): a covariance needs two. Record more frames or replicas."
            )
        total, surrogate, means = 0.0, torch.zeros_like(weights), []
        for value, target in zip(values, targets, strict=True):
            # Each value is averaged over the samples that have it.
            absent = torch.isnan(value)
            held = torch.where(absent, 0.0, weights[:, None])
            held = held / self.processes.sum(held.sum(dim=0))
            value = torch.where(absent, 0.0, value.double())
            mean = self.processes.sum((held * value).sum(dim=0)).requires_grad_(True)
            with torch.enable_grad():
                part = loss(mean, target.to(mean))
            (upstream,) = torch.autograd.grad(part, mean)
            surrogate = surrogate + surrogate_weights(value, upstream, held, self.temperature_K, self.processes)
            total += part.item()
            means.append(mean.detach())
        atomic = surrogate[:, None].expand(positions.shape[:2]) if members is None else members.scatter(surrogate)
        return SurrogateTerm(total, torch.cat(means), atomic, ess_fraction(weights, self.processes))

    def combine(self, positions: Tensor, pulls: Sequence[SurrogateTerm]) -> Estimate:
        """One estimate, by one backward pass, of all that pulls at the same frames (n_frames, n_atoms, 3)."""
        return Estimate(
            loss=sum(pull.loss for pull in pulls),
            mean=torch.cat([pull.mean for pull in pulls]),
            gradients=self._backward(positions, torch.stack([pull.atomic for pull in pulls]).sum(dim=0)),
            ess_fraction=min(pull.ess_fraction for pull in pulls),
        )

    def _backward(self, positions: Tensor, weights: Tensor) -> list[Tensor]:
        """∇θ Σ_ia w_ia U_a(x_i) over all processes, for weights of atomic energies (n_frames, n_atoms)."""
        parameters = self.potential.trainable_parameters()
        gradients = [torch.zeros_like(parameter) for parameter in parameters]

        def gradient(part: slice) -> Sequence[Tensor | None]:
            with torch.enable_grad(), self.potential.evaluating():
                weighted = (weights[part] * self._atomic(positions[part])).sum()
            return torch.autograd.grad(weighted, parameters, allow_unused=True)

        for new in self._in_chunks(len(positions), gradient):
            for total, each in zip(gradients, new, strict=True):
                if each is not None:
                    total += each
        return self.processes.sum_all(gradients)

    def _in_chunks(self, n_frames: int, call: Callable[[slice], T]) -> Iterator[T]:
        """A call for each chunk of frames; chunks are halved, for good, where memory does not suffice."""
        first = 0
        while first < n_frames:
            part = slice(first, first + self.chunk)
            try:
                result = call(part)
            except OUT_OF_MEMORY as error:
                if not is_out_of_memory(error) or self.chunk == 1:
                    raise
                self.chunk //= 2
                log.warning("out of memory: the estimator goes on with chunk=%d frames per model call.", self.chunk)
                continue
            yield result
            first = part.stop

    def _atomic(self, positions: Tensor) -> Tensor:
        return self.potential.atomic_energies(positions, self.potential.edges(positions)).double()
