"""Static checks of a potential, in seconds, before any simulation at temperature."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from ase import Atoms
from ase.calculators.calculator import Calculator
from torch import Tensor, nn

from stable_plugin.config import StABlEConfig
from stable_plugin.evaluation.preflight.consistency import check_cutoff, check_forces, check_symmetry
from stable_plugin.evaluation.preflight.diatomics import diatomic_curves
from stable_plugin.evaluation.preflight.drift import energy_drift
from stable_plugin.evaluation.preflight.findings import Preflight
from stable_plugin.evaluation.preflight.holes import find_holes
from stable_plugin.evaluation.preflight.scans import Scanner
from stable_plugin.md.cells import stack_cells
from stable_plugin.md.compositions import split_by_composition
from stable_plugin.md.frames import Frames, read_frames, warn_temperature
from stable_plugin.md.system import System, stack_positions
from stable_plugin.models import Potential, find_potential
from stable_plugin.runtime import checks

log = logging.getLogger(__name__)

N_FRAMES = 8
"""Number of frames that are scanned by default."""


def check_potential(
    module: nn.Module | Calculator,
    frames: Frames,
    temperature_K: float = 300.0,
    *,
    n_frames: int = N_FRAMES,
    bonds: Sequence[tuple[int, int]] | None = None,
    seed: int = 0,
) -> Preflight:
    """Look for holes and other faults of a potential without simulating at temperature.

    Bonds, angles and contacts of a few frames are moved from their thermal range to beyond it; a hole is a geometry there
    whose energy is less than 8 kT above that of the thermal range. The thermal range comes from the fluctuations in all
    frames, which should be of equilibrium at this temperature.

    Args:
        module: Module that holds the potential, or an ASE calculator.
        frames: Reference frames of one system, as a file or ASE structures.
        temperature_K: Temperature of the simulations to come, in K.
        n_frames: Number of frames that are scanned, spread evenly over all.
        bonds: Pairs of bonded atoms; if None, those that hold in nearly all frames.
        seed: Seed of random rotations and velocities.

    Returns:
        The findings; ``str()`` of them is a short report.

    Raises:
        ValueError: If a setting is out of range, or the frames are of several systems.

    Example:
        >>> from ase.build import bulk
        >>> from ase.calculators.emt import EMT
        >>> from stable_plugin.evaluation import check_potential
        >>> copper = bulk("Cu", cubic=True) * 2
        >>> copper.rattle(0.05, seed=1)
        >>> check_potential(EMT(), [copper], temperature_K=300.0).n_holes
        0
    """
    started = time.perf_counter()
    checks.number("temperature_K", temperature_K, above=0)
    checks.count("n_frames", n_frames)
    checks.seed(seed)
    structures = _of_one_system(read_frames(frames, "frames"))
    warn_temperature(structures, temperature_K, "frames")
    system = System.from_frames(structures, bonds, "frames").with_fixed(structures, structures)
    reference, cell = stack_positions(structures, system, "frames"), stack_cells(structures, system)
    system = system.with_cells(cell)
    chosen = torch.linspace(0, len(reference) - 1, min(n_frames, len(reference))).round().long()
    return _Check(module, system, temperature_K, seed).run(
        Scanner(system, reference, temperature_K, cell),
        reference[chosen],
        None if cell is None else cell[chosen],
        len(reference),
        started,
    )


def check_systems(
    module: nn.Module | Calculator, frames: Frames, temperature_K: float = 300.0, **arguments: Any
) -> dict[str, Preflight]:
    """Check a potential on each system in the frames, see :func:`check_potential`; the most frequent ones if there are many.

    Args:
        module: Module that holds the potential, or an ASE calculator.
        frames: Reference frames of one or several systems, as a file or ASE structures.
        temperature_K: Temperature of the simulations to come, in K.
        **arguments: Further arguments of :func:`check_potential`.

    Returns:
        The findings by the name of the system.

    Raises:
        ValueError: If a setting is out of range, or no frame has two atoms.
    """
    structures = read_frames(frames, "frames")
    named = {name: group for name, group in split_by_composition(structures).items() if len(group[0]) > 1}
    if not named:
        raise ValueError("frames contain no structure of at least two atoms: pass frames of the system to check.")
    taken = list(named)[: StABlEConfig.max_systems]
    if left_out := list(named)[StABlEConfig.max_systems :]:
        log.warning(
            "frames have %d systems; the first %d are checked. Left out: %s%s",
            len(named),
            len(taken),
            ", ".join(left_out[:10]),
            f" and {len(left_out) - 10} more" if len(left_out) > 10 else "",
        )
    return {name: check_potential(module, named[name], temperature_K, **arguments) for name in taken}


class _Check:
    """All checks of one potential and system."""

    def __init__(self, module: nn.Module | Calculator, system: System, temperature_K: float, seed: int) -> None:
        self._make: Callable[[System], Potential] = lambda of: find_potential(module, of)
        self._system, self._temperature_K, self._seed = system, temperature_K, seed

    def run(self, scanner: Scanner, frames: Tensor, cell: Tensor | None, n_frames: int, started: float) -> Preflight:
        """Return the findings for frames, (n_frames, n_atoms, 3) in Å, and their cells."""
        potential = self._make(self._system)
        forces = check_forces(potential, frames, cell)
        finite = not forces.nonfinite_frames
        curves, no_curves = diatomic_curves(self._make, self._system, self._temperature_K)
        cutoff, no_cutoff = check_cutoff(self._make, self._system, frames, cell) if finite else (None, "")
        skipped = "" if finite else "symmetry, cutoff and energy drift are not checked: forces are not finite"
        return Preflight(
            name=Atoms(list(self._system.symbols)).get_chemical_formula(),
            temperature_K=self._temperature_K,
            n_frames=n_frames,
            scans=find_holes(potential, scanner, frames, self._temperature_K, cell),
            diatomics=curves,
            forces=forces,
            symmetry=check_symmetry(self._make, self._system, frames, self._seed, cell) if finite else None,
            cutoff=cutoff,
            drift=energy_drift(potential, frames, self._temperature_K, self._seed, cell) if finite else None,
            notes=[note for note in (no_curves, no_cutoff, skipped) if note],
            wall_s=time.perf_counter() - started,
        )


def _of_one_system(structures: Sequence[Atoms]) -> Sequence[Atoms]:
    """Return the structures, or raise an error if they are of several systems."""
    names = list(split_by_composition(structures))
    if len(names) > 1:
        raise ValueError(
            f"frames={', '.join(names[:10])} are of {len(names)} systems: pass the frames of one of them, see "
            "stable_plugin.md.compositions.split_by_composition."
        )
    return structures
