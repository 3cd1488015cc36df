"""Langevin dynamics."""

from __future__ import annotations

from math import exp, sqrt

import torch
from torch import Tensor

from stable_plugin.md.barostat import MonteCarloBarostat
from stable_plugin.md.integrators.base import ForceFunction, Integrator, drift, kick
from stable_plugin.md.state import State
from stable_plugin.runtime import checks
from stable_plugin.units import PS


def ornstein_uhlenbeck(velocities: Tensor, noise: Tensor, masses: Tensor, decay: float, kT: float) -> Tensor:
    """Return the velocities after friction and noise, c v + sqrt((1 - c²) kT / m) ξ (O in the splitting).

    Args:
        velocities: v, (n_replicas, n_atoms, 3) in Å per ASE time.
        noise: ξ, standard normal, of the same shape.
        masses: m, (n_atoms,) in u.
        decay: c = exp(-γ t).
        kT: Thermal energy in eV.
    """
    return decay * velocities + (sqrt(1.0 - decay * decay) * sqrt(kT)) * noise / masses.sqrt()[:, None]


class Langevin(Integrator):
    r"""Langevin dynamics by the BAOAB splitting.

    The stochastic differential equation

    .. math::

        dx = v\,dt, \qquad dv = \frac{F(x)}{m}\,dt - \gamma v\,dt + \sqrt{\frac{2\gamma k_B T}{m}}\,dW

    is split into B (:func:`~stable_plugin.md.integrators.kick`), A (:func:`~stable_plugin.md.integrators.drift`) and O
    (:func:`ornstein_uhlenbeck`), each of which is solved exactly. One step is B(dt/2) A(dt/2) O(dt) A(dt/2) B(dt/2),
    with one call of the model.

    The position variance of a harmonic oscillator ω is exact at any stable timestep; the relative error of its velocity
    variance is -(ω dt)²/4.

    =====================  =========================================
    Symbol                 Variable
    =====================  =========================================
    x                      ``positions``
    v                      ``velocities``
    F                      ``forces``
    m                      ``masses``
    dt                     ``timestep`` (ASE time), ``timestep_fs``
    γ                      ``friction_per_ps``
    c = exp(-γ dt)         ``decay``
    k_B T                  ``kT`` (eV)
    ξ                      ``noise``
    =====================  =========================================

    Source: Leimkuhler and Matthews, Appl. Math. Res. Express 2013, 34 (2013), eq. 12.

    Args:
        temperature_K: Temperature in K.
        timestep_fs: Timestep in fs.
        friction_per_ps: Friction γ in 1/ps.
        barostat: What changes the volume between the steps; constant volume if None.
    """

    holds_fixed_atoms = True

    def __init__(
        self,
        temperature_K: float = 300.0,
        timestep_fs: float = 0.5,
        friction_per_ps: float = 1.0,
        barostat: MonteCarloBarostat | None = None,
    ) -> None:
        super().__init__(temperature_K, timestep_fs, barostat)
        self.friction_per_ps = checks.number("friction_per_ps", friction_per_ps, at_least=0)
        self.decay = exp(-friction_per_ps * self.timestep / PS)

    @property
    def is_stochastic(self) -> bool:
        """Whether there is friction, and so noise."""
        return self.decay < 1.0

    def step(self, state: State, masses: Tensor, force: ForceFunction, generator: torch.Generator) -> State:
        half = 0.5 * self.timestep
        noise = torch.randn(
            state.velocities.shape, generator=generator, device=masses.device, dtype=state.velocities.dtype
        )
        velocities = kick(state.velocities, state.forces, masses, half)
        positions = drift(state.positions, velocities, half)
        velocities = ornstein_uhlenbeck(velocities, noise, masses, self.decay, self.kT)
        positions = drift(positions, velocities, half)
        energies, forces = force(positions)
        velocities = kick(velocities, forces, masses, half)
        return state.replace(positions=positions, velocities=velocities, forces=forces, energies=energies)
