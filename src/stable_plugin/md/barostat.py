"""Constant pressure: Monte Carlo moves of the volume between the steps of an integrator."""

from __future__ import annotations

from math import log
from typing import Literal, get_args

import torch
from ase import units
from torch import Tensor

from stable_plugin.md.centers import MolecularCenters
from stable_plugin.md.state import State
from stable_plugin.md.system import System
from stable_plugin.runtime import checks
from stable_plugin.runtime.representation import ReprMixin

SMALLEST_MOVE, LARGEST_MOVE = 3e-4, 0.1
"""Range of the largest changes of ln V. One is drawn for each move, evenly in its logarithm: the volume of a small liquid
fluctuates by some percent, that of a large crystal by less than a thousandth."""


Coupling = Literal["isotropic", "anisotropic"]
"""What a move changes: all cell vectors by one factor, or the length of one of them."""


class MonteCarloBarostat(ReprMixin):
    r"""Barostat for use with any integrator that keeps the temperature.

    After every ``every_fs``, each replica attempts to change its volume from V to V', with its molecules moved as a whole,
    and does so with the probability

    .. math:: \min\left\{1, \left(\frac{V'}{V}\right)^{N+1} e^{-[U' - U + P (V' - V)] / k_B T} \right\}

    N is the number of molecules; an atom without bonds, or of a framework, counts as one. Energies are enough: no stress
    is needed, so every potential can be simulated at constant pressure. Volumes are distributed as in the
    isothermal-isobaric ensemble; how they follow each other in time has no physical meaning.

    Source: Chow and Ferguson, Comput. Phys. Commun. 91, 283 (1995); Frenkel and Smit, Understanding Molecular Simulation,
    2nd edition (2002), section 5.4.2, for moves of ln V.

    Args:
        pressure_GPa: Pressure in GPa; 1 bar by default.
        every_fs: Time between two attempts in fs, rounded to blocks of steps. An attempt costs about as much as two steps.
        coupling: ``isotropic`` keeps the shape of the cell. ``anisotropic`` changes the length of one cell vector, drawn for
            each attempt, and keeps the angles: for solids. Nothing holds the shape of a liquid's cell.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> from stable_plugin import Langevin, MonteCarloBarostat
        >>> Langevin(300.0, barostat=MonteCarloBarostat(pressure_GPa=0.1))
        Langevin(temperature_K=300.0, timestep_fs=0.5, friction_per_ps=1.0, barostat=MonteCarloBarostat(pressure_GPa=0.1, every_fs=25.0, coupling='isotropic'))
    """

    def __init__(self, pressure_GPa: float = 1e-4, every_fs: float = 25.0, coupling: Coupling = "isotropic") -> None:
        self.pressure_GPa = checks.number("pressure_GPa", pressure_GPa)
        self.every_fs = checks.number("every_fs", every_fs, above=0)
        if coupling not in get_args(Coupling):
            raise ValueError(f"coupling={coupling!r} is not a coupling: pass one of {', '.join(get_args(Coupling))}.")
        self.coupling = coupling

    def check(self, system: System) -> None:
        """Raise an error for a system whose volume cannot change.

        Args:
            system: System to be simulated.

        Raises:
            ValueError: If the system is not periodic in all directions, or atoms are held in place.
        """
        if not all(system.pbc):
            raise ValueError(
                f"barostat={self!r} needs a volume, but pbc={list(system.pbc)}: use structures that are periodic in all "
                "directions, or leave the barostat out."
            )
        if system.n_moving < system.n_atoms:
            raise ValueError(
                f"barostat={self!r} moves all atoms with the cell, but the structures have FixAtoms: remove the constraint with "
                "atoms.set_constraint(), or leave the barostat out."
            )


class VolumeMoves:
    """The moves of a barostat in one system.

    Args:
        barostat: The barostat.
        system: System that is simulated. Its molecules must be shorter than half the smallest height of the cell.
        kT: Thermal energy in eV.
        block_fs: Time of a block of steps in fs.

    Attributes:
        every_blocks: Blocks of steps between two attempts.

    Raises:
        ValueError: If the volume of the system cannot change.
    """

    def __init__(self, barostat: MonteCarloBarostat, system: System, kT: float, block_fs: float) -> None:
        barostat.check(system)
        self.every_blocks = max(round(barostat.every_fs / block_fs), 1)
        self._system = system
        self._centers = MolecularCenters(system)
        self._pressure = barostat.pressure_GPa * units.GPa
        self._isotropic = barostat.coupling == "isotropic"
        self._kT = kT

    def propose(self, state: State, moving: Tensor, generator: torch.Generator) -> tuple[State, Tensor]:
        """Return a state with other cells and positions, and what the volume alone contributes to ln(acceptance).

        Energies and forces of the state are those of the old positions still.

        Args:
            state: Present state.
            moving: Replicas to propose a move for, (n_replicas,); the others stay.
            generator: Source of the random numbers.
        """
        size, direction = torch.rand(
            2, state.n_replicas, generator=generator, device=moving.device, dtype=torch.float64
        )
        largest = SMALLEST_MOVE * torch.exp(size * log(LARGEST_MOVE / SMALLEST_MOVE))
        change = torch.where(moving, largest * (2.0 * direction - 1.0), 0.0)  # of ln V
        work = self._pressure * self._system.volume(state.cell) * torch.expm1(change)
        stretch = self._stretch(change, generator).to(state.positions)[:, None]
        centers = self._centers(state.positions, state.cell)
        fractional = centers @ self._system.inverse_of(state.cell)
        moved = state.replace(
            positions=state.positions + (stretch * fractional) @ state.cell,
            cell=state.cell + stretch.transpose(1, 2) * state.cell,
        )
        return moved, (self._centers.number + 1) * change - work / self._kT

    def _stretch(self, change: Tensor, generator: torch.Generator) -> Tensor:
        """Return the relative changes of the lengths of the cell vectors, (n_replicas, 3), for changes of ln V."""
        if self._isotropic:
            return torch.expm1(change / 3.0)[:, None].expand(-1, 3)
        axis = torch.randint(3, change.shape, generator=generator, device=change.device)
        return torch.expm1(change)[:, None] * torch.nn.functional.one_hot(axis, 3)

    def accepts(self, log_volume: Tensor, energy_change: Tensor, generator: torch.Generator) -> Tensor:
        """Return which proposals are accepted, (n_replicas,).

        Args:
            log_volume: Contribution of the volume, from :meth:`propose`, (n_replicas,).
            energy_change: U' - U, (n_replicas,) in eV; a proposal with NaN is rejected.
            generator: Source of the random numbers.
        """
        drawn = torch.rand(len(log_volume), generator=generator, device=log_volume.device, dtype=torch.float64)
        return drawn.log() < log_volume - energy_change / self._kT
