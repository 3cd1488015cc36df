"""Statistical weights of frames: of an unbiased sample, and after the potential's parameters have changed.

Source: Thaler and Zavadlav, Nat. Commun. 12, 6884 (2021), eq. 3 to 5 (DiffTRe).

=====================================  ==========================================
Equation                               Code
=====================================  ==========================================
reference state θ0, its energies       ``sampled_energies``
U_θ(x_i)                               ``energies``
ω_i ∝ exp(-β (U_θ(x_i) - U_θ0(x_i)))   :func:`reweight`
n_eff = 1 / Σ_i ω_i²                   :func:`ess_fraction` times the sample size
=====================================  ==========================================
"""

from __future__ import annotations

import torch
from torch import Tensor

from stable_plugin.runtime.distributed import DistributedContext
from stable_plugin.units import BOLTZMANN

SINGLE_PROCESS = DistributedContext()


def uniform_weights(n_samples: int, like: Tensor, context: DistributedContext = SINGLE_PROCESS) -> Tensor:
    """Return the statistical weights of an unbiased sample.

    Args:
        n_samples: Number of samples of this process.
        like: Tensor whose device is used.
        context: Processes that share the sample.

    Returns:
        (n_samples,) in float64, summing to one over all processes.
    """
    n_all = context.count(n_samples, like.device)
    return torch.full((n_samples,), 1.0 / max(n_all, 1), dtype=torch.float64, device=like.device)


def reweight(
    energies: Tensor, sampled_energies: Tensor, temperature_K: float, context: DistributedContext = SINGLE_PROCESS
) -> Tensor:
    """Return the statistical weights of samples under changed parameters.

    Args:
        energies: Energies under the present parameters, (n_samples,) in eV.
        sampled_energies: Energies under the parameters of the simulation, (n_samples,) in eV.
        temperature_K: Temperature of the simulation in K.
        context: Processes that share the sample.

    Returns:
        (n_samples,) in float64, summing to one over all processes.
    """
    exponent = (sampled_energies.double() - energies.double()) / (BOLTZMANN * temperature_K)
    # Subtracting the largest exponent keeps exp() from overflowing; -inf stands in for a process without samples.
    largest = context.max(torch.cat([exponent, exponent.new_full((1,), -torch.inf)]).max())
    weights = torch.exp(exponent - largest)
    return weights / context.sum(weights.sum())


def ess_fraction(weights: Tensor, context: DistributedContext = SINGLE_PROCESS) -> float:
    """Return Kish's effective sample size 1/Σω² as a fraction of the number of samples of all processes.

    Samples are counted as independent, which successive frames of a trajectory are not.

    Args:
        weights: Statistical weights, (n_samples,), summing to one over all processes.
        context: Processes that share the sample.
    """
    n_all = context.count(len(weights), weights.device)
    return (1.0 / (context.sum(weights.square().sum()) * n_all)).item()
