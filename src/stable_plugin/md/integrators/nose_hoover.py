"""The deterministic Nosé-Hoover chain thermostat."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stable_plugin.md.barostat import MonteCarloBarostat
from stable_plugin.md.integrators.base import ForceFunction, Integrator, drift, kick
from stable_plugin.md.state import State, kinetic_energy
from stable_plugin.runtime import checks
from stable_plugin.units import FS

# Fourth-order Suzuki-Yoshida weights (Yoshida, Phys. Lett. A 150, 262, 1990).
_YOSHIDA = (1 / (2 - 2 ** (1 / 3)), 1 - 2 / (2 - 2 ** (1 / 3)), 1 / (2 - 2 ** (1 / 3)))


class NoseHooverChain(Integrator):
    r"""Nosé-Hoover chain: velocity Verlet between two half steps of a chain of M thermostats per replica.

    The equations of motion

    .. math::

        \dot x = v, \qquad \dot v = \frac{F(x)}{m} - v_{\xi_1} v, \qquad \dot\xi_k = v_{\xi_k}, \qquad
        \dot v_{\xi_k} = \frac{G_k}{Q_k} - v_{\xi_{k+1}} v_{\xi_k}

    with :math:`v_{\xi_{M+1}} = 0`, :math:`G_1 = \sum m v^2 - N_f k_B T` and
    :math:`G_k = Q_{k-1} v_{\xi_{k-1}}^2 - k_B T` are split into: chain(dt/2), B(dt/2) A(dt) B(dt/2), chain(dt/2).
    The chain itself is integrated in three Suzuki-Yoshida steps, to fourth order. :meth:`conserved_energy` is constant
    up to the error of the timestep.

    The momentum of the center of mass is zero and the angular momentum keeps its direction, so the rotation of an
    isolated molecule is sampled poorly. Use :class:`Langevin` where that matters. Atoms that are held in place exert external
    forces: the momentum of the others is not conserved, and is thermalized as all other degrees of freedom.

    =====================  ==================================================
    Symbol                 Variable
    =====================  ==================================================
    x, v, F, m             ``positions``, ``velocities``, ``forces``, ``masses``
    ξ, v_ξ                 ``state.chain[:, 0]``, ``state.chain[:, 1]``
    Q                      :meth:`thermostat_masses`
    N_f                    :meth:`degrees_of_freedom`
    M                      ``chain_length``
    τ                      ``relaxation_fs`` / 2π
    dt                     ``timestep`` (ASE time), ``timestep_fs``
    k_B T                  ``kT`` (eV)
    =====================  ==================================================

    Source: Martyna, Tuckerman, Tobias and Klein, Mol. Phys. 87, 1117 (1996), eq. 29 to 35.

    Args:
        temperature_K: Temperature in K.
        timestep_fs: Timestep in fs.
        relaxation_fs: Period of the thermostat in fs; 40 timesteps by default.
        chain_length: Number of thermostats in the chain.
        barostat: What changes the volume between the steps; constant volume if None.
    """

    holds_fixed_atoms = True

    def __init__(
        self,
        temperature_K: float = 300.0,
        timestep_fs: float = 0.5,
        relaxation_fs: float | None = None,
        chain_length: int = 3,
        barostat: MonteCarloBarostat | None = None,
    ) -> None:
        super().__init__(temperature_K, timestep_fs, barostat)
        self.relaxation_fs = checks.number(
            "relaxation_fs",
            40 * timestep_fs if relaxation_fs is None else relaxation_fs,
            at_least=5 * timestep_fs,
            hint="A thermostat faster than a few timesteps is not integrated.",
        )
        self.chain_length = checks.count("chain_length", chain_length, at_most=100)

    def degrees_of_freedom(self, n_atoms: int) -> int:
        """Return three for each atom that moves, less three without fixed atoms, as the total momentum is then kept zero.

        Args:
            n_atoms: Number of atoms, fixed ones included.
        """
        return super().degrees_of_freedom(n_atoms) - (0 if self.n_fixed else 3)

    def initial_velocities(self, shape: Sequence[int], masses: Tensor, generator: torch.Generator) -> Tensor:
        velocities = super().initial_velocities(shape, masses, generator)
        if self.n_fixed:
            return velocities
        momentum = (masses[:, None] * velocities).sum(dim=1, keepdim=True)
        return velocities - momentum / masses.sum()

    def thermostat_masses(self, n_atoms: int) -> list[float]:
        """Return Q_1 = N_f kT τ² and Q_k = kT τ², in eV times ASE time squared."""
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
        return state.replace(positions=positions, velocities=velocities, forces=forces, energies=energies, chain=chain)

    def conserved_energy(self, state: State, masses: Tensor) -> Tensor:
        """Return the extended energy U + K + Σ ½ Q v_ξ² + N_f kT ξ_1 + kT Σ ξ_k, (n_replicas,) in eV."""
        xi, v_xi = state.chain.unbind(1)
        inertia = state.chain.new_tensor(self.thermostat_masses(len(masses)))
        weight = torch.ones_like(inertia)
        weight[0] = self.degrees_of_freedom(len(masses))
        bath = 0.5 * (inertia * v_xi.square()).sum(1) + self.kT * (weight * xi).sum(1)
        return state.energies + kinetic_energy(state.velocities, masses) + bath

    def _half_chain(self, chain: Tensor, velocities: Tensor, masses: Tensor) -> tuple[Tensor, Tensor]:
        """Return chain and velocities after the thermostats have acted for half a timestep."""
        n_free = self.degrees_of_freedom(len(masses))
        inertia = self.thermostat_masses(len(masses))
        xi, v_xi = (list(part.unbind(1)) for part in chain.unbind(1))
        twice_kinetic = 2.0 * kinetic_energy(velocities, masses)
        # The velocities are scaled once, at the end: until then their kinetic energy is scale² times that at the start.
        scale = torch.ones_like(twice_kinetic)
        last = self.chain_length - 1

        def acceleration(k: int) -> Tensor:
            """Return G_k / Q_k."""
            if k == 0:
                return (scale * scale * twice_kinetic - n_free * self.kT) / inertia[0]
            return (inertia[k - 1] * v_xi[k - 1].square() - self.kT) / inertia[k]

        for weight in _YOSHIDA:
            time = 0.5 * self.timestep * weight
            for k in range(last, -1, -1):
                drag = torch.exp(-0.25 * time * v_xi[k + 1]) if k < last else 1.0
                v_xi[k] = (v_xi[k] * drag + 0.5 * time * acceleration(k)) * drag
            scale = scale * torch.exp(-time * v_xi[0])
            xi = [x + time * v for x, v in zip(xi, v_xi, strict=True)]
            for k in range(self.chain_length):
                drag = torch.exp(-0.25 * time * v_xi[k + 1]) if k < last else 1.0
                v_xi[k] = (v_xi[k] * drag + 0.5 * time * acceleration(k)) * drag
        chain = torch.stack([torch.stack(xi, dim=1), torch.stack(v_xi, dim=1)], dim=1)
        return chain, velocities * scale[:, None, None]
