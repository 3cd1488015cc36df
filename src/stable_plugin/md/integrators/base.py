"""What all integrators share: the interface, and the parts that their steps are split into."""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from stable_plugin.md.barostat import MonteCarloBarostat
from stable_plugin.md.state import State, maxwell_boltzmann
from stable_plugin.runtime import checks
from stable_plugin.runtime.representation import ReprMixin
from stable_plugin.units import BOLTZMANN, FS

ForceFunction = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps positions (n_replicas, n_atoms, 3) to energies (n_replicas,) and forces (n_replicas, n_atoms, 3)."""


def kick(velocities: Tensor, forces: Tensor, masses: Tensor, time: float) -> Tensor:
    """Return the velocities after ``time`` under constant forces, v + F t / m (B in the splitting)."""
    return velocities + time * forces / masses[:, None]


def drift(positions: Tensor, velocities: Tensor, time: float) -> Tensor:
    """Return the positions after ``time`` at constant velocities, x + v t (A in the splitting)."""
    return positions + time * velocities


class Integrator(ReprMixin, ABC):
    """Advances all replicas by one timestep.

    A subclass defines :meth:`step`, which returns ``state.replace(...)`` with the tensors that it has changed.

    Args:
        temperature_K: Temperature in K.
        timestep_fs: Timestep in fs.
        barostat: What changes the volume between the steps; constant volume if None.

    Attributes:
        timestep: Timestep in ASE time.
        kT: Thermal energy in eV.
        chain_length: Number of thermostat variables per replica.
        n_fixed: Number of atoms that are held in place.
    """

    chain_length = 0
    n_fixed = 0
    holds_fixed_atoms = False
    """Whether atoms of infinite mass stay exactly in place."""

    def __init__(self, temperature_K: float, timestep_fs: float, barostat: MonteCarloBarostat | None = None) -> None:
        self.temperature_K = checks.number("temperature_K", temperature_K, above=0, at_most=20000)
        self.timestep_fs = checks.number(
            "timestep_fs", timestep_fs, above=0, at_most=10, hint="0.5 fs is usual with hydrogen, 1 fs at 300 K."
        )
        self.timestep = timestep_fs * FS
        self.kT = BOLTZMANN * temperature_K
        if not isinstance(barostat, MonteCarloBarostat | None):
            raise ValueError(
                f"barostat={barostat!r} is not a barostat: pass MonteCarloBarostat(pressure_GPa), or None."
            )
        self.barostat = barostat

    @property
    def is_stochastic(self) -> bool:
        """Whether each step draws noise, so that copies of a replica part."""
        return False

    def holding(self, n_fixed: int) -> Self:
        """Return the integrator for a system with fixed atoms, a copy if there are any.

        Args:
            n_fixed: Number of atoms that are held in place.

        Raises:
            ValueError: If there are fixed atoms, and this integrator moves them.
        """
        if n_fixed == 0:
            return self
        if not self.holds_fixed_atoms:
            raise ValueError(
                f"integrator={self!r} does not hold atoms in place, but the structures have FixAtoms: use Langevin or "
                "NoseHooverChain, or remove the constraint with atoms.set_constraint()."
            )
        held = copy.copy(self)
        held.n_fixed = n_fixed
        return held

    def changed(self, **arguments: Any) -> Self:
        """Return an integrator with other arguments, for instance ``temperature_K=``, and the rest as in this one.

        Args:
            arguments: Arguments of the class.
        """
        positional, named = self._init_arguments
        own = inspect.signature(type(self)).bind(*positional, **named).arguments
        return type(self)(**(own | arguments)).holding(self.n_fixed)

    def degrees_of_freedom(self, n_atoms: int) -> int:
        """Return the number of momenta that carry the kinetic temperature, three for each atom that moves.

        Args:
            n_atoms: Number of atoms, fixed ones included.
        """
        return 3 * (n_atoms - self.n_fixed)

    def initial_velocities(self, shape: Sequence[int], masses: Tensor, generator: torch.Generator) -> Tensor:
        """Draw thermal velocities in Å per ASE time.

        Args:
            shape: (n_replicas, n_atoms, 3).
            masses: (n_atoms,) in u.
            generator: Source of the random numbers.

        Returns:
            (n_replicas, n_atoms, 3) in Å per ASE time.
        """
        return maxwell_boltzmann(shape, masses, self.temperature_K, generator)

    def initial_chain(self, positions: Tensor) -> Tensor:
        """Return thermostat variables at rest, (n_replicas, 2, chain_length)."""
        return positions.new_zeros(len(positions), 2, self.chain_length)

    @abstractmethod
    def step(self, state: State, masses: Tensor, force: ForceFunction, generator: torch.Generator) -> State:
        """Return the state one timestep later.

        Args:
            state: Present state, with the forces of its positions.
            masses: (n_atoms,) in u; infinite for atoms that are held in place.
            force: Computes energies and forces of the new positions.
            generator: Source of the random numbers.
        """
