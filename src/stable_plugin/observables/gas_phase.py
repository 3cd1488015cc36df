"""A molecule in vacuum, whose mean energy follows the parameters of the potential."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isinf, nan
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stable_plugin.detectors.geometry import BondDeviation
from stable_plugin.md.execution import Execution
from stable_plugin.md.integrators import Langevin
from stable_plugin.md.simulator import Simulator
from stable_plugin.md.system import System

if TYPE_CHECKING:
    from stable_plugin.models.base import Potential

log = logging.getLogger(__name__)

CUTOFF_A = 25.0
"""Distance between images of the molecule for a potential that does not tell its cutoff."""

MIN_ESS = 0.5
"""Effective fraction of the frames below which new ones are simulated."""

EQUILIBRATION_PS, SAMPLING_PS, RECORD_EVERY_FS = 0.5, 0.5, 50.0

CHECK_EVERY = 10
"""Steps between two checks for whole molecules."""

FRICTION_PER_PS = 10.0

WHOLE_A = 0.5
"""Most that a bond may be off in a molecule that counts as whole."""


class PureLiquid:
    """The molecules of a liquid of one substance.

    Args:
        system: The liquid.

    Attributes:
        system: The liquid.
        number: Number of molecules.
        atoms: Atoms of the molecules that have their atoms in the order of the first, (n_molecules, n_atoms).

    Raises:
        ValueError: If the molecules differ, or there are others than neutral molecules of two atoms or more.
    """

    def __init__(self, system: System) -> None:
        self.system = system
        parts = system.parts
        kinds = Counter(_formula(system, part.atoms) if part.kind == "molecule" else part.kind for part in parts)
        if len(kinds) > 1 or any(part.kind != "molecule" for part in parts):
            found = ", ".join(f"{number} {kind}" for kind, number in kinds.items())
            raise ValueError(
                f"a heat of vaporization needs a liquid of one kind of molecules, but the system has {found}: leave "
                "HeatOfVaporization out."
            )
        if system.charge:
            raise ValueError(
                f"a heat of vaporization needs neutral molecules, but the system has charge={system.charge}: leave "
                "HeatOfVaporization out."
            )
        self.number = len(parts)
        first = system.numbers[list(parts[0].atoms)]
        alike = [part.atoms for part in parts if bool((system.numbers[list(part.atoms)] == first).all())]
        self.atoms = torch.tensor(alike, device=system.numbers.device)

    def separate(self, positions: Tensor, cell: Tensor | None) -> Tensor:
        """Return molecules of all frames as single, whole ones around the origin.

        Args:
            positions: (n_frames, n_atoms, 3) in Å.
            cell: Cells of the frames, (n_frames, 3, 3) in Å; that of the system if None.

        Returns:
            (n_frames * n_molecules, n_atoms_of_molecule, 3) in Å.
        """
        pairs = torch.stack([self.atoms, self.atoms[:, :1].expand_as(self.atoms)], dim=-1).reshape(-1, 2)
        from_first = self.system.separations(positions, pairs, cell)
        return from_first.reshape(-1, self.atoms.shape[1], 3)

    def molecule(self, side: float) -> System:
        """Return one molecule in a cubic cell, which also serves models of periodic systems only.

        Args:
            side: Edge of the cell in Å.
        """
        atoms = self.atoms[0]
        place = torch.full_like(self.system.numbers, -1)
        place[atoms] = torch.arange(len(atoms), device=atoms.device)
        bonds = place[self.system.bonds]
        return replace(
            self.system,
            numbers=self.system.numbers[atoms],
            masses=self.system.masses[atoms],
            bonds=bonds[(bonds >= 0).all(dim=1)],
            framework=self.system.framework[atoms],
            symbols=tuple(self.system.symbols[atom] for atom in atoms.tolist()),
            cell=side * torch.eye(3).to(self.system.cell),
            fixed=None,
            cells=None,
        )


@dataclass(frozen=True)
class _Sample:
    """Molecules as simulated.

    Attributes:
        frames: (n_replicas * n_frames, n_atoms, 3) in Å, replica by replica.
        energies: Their energies under the parameters that they were simulated with, in eV.
        n_replicas: Number of replicas.
    """

    frames: Tensor
    energies: Tensor
    n_replicas: int


class GasPhase:
    """Simulates a molecule in vacuum, and follows its mean energy while the parameters change.

    Args:
        potential: Potential of the liquid.
        liquid: The liquid.
        starts: Molecules to start from, (n_replicas, n_atoms, 3) in Å.
        temperature_K: Temperature in K.
        timestep_fs: Timestep in fs.
        seed: Seed of the random numbers.

    Attributes:
        potential: The potential, of one molecule.
    """

    def __init__(
        self,
        potential: Potential,
        liquid: PureLiquid,
        starts: Tensor,
        temperature_K: float,
        timestep_fs: float,
        seed: int,
    ) -> None:
        extent = 2.0 * float(starts.norm(dim=-1).max())
        cutoff = CUTOFF_A if isinf(potential.cutoff) else potential.cutoff
        self.potential = potential.of_system(liquid.molecule(2.0 * (extent + cutoff)))
        self._starts = starts.to(self.potential.device, self.potential.dtype)
        self._integrator = Langevin(temperature_K, timestep_fs=timestep_fs, friction_per_ps=FRICTION_PER_PS)
        self._generator = torch.Generator(self.potential.device).manual_seed(seed)
        self._sample: _Sample | None = None

    def mean_energy(self) -> Tensor:
        r"""Return the mean energy of the molecule under the present parameters, () in eV, float64.

        It is differentiable in the parameters: the frames are weighted by
        :math:`\exp(-\beta (U_\theta - U_{\theta_0}))`, whose derivative is the covariance of the Boltzmann estimator.
        New frames are simulated where these weights leave less than half of the effective sample size.
        """
        if self._sample is None:
            self._sample = self._simulate()
        energies, weights = self._weighted(self._sample)
        if float(weights.detach().square().sum()) * len(weights) * MIN_ESS > 1.0:
            self._sample = self._simulate()
            energies, weights = self._weighted(self._sample)
        return (weights * energies).sum()

    def standard_error(self) -> float:
        """Return the standard error of :meth:`mean_energy` when the frames were simulated, in eV, from the replicas' means."""
        if self._sample is None:
            return nan
        means = self._sample.energies.reshape(self._sample.n_replicas, -1).mean(dim=1)
        return float(means.std() / len(means) ** 0.5)

    def _weighted(self, sample: _Sample) -> tuple[Tensor, Tensor]:
        energies = self._energies(sample.frames)
        return energies, torch.softmax(-(energies - sample.energies) / self._integrator.kT, dim=0)

    def _energies(self, frames: Tensor) -> Tensor:
        return self.potential.energies(frames, self.potential.edges(frames)).double()

    @torch.no_grad()
    def _simulate(self) -> _Sample:
        check_every_fs = CHECK_EVERY * self._integrator.timestep_fs
        every = max(1, round(RECORD_EVERY_FS / check_every_fs))
        n_first, n_recorded = (
            max(1, round(1000.0 * ps / (every * check_every_fs))) for ps in (EQUILIBRATION_PS, SAMPLING_PS)
        )
        detector = BondDeviation(WHOLE_A)
        detector.bind(self.potential.system, self._starts)
        # Too little work for the time that compiling takes.
        execution = Execution(compile=False, capture=False)
        simulator = Simulator(
            self.potential, self._integrator, detector, check_every_fs=check_every_fs, execution=execution
        )
        start = simulator.prepare(self._starts, self._generator)
        n_steps = (n_first + n_recorded) * every * CHECK_EVERY
        window = simulator.run(start, n_steps, every * CHECK_EVERY, self._generator, stop_unstable=True)
        whole = ~window.unstable
        if int(whole.sum()) < 2:
            log.warning(
                "%d of %d molecules dissociate in the gas phase: their mean energy is taken over the molecules of the "
                "reference.",
                int((~whole).sum()),
                len(whole),
            )
            frames, n_replicas = self._starts, len(self._starts)
        else:
            frames, n_replicas = window.positions[n_first:, whole].transpose(0, 1).flatten(0, 1), int(whole.sum())
            # Failed ones start again from the reference.
            self._starts = torch.where(whole[:, None, None], window.end.positions, self._starts)
        with self.potential.frozen():
            return _Sample(frames, self._energies(frames), n_replicas)


def _formula(system: System, atoms: Sequence[int]) -> str:
    count = Counter(system.symbols[atom] for atom in atoms)
    return "".join(f"{symbol}{number if number > 1 else ''}" for symbol, number in sorted(count.items()))
