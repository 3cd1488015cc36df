"""The Boltzmann estimator: gradients of observables without differentiating through the simulation.

For samples x_i of exp(-U/kT) and an observable g with mean ⟨g⟩,

    ∇θ ⟨g⟩ = -β Cov(g, ∇θ U),

so the gradient of a loss L(⟨g⟩) is that of one weighted sum of energies, Σ_i w_i U(x_i), whose weights are constants.
One backward pass over the frames, in chunks, replaces the energy gradient of every frame.

Source: Raja, Amin, Pedregosa and Krishnapriyan, TMLR 2025, arXiv:2402.13984, eq. 4; reweighting to changed parameters
as in Thaler and Zavadlav, Nat. Commun. 12, 6884 (2021), eq. 3 to 5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stable_plugin.potentials.base import Potential
from stable_plugin.units import BOLTZMANN

Loss = Callable[[Tensor, Tensor], Tensor]
"""A differentiable scalar of the mean observable and its target, both (n_values,)."""


@dataclass(frozen=True)
class Estimate:
    """A loss on an observable's mean and its gradient.

    Attributes:
        loss: The loss at the (reweighted) mean.
        mean: The (reweighted) mean, (n_values,).
        gradients: One tensor per trainable parameter, shaped like it.
        effective_share: Effective sample size over the number of frames, in (0, 1].
    """

    loss: float
    mean: Tensor
    gradients: list[Tensor]
    effective_share: float


def uniform_weights(n_frames: int, like: Tensor) -> Tensor:
    """Statistical weights of an unbiased sample, (n_frames,), summing to one."""
    return torch.full((n_frames,), 1.0 / n_frames, dtype=torch.float64, device=like.device)


def reweighting(energies: Tensor, sampled_energies: Tensor, temperature_K: float) -> Tensor:
    """Statistical weights ω_i ∝ exp(-β (U_θ(x_i) - U_θ0(x_i))), (n_frames,), summing to one.

    Args:
        energies: Under the present parameters, (n_frames,) in eV.
        sampled_energies: Under those that the frames were sampled with, (n_frames,) in eV.
        temperature_K: Temperature of the sample in K.
    """
    exponent = (sampled_energies.double() - energies.double()) / (BOLTZMANN * temperature_K)
    return torch.softmax(exponent, dim=0)


def effective_share(weights: Tensor) -> float:
    """Kish's effective sample size 1/Σω² over the number of frames."""
    return (1.0 / (weights.square().sum() * len(weights))).item()


def surrogate_weights(values: Tensor, upstream: Tensor, weights: Tensor, temperature_K: float) -> Tensor:
    """The w_i for which ∇θ L = ∇θ Σ_i w_i U(x_i).

    w_i = -β ω_i v·(g_i - ⟨g⟩) / (1 - Σω²); with equal weights this is the unbiased -β v·(g_i - ⟨g⟩) / (n - 1).

    Args:
        values: Observable of each frame, (n_frames, n_values).
        upstream: v = ∂L/∂⟨g⟩, (n_values,).
        weights: Statistical weights, (n_frames,), summing to one.
        temperature_K: Temperature of the sample in K.

    Returns:
        (n_frames,) in 1/eV times the units of the loss.
    """
    projected = values.double() @ upstream.double()
    centred = projected - (weights * projected).sum()
    # All weight on one frame: its deviation is zero, and so is the gradient; not zero over zero.
    unbiasing = (1.0 - weights.square().sum()).clamp_min(torch.finfo(weights.dtype).eps)
    return -weights * centred / (unbiasing * BOLTZMANN * temperature_K)


def mean_squared_error(mean: Tensor, target: Tensor) -> Tensor:
    """Mean over the values of (mean - target)²."""
    return (mean - target).square().mean()


class BoltzmannEstimator:
    """Estimates loss and gradient from frames of a simulation.

    Args:
        potential: Whose parameters the gradient is for.
        temperature_K: Temperature of the simulation in K.
        chunk: Frames per model call; bounds the memory.
    """

    def __init__(self, potential: Potential, temperature_K: float, chunk: int = 32) -> None:
        self.potential = potential
        self.temperature_K = temperature_K
        self.chunk = chunk

    @torch.no_grad()
    def energies(self, positions: Tensor) -> Tensor:
        """Energies under the present parameters, (n_frames,) in eV, float64.

        Args:
            positions: (n_frames, n_atoms, 3) in Å.
        """
        with self.potential.frozen():
            return torch.cat([self._chunk_energies(part) for part in positions.split(self.chunk)])

    def estimate(
        self,
        positions: Tensor,
        values: Sequence[Tensor],
        targets: Sequence[Tensor],
        loss: Loss = mean_squared_error,
        weights: Tensor | None = None,
    ) -> Estimate:
        """Loss and gradient of one or several observables; their losses are added.

        Args:
            positions: (n_frames, n_atoms, 3) in Å.
            values: Per observable, its value in each frame, (n_frames, n_values).
            targets: Per observable, (n_values,).
            loss: Of a mean and its target.
            weights: Statistical weights of the frames, (n_frames,); equal if not given.

        Raises:
            ValueError: If there are fewer than two frames.
        """
        if len(positions) < 2:
            raise ValueError(
                f"the estimator got {len(positions)} frame(s): a covariance needs two. Record more frames or replicas."
            )
        weights = uniform_weights(len(positions), positions) if weights is None else weights
        total, surrogate, means = 0.0, torch.zeros_like(weights), []
        for value, target in zip(values, targets, strict=True):
            mean = (weights[:, None] * value.double()).sum(dim=0).requires_grad_(True)
            with torch.enable_grad():
                part = loss(mean, target.to(mean))
            (upstream,) = torch.autograd.grad(part, mean)
            surrogate = surrogate + surrogate_weights(value, upstream, weights, self.temperature_K)
            total += part.item()
            means.append(mean.detach())
        return Estimate(
            loss=total,
            mean=torch.cat(means),
            gradients=self._backward(positions, surrogate),
            effective_share=effective_share(weights),
        )

    def _backward(self, positions: Tensor, surrogate: Tensor) -> list[Tensor]:
        """∇θ Σ_i w_i U(x_i), one chunk of frames at a time."""
        parameters = self.potential.trainable_parameters()
        gradients = [torch.zeros_like(parameter) for parameter in parameters]
        for part, weight in zip(positions.split(self.chunk), surrogate.split(self.chunk), strict=True):
            with torch.enable_grad(), self.potential.evaluating():
                weighted = (weight * self._chunk_energies(part)).sum()
            for gradient, new in zip(
                gradients, torch.autograd.grad(weighted, parameters, allow_unused=True), strict=True
            ):
                if new is not None:
                    gradient += new
        return gradients

    def _chunk_energies(self, positions: Tensor) -> Tensor:
        return self.potential.atomic_energies(positions, self.potential.edges(positions)).double().sum(dim=1)
