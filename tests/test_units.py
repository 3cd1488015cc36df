"""Units."""

from ase import units

from stable_plugin.units import BOLTZMANN, FS, PS


def test_units_match_ase():
    assert units.fs == FS
    assert 1000.0 * units.fs == PS
    assert units.kB == BOLTZMANN
