"""The units of this package, ASE's, for physical_validation, which works in those of GROMACS."""

import physical_validation as pv
from ase import units

UNITS = pv.data.UnitData(
    kb=units.kB,
    energy_conversion=units.mol / units.kJ,
    length_conversion=0.1,
    volume_conversion=0.001,
    temperature_conversion=1.0,
    pressure_conversion=units.bar**-1,
    time_conversion=0.001,
)
QUIET = {"verbosity": 0, "data_is_uncorrelated": True}
