"""Conversions between the public units (fs, ps, K, 1/ps) and the internal ones (eV, Å, ASE time)."""

from ase import units

BOLTZMANN = units.kB
"""Boltzmann constant in eV/K."""

FS = units.fs
"""One femtosecond in ASE time, Å·sqrt(u/eV)."""

PS = 1000.0 * units.fs
"""One picosecond in ASE time."""
