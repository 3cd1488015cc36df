"""Integrators as short pure steps, named by their place in the splitting."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from math import exp, sqrt

import torch
from torch import Tensor

from stable_plugin.md.state import State, kinetic_energy, maxwell_boltzmann
from stable_plugin.runtime import checks
from stable_plugin.units import BOLTZMANN, FS, PS

ForceFunction = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Positions (n_replicas, n_atoms, 3) to energies (n_replicas,) and forces (n_replicas, n_atoms, 3)."""

# Fourth-order Suzuki-Yoshida weights (Yoshida, Phys. Lett. A 150, 262, 1990).
_YOSHIDA = (1 / (2 - 2 ** (1 / 3)), 1 - 2 / (2 - 2 ** (1 / 3)), 1 / (2 - 2 ** (1 / 3)))


def kick(velocities: Tensor, forces: Tensor, masses: Tensor, time: float) -> Tensor:
    """Velocities after ``time`` under constant forces: v + F t / m."""
    return velocities + time * forces / masses[:, None]


def drift(positions: Tensor, velocities: Tensor, time: float) -> Tensor:
    """Positions after ``time`` at constant velocities: x + v t."""
    return positions + time * velocities


def friction(velocities: Tensor, noise: Tensor, masses: Tensor, decay: float, kT: float) -> Tensor:
    """Exact Ornstein-Uhlenbeck step: c v + sqrt((1 - c²) kT / m) ξ, with c = exp(-γ t) the ``decay``."""
    return decay * velocities + (sqrt(1.0 - decay * decay) * sqrt(kT)) * noise / masses.sqrt()[:, None]


class Integrator(ABC):
    """Advances all replicas by one timestep.

    Args:
        temperature_K: Temperature in K.
        timestep_fs: Timestep in fs.
    """

    chain_length = 0

    def __init__(self, temperature_K: float, timestep_fs: float) -> None:
        self.temperature_K = checks.number("temperature_K", temperature_K, above=0, at_most=20000)
        self.timestep_fs = checks.number(
            "timestep_fs", timestep_fs, above=0, at_most=10, hint="0.5 fs is usual with hydrogen, 1 fs at 300 K."
        )
        self.timestep = timestep_fs * FS
        self.kT = BOLTZMANN * temperature_K

    def degrees_of_freedom(self, n_atoms: int) -> int:
        """Momenta that carry the kinetic temperature."""
        return 3 * n_atoms

    def initial_velocities(self, shape: Sequence[int], masses: Tensor, generator: torch.Generator) -> Tensor:
        """Thermal velocities to start from, ``shape`` = (n_replicas, n_atoms, 3) in Å per ASE time."""
        return maxwell_boltzmann(shape, masses, self.temperature_K, generator)

    @abstractmethod
    def step(self, state: State, masses: Tensor, force: ForceFunction, generator: torch.Generator) -> State:
        """The state one timestep later.

        Args:
            state: Where the replicas are.
            masses: (n_atoms,) in u.
            force: Energies and forces of the new positions.
            generator: Source of random numbers.
        """

    def initial_chain(self, positions: Tensor) -> Tensor:
        """Thermostat variables at rest, (n_replicas, 2, chain_length)."""
        return positions.new_zeros(len(positions), 2, self.chain_length)


class Langevin(Integrator):
    """Langevin dynamics by the BAOAB splitting.

    Configurations are sampled to fourth order in the timestep for a harmonic potential's marginal: its position
    variance is exact at any stable timestep.

    Source: Leimkuhler and Matthews, Appl. Math. Res. Express 2013, 34 (2013), eq. 12.

    Args:
        temperature_K: Temperature in K.
        timestep_fs: Timestep in fs.
        friction_per_ps: Friction γ in 1/ps.
    """

    def __init__(self, temperature_K: float = 300.0, timestep_fs: float = 0.5, friction_per_ps: float = 1.0) -> None:
        super().__init__(temperature_K, timestep_fs)
        self.friction_per_ps = checks.number("friction_per_ps", friction_per_ps, at_least=0)
        self.decay = exp(-friction_per_ps * self.timestep / PS)

    def step(self, state: State, masses: Tensor, force: ForceFunction, generator: torch.Generator) -> State:
        half = 0.5 * self.timestep
        noise = torch.randn(
            state.velocities.shape, generator=generator, device=masses.device, dtype=state.velocities.dtype
        )
        velocities = kick(state.velocities, state.forces, masses, half)
        positions = drift(state.positions, velocities, half)
        velocities = friction(velocities, noise, masses, self.decay, self.kT)
        positions = drift(positions, velocities, half)
        energies, forces = force(positions)
        velocities = kick(velocities, forces, masses, half)
        return State(positions, velocities, forces, energies, state.chain)


