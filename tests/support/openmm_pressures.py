"""Print the pressures of SPC/Fw water that test_pressure.py compares with: ``python openmm_pressures.py``, with openmm installed."""

import sys
from pathlib import Path

import numpy as np
import openmm
from ase import units
from ase.io import read

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "recipes/data"))
from make_water import N_MOLECULES, TEMPERATURE_K, spc_fw  # noqa: E402

STRAIN = 1e-4
KJ_PER_MOL = units.kJ / units.mol


def smooth_spc_fw():
    """Return the system of the recipe's data, with interactions that end smoothly and converged Ewald sums."""
    system = spc_fw()
    (pairs,) = (force for force in system.getForces() if isinstance(force, openmm.NonbondedForce))
    pairs.setUseSwitchingFunction(True)
    pairs.setSwitchingDistance(0.5)
    pairs.setUseDispersionCorrection(False)
    pairs.setNonbondedMethod(openmm.NonbondedForce.Ewald)
    pairs.setEwaldErrorTolerance(1e-7)
    return system


def main():
    context = openmm.Context(
        smooth_spc_fw(), openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )

    def energy(positions, side):
        context.setPeriodicBoxVectors(*(0.1 * side * np.eye(3)))
        context.setPositions(0.1 * positions)
        return context.getState(energy=True).getPotentialEnergy().value_in_unit(openmm.unit.kilojoule_per_mole)

    for atoms in read(ROOT / "recipes/data/water_reference.extxyz", "::40"):
        side, positions, masses = atoms.cell[0, 0], atoms.positions, atoms.get_masses()
        for oxygen in range(0, len(atoms), 3):  # whole molecules
            for hydrogen in (oxygen + 1, oxygen + 2):
                positions[hydrogen] -= side * np.round((positions[hydrogen] - positions[oxygen]) / side)
        by_molecule = positions.reshape(N_MOLECULES, 3, 3)
        centers = np.average(by_molecule, axis=1, weights=masses[:3])
        energies = [
            energy((by_molecule + sign * STRAIN * centers[:, None]).reshape(-1, 3), side * (1 + sign * STRAIN))
            for sign in (-1, 1)
        ]
        slope = (energies[1] - energies[0]) * KJ_PER_MOL / (6 * STRAIN * side**3)
        pressure = N_MOLECULES * units.kB * TEMPERATURE_K / side**3 - slope
        print(f"{energy(positions, side) * KJ_PER_MOL:.6f} eV, {pressure / units.GPa:.5f} GPa")


if __name__ == "__main__":
    main()
