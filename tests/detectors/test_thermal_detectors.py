"""Detectors of high temperatures and of numbers that are not finite: closed answers."""

from math import sqrt

import pytest
import torch
from ase.build import molecule
from detector_tools import at_rest, bound, chain_frames, classified

from stable_plugin import NonFinite, RunawayTemperature
from stable_plugin.units import BOLTZMANN


def test_runaway_temperature_counts_all_degrees_of_freedom():
    detector = bound(RunawayTemperature(500.0, 1000.0), atoms=molecule("N2"))
    mass = 14.007
    velocities = torch.zeros(3, 2, 3, dtype=torch.float64)
    for replica, temperature in enumerate((400.0, 600.0, 1200.0)):
        # A kinetic energy of 3/2 · 2 kT in one atom along x.
        velocities[replica, 0, 0] = sqrt(6 * BOLTZMANN * temperature / mass)
    assert detector.measure(velocities, velocities).tolist() == pytest.approx([400.0, 600.0, 1200.0])
    assert classified(detector, velocities, velocities) == ([False, True, True], [False, False, True])


def test_non_finite_discards_positions_and_velocities():
    positions = chain_frames({}, {}, {(2, 1): float("inf")})
    velocities = at_rest(positions)
    velocities[1, 0, 0] = torch.nan
    assert classified(NonFinite(), positions, velocities) == ([False, True, True], [False, True, True])