class NoseHooverChain(Integrator):
    """Deterministic thermostat: velocity Verlet between two half steps of a Nosé-Hoover chain per replica.

    The momentum of the centre of mass is zero and the axis of the angular momentum stays as drawn, so the rotation of an
    isolated molecule is sampled poorly; internal coordinates are what it is for.

    Source: Martyna, Tuckerman, Tobias and Klein, Mol. Phys. 87, 1117 (1996), with Suzuki-Yoshida weights.

    Args:
        temperature_K: Temperature in K.
        timestep_fs: Timestep in fs.
        relaxation_fs: Period of the thermostat in fs; 40 timesteps if not given.
        chain_length: Number of thermostats in the chain.
    """

    def __init__(
        self,
        temperature_K: float = 300.0,
        timestep_fs: float = 0.5,
        relaxation_fs: float | None = None,
        chain_length: int = 3,
    ) -> None:
        super().__init__(temperature_K, timestep_fs)
        self.relaxation_fs = checks.number(
            "relaxation_fs",
            40 * timestep_fs if relaxation_fs is None else relaxation_fs,
            at_least=5 * timestep_fs,
            hint="A thermostat faster than a few timesteps is not integrated.",
        )
        self.chain_length = checks.count("chain_length", chain_length, at_most=100)

    def degrees_of_freedom(self, n_atoms: int) -> int:
        """Without the centre of mass: without external forces its momentum is never thermalised, and is kept zero."""
        return 3 * n_atoms - 3

    def initial_velocities(self, shape: Sequence[int], masses: Tensor, generator: torch.Generator) -> Tensor:
        velocities = super().initial_velocities(shape, masses, generator)
        momentum = (masses[:, None] * velocities).sum(dim=1, keepdim=True)
        return velocities - momentum / masses.sum()

    def thermostat_masses(self, n_atoms: int) -> list[float]:
        """Q_1 = N_f kT τ², Q_k = kT τ², in eV times ASE time squared."""
        tau = self.relaxation_fs * FS / (2.0 * torch.pi)
        masses = [self.kT * tau * tau] * self.chain_length
        masses[0] *= self.degrees_of_freedom(n_atoms)
        return masses

    def step(self, state: State, masses: Tensor, force: ForceFunction, generator: torch.Generator) -> State:
        half = 0.5 * self.timestep
        chain, velocities = self._half_chain(state.chain, state.velocities, masses)
        velocities = kick(velocities, state.forces, masses, half)
        positions = drift(state.positions, velocities, self.timestep)
        energies, forces = force(positions)
        velocities = kick(velocities, forces, masses, half)
        chain, velocities = self._half_chain(chain, velocities, masses)
        return State(positions, velocities, forces, energies, chain)

    def conserved_energy(self, state: State, masses: Tensor) -> Tensor:
        """The extended energy U + K + Σ ½ Q v² + N_f kT ξ_1 + kT Σ ξ_k, (n_replicas,) in eV."""
        place, speed = state.chain.unbind(1)
        inertia = state.chain.new_tensor(self.thermostat_masses(len(masses)))
        weight = torch.ones_like(inertia)
        weight[0] = self.degrees_of_freedom(len(masses))
        bath = 0.5 * (inertia * speed.square()).sum(1) + self.kT * (weight * place).sum(1)
        return state.energies + kinetic_energy(state.velocities, masses) + bath

    def _half_chain(self, chain: Tensor, velocities: Tensor, masses: Tensor) -> tuple[Tensor, Tensor]:
        n_free = self.degrees_of_freedom(len(masses))
        inertia = self.thermostat_masses(len(masses))
        place, speed = (list(part.unbind(1)) for part in chain.unbind(1))
        twice_kinetic = 2.0 * kinetic_energy(velocities, masses)
        scale = torch.ones_like(twice_kinetic)
        last = self.chain_length - 1

        def push(k: int) -> Tensor:
            if k == 0:
                return (scale * scale * twice_kinetic - n_free * self.kT) / inertia[0]
            return (inertia[k - 1] * speed[k - 1].square() - self.kT) / inertia[k]

        for weight in _YOSHIDA:
            time = 0.5 * self.timestep * weight
            for k in range(last, -1, -1):
                drag = torch.exp(-0.25 * time * speed[k + 1]) if k < last else 1.0
                speed[k] = (speed[k] * drag + 0.5 * time * push(k)) * drag
            scale = scale * torch.exp(-time * speed[0])
            place = [p + time * s for p, s in zip(place, speed, strict=True)]
            for k in range(self.chain_length):
                drag = torch.exp(-0.25 * time * speed[k + 1]) if k < last else 1.0
                speed[k] = (speed[k] * drag + 0.5 * time * push(k)) * drag
        chain = torch.stack([torch.stack(place, dim=1), torch.stack(speed, dim=1)], dim=1)
        return chain, velocities * scale[:, None, None]
