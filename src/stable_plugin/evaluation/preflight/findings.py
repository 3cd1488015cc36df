"""Result of the static checks of a potential."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from ase.units import kB

from stable_plugin.evaluation.formatting import duration, number, plain
from stable_plugin.evaluation.preflight.consistency import CutoffFindings, ForceFindings, SymmetryFindings
from stable_plugin.evaluation.preflight.diatomics import DiatomicCurve
from stable_plugin.evaluation.preflight.drift import DriftFindings
from stable_plugin.evaluation.preflight.holes import REACH_KT, Hole, ScanFindings

MAX_FORCE_EV_PER_A = 10.0
"""Root mean square component that the forces have at most at 300 K: stiff bonds have 1 eV/Å."""

MAX_ASYMMETRY = 1e-3
"""Largest change of a force under a symmetry operation, over the root mean square force."""

MAX_ENERGY_JUMP_EV = 1e-3
MAX_FORCE_JUMP_EV_PER_A = 1e-2
"""Largest jumps at the cutoff."""

MAX_DRIFT_KT_PER_PS = 0.05
r"""Largest drift of the energy per atom, in :math:`k_\mathrm{B} T` per ps."""

MAX_TORTUOSITY = 1.5

SHOWN = 5
"""Number of holes of each kind in the text."""


@dataclass(frozen=True)
class Preflight:
    """What static checks found in a potential, before any simulation at temperature.

    Attributes:
        name: Chemical formula of the system.
        temperature_K: Temperature in K.
        n_frames: Number of reference frames.
        scans: Holes around the reference frames, by kind.
        diatomics: Curves of all pairs of elements.
        forces: Forces of the start frames.
        symmetry: Violations of symmetries; None if the forces are not finite.
        cutoff: Jumps at the cutoff; None if there is no cutoff.
        drift: Drift of the energy; None if the forces are not finite.
        notes: What could not be checked, and why.
        wall_s: Time that it took, in s.
    """

    name: str
    temperature_K: float
    n_frames: int
    scans: list[ScanFindings]
    diatomics: list[DiatomicCurve]
    forces: ForceFindings
    symmetry: SymmetryFindings | None = None
    cutoff: CutoffFindings | None = None
    drift: DriftFindings | None = None
    notes: list[str] = field(default_factory=list)
    wall_s: float = 0.0

    @property
    def n_holes(self) -> int:
        """Number of scans that have a hole within reach."""
        return sum(scan.n_holes for scan in self.scans)

    @property
    def n_scans(self) -> int:
        """Number of scans."""
        return sum(scan.n_scans for scan in self.scans)

    @property
    def problems(self) -> list[str]:
        """One sentence for each kind of problem, none for a sound potential."""
        return [*self._holes(), *self._bad_forces(), *self._bad_diatomics(), *self._inconsistencies()]

    def to_json(self) -> dict[str, Any]:
        """Return the findings as plain data; numbers that are not finite become None."""
        found: dict[str, Any] = plain(
            {"problems": self.problems, "n_holes": self.n_holes, "n_scans": self.n_scans, **asdict(self)}
        )
        return found

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield (
            f"{self.name}, {number(self.temperature_K)} K: {self.n_holes} of {self.n_scans} scans have a hole, "
            f"{len(self.problems)} {'problem' if len(self.problems) == 1 else 'problems'} "
            f"({self.n_frames} frames, {duration(self.wall_s)})"
        )
        for problem in self.problems:
            yield f"  - {problem}"
        for scan in self.scans:
            for hole in scan.holes[:SHOWN]:
                yield f"      {hole_text(hole)}"
            if len(scan.holes) > SHOWN:
                yield f"      and {len(scan.holes) - SHOWN} more {scan.kind}s"
        yield from self._measured()
        for note in self.notes:
            yield f"  Note: {note}"

    def _measured(self) -> Iterator[str]:
        hidden = sum(scan.n_out_of_reach for scan in self.scans)
        if hidden:
            yield f"  holes behind barriers of more than {REACH_KT:.0f} kT: in {hidden} scans"
        yield f"  forces: rms {number(self.forces.rms_eV_per_A)} eV/Å, largest {number(self.forces.max_eV_per_A)}"
        if self.diatomics:
            sound = sum(curve.repulsive for curve in self.diatomics)
            yield f"  diatomics: {sound} of {len(self.diatomics)} pairs of elements repel at short range"
        if self.symmetry is not None:
            changes = ", ".join(f"{name} {number(change[1])}" for name, change in vars(self.symmetry).items())
            yield f"  largest change of a force in eV/Å: {changes}"
        if self.cutoff is not None:
            yield (
                f"  at the cutoff of {number(self.cutoff.cutoff_A)} Å: energy jumps by "
                f"{number(self.cutoff.energy_jump_eV)} eV, force by {number(self.cutoff.force_jump_eV_per_A)} eV/Å"
            )
        if self.drift is not None:
            yield (
                f"  energy drift without thermostat: {number(self.drift.drift_meV_per_atom_ps)} ± "
                f"{number(self.drift.standard_error, 2)} meV/atom/ps over {number(self.drift.duration_ps)} ps"
            )

    def _holes(self) -> Iterator[str]:
        for scan in self.scans:
            if scan.n_holes > 0:
                named = f"{len(scan.holes)} {scan.kind}{'s' if len(scan.holes) > 1 else ''}"
                yield f"holes in {scan.n_holes} of {scan.n_scans} {scan.kind} scans: {named}"

    def _bad_forces(self) -> Iterator[str]:
        frames = self.forces.nonfinite_frames
        if frames:
            yield f"energy or forces are not finite in frames {', '.join(map(str, frames[:10]))}"
        if self.forces.rms_eV_per_A > MAX_FORCE_EV_PER_A * math.sqrt(self.temperature_K / 300.0):
            yield (
                f"forces of the start frames are {number(self.forces.rms_eV_per_A)} eV/Å on average: check the units, and "
                "whether the potential knows this system"
            )

    def _bad_diatomics(self) -> Iterator[str]:
        attracted = [curve.elements for curve in self.diatomics if not curve.repulsive]
        if attracted:
            yield f"no repulsion at short range: {', '.join(attracted)}"
        flips = [f"{curve.elements} ({curve.force_flips})" for curve in self.diatomics if curve.force_flips > 1]
        if flips:
            yield f"force of two atoms changes its sign more than once: {', '.join(flips)}"
        wells = [curve.elements for curve in self.diatomics if len(curve.minima) > 1]
        if wells:
            yield f"more than one minimum deeper than kT: {', '.join(wells)}"
        rough = [curve.elements for curve in self.diatomics if curve.tortuosity > MAX_TORTUOSITY]
        if rough:
            yield f"energy of two atoms goes up and down (tortuosity over {MAX_TORTUOSITY}): {', '.join(rough)}"

    def _inconsistencies(self) -> Iterator[str]:
        if self.symmetry is not None:
            broken = [
                name
                for name, (_, force) in vars(self.symmetry).items()
                if not force <= MAX_ASYMMETRY * max(self.forces.rms_eV_per_A, 0.1)
            ]
            if broken:
                yield f"forces change under {' and '.join(broken)}"
        if self.cutoff is not None and not (
            self.cutoff.energy_jump_eV <= MAX_ENERGY_JUMP_EV
            and self.cutoff.force_jump_eV_per_A <= MAX_FORCE_JUMP_EV_PER_A
        ):
            yield (
                f"energy jumps by {number(self.cutoff.energy_jump_eV)} eV and the force by "
                f"{number(self.cutoff.force_jump_eV_per_A)} eV/Å at the cutoff"
            )
        if self.drift is not None and not self._conserved(self.drift):
            yield (
                f"energy drifts by {number(self.drift.drift_meV_per_atom_ps)} meV/atom/ps without a thermostat: the forces "
                "are not the slope of the energy, the replicas fell into a hole, or 0.5 fs is too long a step"
            )

    def _conserved(self, drift: DriftFindings) -> bool:
        largest = MAX_DRIFT_KT_PER_PS * 1000.0 * kB * self.temperature_K
        return abs(drift.drift_meV_per_atom_ps) <= largest + 2.0 * drift.standard_error


def hole_text(hole: Hole) -> str:
    """Return a hole in words.

    Args:
        hole: The hole.
    """
    energy = "not finite" if hole.energy_eV is None else f"{hole.energy_eV:+.2f} eV"
    lower, upper = hole.limits
    limits = f"limit {number(lower)}" if math.isinf(upper) else f"limits {number(lower)} and {number(upper)}"
    return (
        f"{hole.kind} {hole.atoms} at {number(hole.value)} {hole.unit} ({limits}), frame {hole.frame}: {energy} "
        f"over a barrier of {hole.barrier_eV:.2f} eV"
    )
