"""Energies of simulated frames against those of the reference: holes of the potential, in any coordinate."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt

import torch
from ase.units import kB
from torch import Tensor

from stable_plugin.detectors.limits import FALSE_ALARMS, Limits, thermal_limits
from stable_plugin.evaluation.batches import energies_and_forces
from stable_plugin.evaluation.simulation import ReplicaTrajectories
from stable_plugin.models import Potential

MAX_REFERENCE_FRAMES = 200
"""Most reference frames whose energies are computed, evenly spaced."""

SYSTEMATIC = 0.5
"""Difference of the mean energy per atom from that of the reference, over kT, that is an error but no failure."""


def energy_limits(
    potential: Potential, reference: Tensor, temperature_K: float, cell: Tensor | None, batch_size: int
) -> Limits:
    """Return the limits of the energy that a potential has at equilibrium, from its energies of the reference frames.

    Besides the thermal fluctuations, which for harmonic atoms have a standard deviation of :math:`k_B T (3N/2)^{1/2}`, the
    mean may differ by half of :math:`k_B T` per atom, as the frames are not from the ensemble of this potential.

    Args:
        potential: The potential.
        reference: Reference frames, (n_frames, n_atoms, 3) in Å.
        temperature_K: Temperature of the simulation in K.
        cell: Cells of these frames, (n_frames, 3, 3) in Å; that of the system if None.
        batch_size: Frames per call of the potential.
    """
    chosen = torch.linspace(0, len(reference) - 1, min(len(reference), MAX_REFERENCE_FRAMES)).round().long()
    energies = energies_and_forces(potential, reference[chosen], None if cell is None else cell[chosen], batch_size)[0]
    kT, n_atoms = kB * temperature_K, potential.system.n_moving
    limits = thermal_limits(energies[:, None], torch.zeros(1, dtype=torch.long), kT * sqrt(1.5 * n_atoms), FALSE_ALARMS)
    systematic = SYSTEMATIC * kT * n_atoms
    return replace(limits, lower=limits.lower - systematic, upper=limits.upper + systematic)


def stop_at_energy_failures(
    replicas: ReplicaTrajectories, potential: Potential, limits: Limits
) -> tuple[ReplicaTrajectories, dict[int, str]]:
    """Return the replicas, each up to its first recorded frame with an energy outside the limits, and what was wrong.

    Args:
        replicas: Simulated replicas.
        potential: Potential that they were simulated with.
        limits: See :func:`energy_limits`.
    """
    n_replicas = len(replicas.failed_ps)
    valid, failed_ps = replicas.valid.clone(), replicas.failed_ps.clone()
    positions, velocities = replicas.last_positions.clone(), replicas.last_velocities.clone()
    descriptions: dict[int, str] = {}
    for replica in range(n_replicas):
        frames = replicas.valid[:, replica].nonzero().squeeze(1)
        cell = replicas.cells(frames, replica)
        energies = energies_and_forces(potential, replicas.positions[frames, replica], cell, n_replicas)[0]
        outside = (limits.relative(energies[:, None]).squeeze(1) > 1.0).nonzero().squeeze(1)
        if len(outside) == 0:
            continue
        first = int(outside[0])
        frame = int(frames[first])
        valid[frame:, replica] = False
        failed_ps[replica] = replicas.times_ps[frame]
        positions[replica] = replicas.positions[frame, replica]
        velocities[replica] = replicas.velocities[frame, replica]
        descriptions[replica] = (
            f"energy {energies[first] - limits.center[0]:+.3g} eV from the mean of the reference frames, limits "
            f"{limits.lower[0] - limits.center[0]:+.3g} and {limits.upper[0] - limits.center[0]:+.3g}"
        )
    stopped = replace(replicas, valid=valid, failed_ps=failed_ps, last_positions=positions, last_velocities=velocities)
    return stopped, descriptions
