"""Holes: geometries beyond thermal motion to which a potential gives too low an energy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from ase.units import kB
from torch import Tensor

from stable_plugin.evaluation.preflight.batches import energies_and_forces
from stable_plugin.evaluation.preflight.scans import Scan, Scanner
from stable_plugin.models import Potential

BARRIER_KT = 8.0
r"""Energy over :math:`k_\mathrm{B} T` that a geometry beyond the thermal limits has at least, above the lowest within.

At the limit of a harmonic coordinate that one frame in 10 million exceeds it is 14 or more."""


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
    barrier_eV: float | None


@dataclass(frozen=True)
class ScanFindings:
    """Holes of one kind.

    Attributes:
        kind: ``bond``, ``angle`` or ``contact``.
        n_scans: Number of scans: coordinates times frames.
        n_holes: Number of scans that have a hole.
        holes: The deepest hole of each coordinate that has one, the deepest first.
    """

    kind: str
    n_scans: int
    n_holes: int
    holes: list[Hole]


def find_holes(
    potential: Potential, scanner: Scanner, frames: Tensor, temperature_K: float, cell: Tensor | None = None
) -> list[ScanFindings]:
    """Scan around frames and return the holes of each kind.

    Args:
        potential: The potential.
        scanner: What is scanned.
        frames: (n_frames, n_atoms, 3) in Å.
        temperature_K: Temperature in K.
        cell: Cells of the frames, (n_frames, 3, 3) in Å; that of the system if None.
    """
    found: dict[str, list[Hole | None]] = {}
    for turn, frame in enumerate(frames):
        own = None if cell is None else cell[turn]
        scans = list(scanner.scans(frame, turn, own))
        if not scans:
            continue
        positions = torch.cat([scan.positions for scan in scans])
        cells = None if own is None else own.expand(len(positions), 3, 3)
        energies, _ = energies_and_forces(potential, positions, cells)
        for scan, energy in zip(scans, energies.split([len(scan.values) for scan in scans]), strict=True):
            name = potential.system.label(scan.atoms)
            found.setdefault(scan.kind, []).append(hole_of(scan, energy, BARRIER_KT * kB * temperature_K, name, turn))
    return [_findings(kind, holes) for kind, holes in found.items()]


def hole_of(scan: Scan, energies: Tensor, least_eV: float, name: str, frame: int) -> Hole | None:
    """Return the deepest hole of a scan, or None if there is none.

    Args:
        scan: The scan.
        energies: Energies of its points, (n_points,) in eV.
        least_eV: Least energy of a point beyond the thermal range, above the lowest one within.
        name: Name of the atoms.
        frame: Number of the frame.
    """
    comparable = torch.nan_to_num(energies, nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    well = int(torch.where(scan.thermal, comparable, torch.inf).argmin())
    relative = energies - energies[well]
    low = ~scan.thermal & ~(relative >= least_eV)
    if not low.any():
        return None
    depth = torch.where(low, torch.nan_to_num(relative, nan=-torch.inf), torch.inf)
    deepest = int(depth.argmin())
    between = relative[min(well, deepest) : max(well, deepest) + 1]
    return Hole(
        kind=scan.kind,
        atoms=name,
        frame=frame,
        value=float(scan.values[deepest]),
        unit=scan.unit,
        limits=scan.limits,
        energy_eV=_finite(relative[deepest]),
        barrier_eV=_finite(between.max()),
    )


def _findings(kind: str, holes: Sequence[Hole | None]) -> ScanFindings:
    deepest: dict[str, Hole] = {}
    present = [hole for hole in holes if hole is not None]
    for hole in sorted(present, key=_depth):
        deepest.setdefault(hole.atoms, hole)
    return ScanFindings(kind, len(holes), len(present), list(deepest.values()))


def _depth(hole: Hole) -> float:
    return -torch.inf if hole.energy_eV is None else hole.energy_eV


def _finite(value: Tensor) -> float | None:
    return float(value) if bool(torch.isfinite(value)) else None
