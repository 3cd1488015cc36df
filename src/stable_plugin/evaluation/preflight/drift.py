"""Drift of the energy in a short simulation without a thermostat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stable_plugin.md.cells import optional
from stable_plugin.md.state import maxwell_boltzmann
from stable_plugin.models import Potential
from stable_plugin.units import FS

DURATION_PS = 0.25
TIMESTEP_FS = 0.5
N_REPLICAS = 4


@dataclass(frozen=True)
class DriftFindings:
    """Change of the total energy in velocity Verlet dynamics.

    Attributes:
        drift_meV_per_atom_ps: Slope of a straight line through the mean total energy of the replicas, per atom.
        standard_error: Standard error of the slope, from the scatter between replicas.
        duration_ps: Time that was simulated, in ps.
        n_replicas: Number of replicas whose energy stayed finite.
    """

    drift_meV_per_atom_ps: float
    standard_error: float
    duration_ps: float
    n_replicas: int


def energy_drift(
    potential: Potential, starts: Tensor, temperature_K: float, seed: int, cell: Tensor | None = None
) -> DriftFindings:
    """Return the drift of the energy of a few replicas that are simulated without a thermostat.

    Args:
        potential: The potential.
        starts: Start frames, (n_starts, n_atoms, 3) in Å.
        temperature_K: Temperature of the first velocities in K.
        seed: Seed of the velocities.
        cell: Cells of the start frames, (n_starts, 3, 3) in Å; that of the system if None.
    """
    chosen = torch.arange(min(N_REPLICAS, len(starts)))
    generator = torch.Generator(potential.device).manual_seed(seed)
    positions = starts[chosen].to(potential.device, potential.dtype)
    own = optional(None if cell is None else cell[chosen].to(positions))
    inertia = potential.system.inertia
    velocities = maxwell_boltzmann(positions.shape, inertia, temperature_K, generator).to(positions)
    step = TIMESTEP_FS * FS
    n_steps = round(1000.0 * DURATION_PS / TIMESTEP_FS)
    moved = torch.zeros_like(positions)
    totals = torch.zeros(n_steps, len(positions), dtype=torch.float64, device=potential.device)
    with potential.simulating():
        energies, forces = potential.energies_and_forces(positions, potential.edges(positions, *own))
        for index in range(n_steps):
            velocities = velocities + 0.5 * step * forces / inertia[:, None]
            # The sum of small steps is kept apart, as single precision loses digits of them in large positions.
            moved = moved + step * velocities
            at = positions + moved
            energies, forces = potential.energies_and_forces(at, potential.edges(at, *own))
            velocities = velocities + 0.5 * step * forces / inertia[:, None]
            kinetic = 0.5 * (potential.system.masses.double()[:, None] * velocities.double().square()).sum(dim=(1, 2))
            totals[index] = energies.double() + kinetic
    return _fit(totals.cpu().numpy(), potential.system.n_atoms)


def _fit(totals: np.ndarray, n_atoms: int) -> DriftFindings:
    """Return the drift of total energies, (n_steps, n_replicas) in eV."""
    finite = np.isfinite(totals).all(axis=0)
    if not finite.any():
        return DriftFindings(float("inf"), 0.0, DURATION_PS, 0)
    times_ps = TIMESTEP_FS / 1000.0 * np.arange(len(totals))
    slopes = 1000.0 / n_atoms * np.polyfit(times_ps, totals[:, finite], 1)[0]
    error = slopes.std(ddof=1) / np.sqrt(len(slopes)) if len(slopes) > 1 else 0.0
    return DriftFindings(float(slopes.mean()), float(error), DURATION_PS, int(finite.sum()))
