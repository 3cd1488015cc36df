"""The Boltzmann estimator: gradients of observables without differentiating through the simulation.

For samples x_i of exp(-U/kT) and an observable g with mean ⟨g⟩,

    ∇θ ⟨g⟩ = -β Cov(g, ∇θ U),

so the gradient of a loss L(⟨g⟩) is that of one weighted sum of energies, Σ_i w_i U(x_i), whose weights are constants. One
backward pass over the frames, in chunks, replaces the energy gradient of every frame.

An observable that depends on the parameters itself, as the pressure does, adds ⟨∇θ g⟩, the gradient of a weighted sum of its
own values over the same frames.

In a large system one broken molecule is lost in the mean over all of them. The local estimator takes the observable of a
neighborhood and the energy of its atoms as one sample; its gradient is still that of one weighted sum of atomic energies.

========================================  =============================================
Equation                                  Code
========================================  =============================================
v = ∂L/∂⟨g⟩                               ``upstream`` in :meth:`BoltzmannEstimator.surrogate_term`
w_i = -β v·(g_i - ⟨g⟩) / (N - 1)          :func:`surrogate_weights`
∇θ L = ∇θ Σ_i [w_i U(x_i) + ω_i v·g(x_i)] :meth:`BoltzmannEstimator.combine`
U(x_i) = Σ_a U_a(x_i)                     ``Potential.atomic_energies``
========================================  =============================================

Where several processes train one potential, each holds samples of its own: means, covariances and the effective sample
size are over the samples of all processes.

Source: Raja, Amin, Pedregosa and Krishnapriyan, TMLR 2025, arXiv:2402.13984, eq. 4 and section 4.3.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from stable_plugin.algorithm.reweighting import SINGLE_PROCESS, ess_fraction, uniform_weights
from stable_plugin.config import MIN_FRAMES, Loss, mean_squared_error
from stable_plugin.md.cells import optional
from stable_plugin.md.neighborhoods import Members
from stable_plugin.models.base import Potential
from stable_plugin.runtime.distributed import DistributedContext
from stable_plugin.runtime.memory import OUT_OF_MEMORY, is_out_of_memory
from stable_plugin.units import BOLTZMANN

log = logging.getLogger(__name__)

T = TypeVar("T")

ATOMS_PER_CALL_CPU, ATOMS_PER_CALL = 1344, 20_000
"""Atoms of the frames of one model call, on a CPU, which gains nothing by more, and on other devices, which idle on less."""


@dataclass(frozen=True)
class Estimate:
    """A loss on the mean of an observable, and its gradient.

    Attributes:
        loss: Loss at the (reweighted) mean.
        mean: The (reweighted) mean, (n_values,).
        gradients: One tensor per trainable parameter, shaped like it.
        ess_fraction: Effective sample size over the number of samples, in (0, 1].
    """

    loss: float
    mean: Tensor
    gradients: list[Tensor]
    ess_fraction: float


Estimates = dict[str, Estimate]
"""Estimates of the objectives that a step follows: ``observables``, ``margin``, or both."""


Explicit = Callable[[Tensor, "Tensor | None"], Tensor]
"""Values of an observable as a function of the parameters: takes frames and their cells, returns (n_frames, n_values)."""


@dataclass(frozen=True)
class SurrogateTerm:
    """A loss on observables as weights of atomic energies, and of the observables that depend on the parameters.

    ∇θ L = ∇θ [Σ_ia w_ia U_a(x_i) + Σ_ik e_ik g_k(x_i)].

    Attributes:
        loss: Loss at the (reweighted) mean.
        mean: The (reweighted) mean, (n_values,).
        atomic_weights: The weights w_ia, (n_frames, n_atoms).
        ess_fraction: Effective sample size over the number of samples, in (0, 1].
        explicit: Observables g that depend on the parameters, each with its weights e_ik, (n_frames, n_values).
    """

    loss: float
    mean: Tensor
    atomic_weights: Tensor
    ess_fraction: float
    explicit: Sequence[tuple[Explicit, Tensor]] = ()


def surrogate_weights(
    values: Tensor,
    upstream: Tensor,
    weights: Tensor,
    temperature_K: float,
    context: DistributedContext = SINGLE_PROCESS,
) -> Tensor:
    """Return the weights w_i for which ∇θ L = ∇θ Σ_i w_i U(x_i).

    w_i = -β Σ_k v_k ω_ik (g_ik - ⟨g_k⟩) / (1 - Σ_i ω_ik²). With equal statistical weights this is the unbiased
    -β v·(g_i - ⟨g⟩) / (N - 1).

    Args:
        values: Observable of each sample, (n_samples, n_values).
        upstream: v = ∂L/∂⟨g⟩, (n_values,).
        weights: Statistical weights ω, (n_samples,), or one set per value, (n_samples, n_values); they sum to one over
            all processes.
        temperature_K: Temperature of the simulation in K.
        context: Processes that share the sample.

    Returns:
        (n_samples,) in 1/eV times the unit of the loss.
    """
    values, upstream = values.double(), upstream.double()
    weights = weights[:, None] if weights.dim() == 1 else weights
    centered = values - context.sum((weights * values).sum(dim=0))
    # All weight on one sample: its deviation is zero, and so is the gradient; without the bound it would be 0/0.
    unbiasing = (1.0 - context.sum(weights.square().sum(dim=0))).clamp_min(torch.finfo(weights.dtype).eps)
    return -((weights * centered / unbiasing) @ upstream) / (BOLTZMANN * temperature_K)


def _loss_from(loss: Loss, target: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda mean: loss(mean, target.to(mean))


class BoltzmannEstimator:
    """Estimates a loss on observables and its gradient from the frames of a simulation.

    Args:
        potential: Potential whose parameters are trained.
        temperature_K: Temperature of the simulation in K.
        chunk: Frames per model call; bounds the memory. Chosen by the number of atoms and the device if None. Halved, with
            a warning, where memory does not suffice.
        context: Processes that share the samples. Each calls every method with its own samples, and all get the same
            estimate.
    """

    def __init__(
        self,
        potential: Potential,
        temperature_K: float,
        chunk: int | None = None,
        context: DistributedContext = SINGLE_PROCESS,
    ) -> None:
        self.potential = potential
        self.temperature_K = temperature_K
        self.chunk = default_chunk(potential) if chunk is None else chunk
        self.context = context

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.potential!r}, temperature_K={self.temperature_K:g}, chunk={self.chunk})"

    @torch.no_grad()
    def atomic_energies(self, positions: Tensor, cell: Tensor | None = None) -> Tensor:
        """Return atomic energies under the present parameters.

        Args:
            positions: (n_frames, n_atoms, 3) in Å.
            cell: Cells of the frames, (n_frames, 3, 3) in Å; that of the system if None.

        Returns:
            (n_frames, n_atoms) in eV, float64.
        """
        with self.potential.frozen():
            parts = self._in_chunks(len(positions), lambda part: self._atomic(positions, cell, part))
        return torch.cat([positions.new_empty(0, positions.shape[1], dtype=torch.float64), *parts])

    def energies(self, positions: Tensor, cell: Tensor | None = None) -> Tensor:
        """Return energies under the present parameters, (n_frames,) in eV, float64; arguments as :meth:`atomic_energies`."""
        return self.atomic_energies(positions, cell).sum(dim=1)

    def estimate(
        self,
        positions: Tensor,
        values: Sequence[Tensor],
        targets: Sequence[Tensor],
        loss: Loss = mean_squared_error,
        weights: Tensor | None = None,
        members: Members | None = None,
        cell: Tensor | None = None,
        explicit: Sequence[Explicit | None] | None = None,
    ) -> Estimate:
        """Return loss and gradient of one or several observables; their losses are added.

        Args:
            positions: (n_frames, n_atoms, 3) in Å.
            values: Per observable, its value in each sample, (n_samples, n_values); NaN where a sample has no value.
            targets: Per observable, (n_values,).
            loss: Loss of a mean and its target.
            weights: Statistical weights of the samples, (n_samples,); equal if None.
            members: Atoms of each sample; whole frames if None.
            cell: Cells of the frames, (n_frames, 3, 3) in Å; that of the system if None.
            explicit: Per observable, its values as a function of the parameters; None for one of the positions alone.

        Raises:
            ValueError: If there are fewer than two samples.
        """
        n_samples = len(positions) if members is None else len(members)
        weights = uniform_weights(n_samples, positions, self.context) if weights is None else weights
        losses = [_loss_from(loss, target) for _, target in zip(values, targets, strict=True)]
        term = self.surrogate_term(positions, values, losses, weights, members, explicit)
        return self.combine(positions, [term], cell)

    def surrogate_term(
        self,
        positions: Tensor,
        values: Sequence[Tensor],
        losses: Sequence[Callable[[Tensor], Tensor]],
        weights: Tensor,
        members: Members | None,
        explicit: Sequence[Explicit | None] | None = None,
    ) -> SurrogateTerm:
        """Return the weights of atomic energies that represent a loss.

        Args:
            positions: (n_frames, n_atoms, 3) in Å.
            values: Per observable, its value in each sample, (n_samples, n_values); NaN where a sample has no value.
            losses: Per observable, its loss as a function of the mean of these values.
            weights: Statistical weights of the samples, (n_samples,).
            members: Atoms of each sample; whole frames if None.
            explicit: Per observable, its values as a function of the parameters; None for one of the positions alone.

        Raises:
            ValueError: If there are fewer than two samples.
        """
        n_samples = self.context.count(len(weights), weights.device)
        if n_samples < MIN_FRAMES:
            raise ValueError(
                f"the estimator got {n_samples} frame(s), but a covariance needs two: record more frames, or use more "
                "replicas."
            )
        total, surrogate, means, weighted = 0.0, torch.zeros_like(weights), [], []
        for value, loss, function in zip(values, losses, explicit or [None] * len(values), strict=True):
            # Each value is averaged over the samples that have it.
            absent = torch.isnan(value)
            present = torch.where(absent, 0.0, weights[:, None])
            present = present / self.context.sum(present.sum(dim=0))
            value = torch.where(absent, 0.0, value.double())
            mean = self.context.sum((present * value).sum(dim=0)).requires_grad_(True)
            with torch.enable_grad():
                part = loss(mean)
            (upstream,) = torch.autograd.grad(part, mean)
            surrogate = surrogate + surrogate_weights(value, upstream, present, self.temperature_K, self.context)
            if function is not None:
                weighted.append((function, present * upstream))
            total += part.item()
            means.append(mean.detach())
        atomic = surrogate[:, None].expand(positions.shape[:2]) if members is None else members.scatter(surrogate)
        return SurrogateTerm(total, torch.cat(means), atomic, ess_fraction(weights, self.context), weighted)

    def combine(self, positions: Tensor, terms: Sequence[SurrogateTerm], cell: Tensor | None = None) -> Estimate:
        """Return one estimate, by one backward pass, of all terms on the same frames.

        Args:
            positions: (n_frames, n_atoms, 3) in Å.
            terms: Terms on these frames.
            cell: Cells of the frames, (n_frames, 3, 3) in Å; that of the system if None.
        """
        atomic_weights = torch.stack([term.atomic_weights for term in terms]).sum(dim=0)
        explicit = [each for term in terms for each in term.explicit]
        return Estimate(
            loss=sum(term.loss for term in terms),
            mean=torch.cat([term.mean for term in terms]),
            gradients=self._backward(positions, atomic_weights, cell, explicit),
            ess_fraction=min(term.ess_fraction for term in terms),
        )

    def _backward(
        self, positions: Tensor, weights: Tensor, cell: Tensor | None, explicit: Sequence[tuple[Explicit, Tensor]]
    ) -> list[Tensor]:
        """Return ∇θ [Σ_ia w_ia U_a(x_i) + Σ_ik e_ik g_k(x_i)] over all processes; arguments as in :class:`SurrogateTerm`."""
        parameters = self.potential.trainable_parameters()
        gradients = [torch.zeros_like(parameter) for parameter in parameters]

        def gradient(part: slice) -> Sequence[Tensor | None]:
            with torch.enable_grad(), self.potential.evaluating():
                weighted = (weights[part] * self._atomic(positions, cell, part)).sum()
                for function, each in explicit:
                    values = function(positions[part], None if cell is None else cell[part])
                    weighted = weighted + (each[part] * values).sum()
            return torch.autograd.grad(weighted, parameters, allow_unused=True)

        for new in self._in_chunks(len(positions), gradient):
            for total, each in zip(gradients, new, strict=True):
                if each is not None:
                    total += each
        return self.context.sum_all(gradients)

    def _in_chunks(self, n_frames: int, call: Callable[[slice], T]) -> Iterator[T]:
        """Yield the result of a call for each chunk of frames; halve the chunk for good where memory does not suffice."""
        first = 0
        while first < n_frames:
            part = slice(first, first + self.chunk)
            try:
                result = call(part)
            except OUT_OF_MEMORY as error:
                if not is_out_of_memory(error) or self.chunk == 1:
                    raise
                self.chunk //= 2
                log.warning("out of memory: the estimator continues with chunk=%d frames per model call.", self.chunk)
                continue
            yield result
            first = part.stop

    def _atomic(self, positions: Tensor, cell: Tensor | None, part: slice) -> Tensor:
        frames = positions[part]
        edges = self.potential.edges(frames, *optional(None if cell is None else cell[part]))
        return self.potential.atomic_energies(frames, edges).double()


def default_chunk(potential: Potential) -> int:
    """Return how many frames of the potential's system make a model call that keeps its device busy."""
    n_atoms = ATOMS_PER_CALL_CPU if potential.device.type == "cpu" else ATOMS_PER_CALL
    return max(1, n_atoms // potential.system.n_atoms)
