"""Remake the data of liquid water: an SPC/Fw trajectory, and the small files cut from it.

To remake it as it is shipped (the first takes about half an hour, and needs openmm):
    python make_water.py simulate --out water.npz
    python make_water.py slice --trajectory water.npz
and, for the recipe that learns from experiment, at a second temperature:
    python make_water.py simulate --temperature-K 340 --frames 2000 --out hot.npz
    python make_water.py slice --trajectory hot.npz
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from ase import units
from ase.data import atomic_masses
from make_molecule import GAP, HERE, evenly, write_extxyz

N_MOLECULES = 64
TEMPERATURE_K = 300.0
SIDES_A = {TEMPERATURE_K: 12.4296, 340.0: 12.5023}
"""Side of the cell by temperature in K: 0.9970 and 0.9796 g/cm3, as measured at 1 bar (the first at 298 K)."""

TIMESTEP_FS = 1.0
FRICTION_PER_PS = 0.5
STEPS_PER_FRAME = 20
CUTOFF_NM = 0.6
N_FRAMES = 4000

# Wu, Tepper and Voth, J. Chem. Phys. 124, 024503 (2006), table I, in OpenMM's units: nm, kJ/mol, e, rad.
BOND = (0.1012, 2 * 529.581 * 4.184 * 100.0)
ANGLE = (np.radians(113.24), 2 * 37.95 * 4.184)
CHARGES = (-0.82, 0.41, 0.41)
LENNARD_JONES = (0.3165492, 0.1554253 * 4.184)

N_REFERENCE = 200


def spc_fw(side_A: float):
    """Return the OpenMM system: flexible SPC/Fw waters, particle-mesh Ewald."""
    import openmm

    system = openmm.System()
    side = side_A / 10.0
    system.setDefaultPeriodicBoxVectors((side, 0, 0), (0, side, 0), (0, 0, side))
    bonds, angles, pairs = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce(), openmm.NonbondedForce()
    pairs.setNonbondedMethod(openmm.NonbondedForce.PME)
    pairs.setCutoffDistance(CUTOFF_NM)
    for oxygen in range(0, 3 * N_MOLECULES, 3):
        for number, charge in zip((8, 1, 1), CHARGES, strict=True):
            system.addParticle(atomic_masses[number])
            pairs.addParticle(charge, *(LENNARD_JONES if number == 8 else (1.0, 0.0)))
        for hydrogen in (oxygen + 1, oxygen + 2):
            bonds.addBond(oxygen, hydrogen, *BOND)
            pairs.addException(oxygen, hydrogen, 0.0, 1.0, 0.0)
        angles.addAngle(oxygen + 1, oxygen, oxygen + 2, *ANGLE)
        pairs.addException(oxygen + 1, oxygen + 2, 0.0, 1.0, 0.0)
    for force in (bonds, angles, pairs):
        system.addForce(force)
    return system


def grid(rng: np.random.Generator, side_A: float) -> np.ndarray:
    """Molecules on a cubic grid, turned at random, (3 * N_MOLECULES, 3) in Å."""
    length, angle = 10.0 * BOND[0], ANGLE[0]
    shape = np.array([[0, 0, 0], [length, 0, 0], [length * np.cos(angle), length * np.sin(angle), 0]])
    n_side = round(N_MOLECULES ** (1 / 3))
    places = (np.stack(np.meshgrid(*[np.arange(n_side)] * 3), axis=-1).reshape(-1, 3) + 0.5) * side_A / n_side
    turns = [np.linalg.qr(rng.standard_normal((3, 3)))[0] for _ in places]
    return np.concatenate([place + shape @ turn for place, turn in zip(places, turns, strict=True)])


def simulate(out: Path, temperature_K: float, n_frames: int, equilibration_ps: float, seed: int) -> None:
    """Run a reference trajectory and save it as a compressed numpy file."""
    import openmm
    from openmm import unit

    side_A = SIDES_A[temperature_K]
    integrator = openmm.LangevinMiddleIntegrator(temperature_K, FRICTION_PER_PS, TIMESTEP_FS * 1e-3)
    integrator.setRandomNumberSeed(seed + 1)
    context = openmm.Context(spc_fw(side_A), integrator)
    context.setPositions(grid(np.random.default_rng(seed), side_A) / 10.0)
    openmm.LocalEnergyMinimizer.minimize(context)
    context.setVelocitiesToTemperature(temperature_K, seed + 2)
    integrator.step(round(equilibration_ps * 1e3 / TIMESTEP_FS))

    frames = {"R": [], "V": [], "E": [], "F": []}
    electronvolt = 96.48533212
    for _ in range(n_frames):
        integrator.step(STEPS_PER_FRAME)
        state = context.getState(positions=True, velocities=True, forces=True, energy=True)
        frames["R"].append(state.getPositions(asNumpy=True).value_in_unit(unit.angstrom))
        frames["V"].append(state.getVelocities(asNumpy=True).value_in_unit(unit.angstrom / unit.femtosecond))
        frames["E"].append(state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole) / electronvolt)
        forces = state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.angstrom)
        frames["F"].append(forces / electronvolt)
    arrays = {key: np.array(value, dtype="f8" if key == "E" else "f4") for key, value in frames.items()}
    numbers = np.tile([8, 1, 1], N_MOLECULES)
    dt_fs = STEPS_PER_FRAME * TIMESTEP_FS
    np.savez_compressed(out, z=numbers, dt_fs=dt_fs, T=temperature_K, cell=np.eye(3) * side_A, **arrays)
    kinetic_K = (atomic_masses[numbers][:, None] * (arrays["V"] / units.fs) ** 2).mean() / units.kB
    print(f"{out}: {n_frames} frames, mean kinetic temperature {kinetic_K:.0f} K")


def cut(trajectory_file: Path, out: Path) -> None:
    """Cut the extxyz files from a trajectory: first half to learn from, second half to evaluate on."""
    with np.load(trajectory_file) as file:
        trajectory = {key: file[key] for key in ("z", "dt_fs", "T", "cell")}
        trajectory |= {"positions": file["R"], "REF_energy": file["E"], "REF_forces": file["F"]}
        velocities = file["V"].astype("f8") / units.fs
    trajectory["momenta"] = atomic_masses[trajectory["z"]][:, None] * velocities
    temperature_K, n_frames = float(trajectory["T"]), len(trajectory["positions"])
    half = n_frames // 2
    learn = int((1 - GAP) * half)
    heldout = evenly(half, n_frames, 16)
    out.mkdir(parents=True, exist_ok=True)

    def write(name: str, frames: np.ndarray, *arrays: str) -> None:
        write_extxyz(out / name, trajectory, frames, *arrays)

    # For a potential of several temperatures.
    name = f"water_{temperature_K:.0f}K"
    train = evenly(0, learn, 12)
    write(f"{name}_train.extxyz", train, "REF_forces")
    if temperature_K != TEMPERATURE_K:
        between = np.setdiff1d(evenly(0, learn, 40), train)
        write(f"{name}_valid.extxyz", between[evenly(0, len(between), 3)], "REF_forces")
        write(f"{name}_target.extxyz", evenly(0, learn, 50))
        write(f"{name}_heldout.extxyz", heldout, "REF_forces")
        return

    train = evenly(0, learn, 4)
    between = np.setdiff1d(evenly(0, learn, 40), train)
    write("water_train.extxyz", train, "REF_forces")
    write("water_valid.extxyz", between[evenly(0, len(between), 5)], "REF_forces")
    write("water_target.extxyz", evenly(0, learn, 50))
    write("water_heldout.extxyz", heldout, "REF_forces", "momenta")
    # Contiguous in time, for what depends on time.
    write("water_reference.extxyz", np.arange(half, min(half + N_REFERENCE, n_frames)), "momenta")


def main() -> None:
    """Command line: ``simulate`` or ``slice``."""
    parser = argparse.ArgumentParser(description="Remake the data of liquid water.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("simulate", help="run the SPC/Fw trajectory")
    run.add_argument("--out", type=Path, required=True, help="the npz file to write")
    run.add_argument(
        "--temperature-K", type=float, choices=sorted(SIDES_A), default=TEMPERATURE_K, help="(default: %(default)s)"
    )
    run.add_argument("--frames", type=int, default=N_FRAMES, help="one every 20 fs (default: %(default)s)")
    run.add_argument("--equilibration-ps", type=float, default=20.0, help="(default: %(default)s)")
    run.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    slices = commands.add_parser("slice", help="cut the extxyz files from a trajectory")
    slices.add_argument("--trajectory", type=Path, required=True, help="the npz file that simulate wrote")
    slices.add_argument("--out", type=Path, default=HERE, help="folder to write to (default: %(default)s)")
    args = parser.parse_args()
    if args.command == "simulate":
        simulate(args.out, args.temperature_K, args.frames, args.equilibration_ps, args.seed)
    else:
        cut(args.trajectory, args.out)


if __name__ == "__main__":
    main()
