"""Holes: geometries beyond thermal motion to which a potential gives too low an energy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from ase.units import kB
from torch import Tensor

from stable_plugin.evaluation.batches import energies_and_forces
from stable_plugin.evaluation.preflight.scans import Scan, Scanner
from stable_plugin.models import Potential

BARRIER_KT = 8.0
r"""Energy over :math:`k_\mathrm{B} T` that a geometry beyond the thermal limits has at least, above the lowest within.

At the limit of a harmonic coordinate that one frame in 10 million exceeds it is 14 or more."""

REACH_KT = 20.0
r"""Barrier over :math:`k_\mathrm{B} T` beyond which a hole is out of reach.

At ten attempts per ps, one barrier of this height is crossed once in 50 µs. The other atoms do not relax in a scan, so that
the barriers of a simulation are lower than scanned ones."""


@dataclass(frozen=True)
class Hole:
    r"""A scanned geometry whose energy is too low.

    Attributes:
        kind: ``bond``, ``angle`` or ``contact``.
        atoms: Names of the atoms, such as ``C1-H14``.
        frame: Number of the frame that was scanned.
        value: Value of the coordinate.
        unit: Its unit.
        limits: Ends of its thermal range.
        energy_eV: Energy above the lowest one of the scan within the thermal range; negative in a deep hole; None if it is
            not finite.
        barrier_eV: Highest energy between the two.
    """

    kind: str
    atoms: str
    frame: int
    value: float
    unit: str
    limits: tuple[float, float]
    energy_eV: float | None
    barrier_eV: float


@dataclass(frozen=True)
class ScanFindings:
    """Holes of one kind.

    Attributes:
        kind: ``bond``, ``angle`` or ``contact``.
        n_scans: Number of scans: coordinates times frames.
        n_holes: Number of scans that have a hole within reach.
        n_out_of_reach: Number of scans that have holes only behind a barrier of more than 20 kT.
        holes: The deepest hole within reach of each coordinate that has one, the deepest first.
    """

    kind: str
    n_scans: int
    n_holes: int
    n_out_of_reach: int
    holes: list[Hole]


def find_holes(
    potential: Potential, scanner: Scanner, frames: Tensor, temperature_K: float, cell: Tensor | None = None
) -> list[ScanFindings]:
    """Return the holes of each kind around frames.

    Args:
        potential: The potential.
        scanner: What is scanned.
        frames: (n_frames, n_atoms, 3) in Å.
        temperature_K: Temperature in K.
        cell: Cells of the frames, (n_frames, 3, 3) in Å; that of the system if None.
    """
    found: dict[str, list[Hole | None]] = {}
    kT = kB * temperature_K
    for turn, frame in enumerate(frames):
        own = None if cell is None else cell[turn]
        scans = list(scanner.scans(frame, turn, own))
        if not scans:
            continue
        positions = torch.cat([scan.positions for scan in scans])
        cells = None if own is None else own.expand(len(positions), 3, 3)
        energies, _ = energies_and_forces(potential, positions, cells)
        for scan, energy in zip(scans, energies.split([len(scan.values) for scan in scans]), strict=True):
            hole = hole_of(scan, energy, kT, potential.system.label(scan.atoms), turn)
            found.setdefault(scan.kind, []).append(hole)
    return [_findings(kind, holes, REACH_KT * kT) for kind, holes in found.items()]


def hole_of(scan: Scan, energies: Tensor, kT: float, name: str, frame: int) -> Hole | None:
    """Return the deepest hole of a scan, or None if there is none; one within reach before one that is not.

    Args:
        scan: The scan.
        energies: Energies of its points, (n_points,) in eV.
        kT: Thermal energy in eV.
        name: Name of the atoms.
        frame: Number of the frame.
    """
    well = int(torch.where(scan.thermal & torch.isfinite(energies), energies, torch.inf).argmin())
    relative = energies - energies[well]
    low = ~scan.thermal & ~(relative >= BARRIER_KT * kT)
    if not low.any():
        return None
    barriers = _barriers(relative, well)
    reached = low & (barriers <= REACH_KT * kT)
    candidates = reached if reached.any() else low
    depth = torch.where(candidates, torch.nan_to_num(relative, nan=-torch.inf), torch.inf)
    deepest = int(depth.argmin())
    return Hole(
        kind=scan.kind,
        atoms=name,
        frame=frame,
        value=float(scan.values[deepest]),
        unit=scan.unit,
        limits=scan.limits,
        energy_eV=_finite(relative[deepest]),
        barrier_eV=float(barriers[deepest]),
    )


def _barriers(relative: Tensor, well: int) -> Tensor:
    """Return the highest finite energy between the well and each point of a scan, (n_points,)."""
    heights = torch.nan_to_num(relative, nan=-torch.inf)
    before = heights[: well + 1].flip(0).cummax(dim=0).values.flip(0)
    after = heights[well:].cummax(dim=0).values
    return torch.cat([before[:-1], after])


def _findings(kind: str, holes: Sequence[Hole | None], reach_eV: float) -> ScanFindings:
    deepest: dict[str, Hole] = {}
    present = [hole for hole in holes if hole is not None]
    reached = [hole for hole in present if hole.barrier_eV <= reach_eV]
    for hole in sorted(reached, key=_depth):
        deepest.setdefault(hole.atoms, hole)
    return ScanFindings(kind, len(holes), len(reached), len(present) - len(reached), list(deepest.values()))


def _depth(hole: Hole) -> float:
    return -torch.inf if hole.energy_eV is None else hole.energy_eV


def _finite(value: Tensor) -> float | None:
    return float(value) if bool(torch.isfinite(value)) else None
