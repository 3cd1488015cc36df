"""Remake the data of a molecule: a GFN2-xTB trajectory, and the small files cut from it.

To remake it as it is shipped (the first takes about 20 minutes for aspirin, 35 for the peptide, and needs tblite):
    python make_molecule.py aspirin simulate --out aspirin.npz
    python make_molecule.py aspirin slice --trajectory aspirin.npz
and likewise for peptide.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.data import atomic_masses, chemical_symbols
from ase.io import read

HERE = Path(__file__).resolve().parent
TEMPERATURE_K = 500.0
TIMESTEP_FS = 0.5
FRICTION_PER_PS = 2.0
STEPS_PER_FRAME = 10
# Learning frames stop this share of the first half before the second half starts, so that no frame that is
# learned from is a close neighbor in time of one that is evaluated on.
GAP = 0.05
# With fewer there is no room for validation frames between the training frames.
MIN_FRAMES = 200
# 40 and 20 ps, one frame every 5 fs.
FRAMES = {"aspirin": 8000, "peptide": 4000}


def baoab(
    positions: np.ndarray,
    velocities: np.ndarray,
    masses: np.ndarray,
    forces_of: Callable[[np.ndarray], np.ndarray],
    rng: np.random.Generator,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Langevin dynamics, one BAOAB step (Leimkuhler and Matthews 2013) per item, without end.

    Not ASE's ``Langevin``: with its default ``fixcm=True`` it is not canonical for a molecule this small.

    Args:
        positions: (n_atoms, 3), Å.
        velocities: (n_atoms, 3), ASE units.
        masses: (n_atoms, 1), amu.
        forces_of: maps positions to forces in eV/Å.
        rng: source of the noise.

    Yields:
        Positions, velocities and forces after each step.
    """
    dt = TIMESTEP_FS * units.fs
    keep = np.exp(-FRICTION_PER_PS * TIMESTEP_FS * 1e-3)
    kick = np.sqrt((1 - keep**2) * units.kB * TEMPERATURE_K / masses)
    forces = forces_of(positions)
    while True:
        velocities = velocities + 0.5 * dt * forces / masses
        positions = positions + 0.5 * dt * velocities
        velocities = keep * velocities + kick * rng.standard_normal(velocities.shape)
        positions = positions + 0.5 * dt * velocities
        forces = forces_of(positions)
        velocities = velocities + 0.5 * dt * forces / masses
        yield positions, velocities, forces


def simulate(molecule: str, out: Path, n_frames: int, equilibration_ps: float, seed: int) -> None:
    """Run the reference trajectory from ``MOLECULE_start.xyz`` and save it as a compressed numpy file."""
    # Threads only slow down so small a molecule. OpenMP reads this when tblite is loaded, so it comes first.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from tblite.ase import TBLite

    atoms: Atoms = read(HERE / f"{molecule}_start.xyz")
    atoms.calc = TBLite(method="GFN2-xTB", verbosity=0)
    masses = atoms.get_masses()[:, None]

    def forces_of(positions: np.ndarray) -> np.ndarray:
        atoms.positions = positions
        return atoms.get_forces()

    rng = np.random.default_rng(seed)
    velocities = np.sqrt(units.kB * TEMPERATURE_K / masses) * rng.standard_normal(atoms.positions.shape)
    steps = baoab(atoms.get_positions(), velocities, masses, forces_of, rng)
    for _ in range(round(equilibration_ps * 1e3 / TIMESTEP_FS)):
        next(steps)

    frames = {"R": [], "V": [], "E": [], "F": []}
    for _ in range(n_frames):
        for _ in range(STEPS_PER_FRAME):
            positions, velocities, forces = next(steps)
        frames["R"].append(positions - (masses * positions).sum(0) / masses.sum())
        frames["V"].append(velocities * units.fs)
        frames["E"].append(atoms.get_potential_energy())
        frames["F"].append(forces)

    arrays = {key: np.array(value, dtype="f8" if key == "E" else "f4") for key, value in frames.items()}
    dt_fs = STEPS_PER_FRAME * TIMESTEP_FS
    np.savez_compressed(out, z=atoms.numbers, dt_fs=dt_fs, T=TEMPERATURE_K, **arrays)
    kinetic_K = (masses * (arrays["V"] / units.fs) ** 2).mean() / units.kB
    print(f"{out}: {n_frames} frames, mean kinetic temperature {kinetic_K:.0f} K")


def evenly(start: int, stop: int, count: int) -> np.ndarray:
    """Return ``count`` indices spread evenly over [start, stop), or all of them where there are fewer."""
    return np.unique(np.linspace(start, stop, count, endpoint=False).astype(int))


def write_extxyz(path: Path, trajectory: dict[str, np.ndarray], index: np.ndarray, *extra: str) -> None:
    """Write the frames ``index``, with positions and the ``extra`` arrays (and the energy beside forces).

    ASE's own writer pads every number to 16 columns, which doubles the size. The ``REF_`` prefix keeps ASE's
    reader from moving the labels into a calculator, where training code does not look for them.
    """
    symbols = [chemical_symbols[number] for number in trajectory["z"]]
    if "cell" in trajectory:
        lattice = " ".join(f"{value:.4f}" for value in trajectory["cell"].flat)
        periodic = f'pbc="T T T" Lattice="{lattice}"'
    else:
        periodic = 'pbc="F F F"'
    properties = "species:S:1:pos:R:3" + "".join(f":{name}:R:3" for name in extra)
    decimals = (6, 6, 6) + (5, 5, 5) * len(extra)
    with path.open("w") as file:
        for i in index:
            # Charge and spin multiplicity: some models want to be told that these are neutral closed shells.
            info = {"charge": 0, "spin": 1, "temperature_K": float(trajectory["T"])}
            info["time_fs"] = i * float(trajectory["dt_fs"])
            if "REF_forces" in extra:
                info["REF_energy"] = f"{trajectory['REF_energy'][i]:.6f}"
            comment = " ".join(f"{key}={value}" for key, value in info.items())
            file.write(f"{len(symbols)}\nProperties={properties} {comment} {periodic}\n")
            columns = np.concatenate([trajectory[name][i] for name in ("positions", *extra)], axis=1)
            for symbol, row in zip(symbols, columns, strict=True):
                numbers = [f"{x:.{d}f}" for x, d in zip(row, decimals, strict=True)]
                file.write(" ".join([symbol, *numbers]) + "\n")
    print(f"{path.name}: {len(index)} frames, {path.stat().st_size / 1e3:.0f} kB")


def cut(molecule: str, trajectory_file: Path, out: Path) -> None:
    """Cut the extxyz files from a trajectory: first half to learn from, second half to evaluate on."""
    with np.load(trajectory_file) as file:
        trajectory = {key: file[key] for key in ("z", "dt_fs", "T")}
        trajectory |= {"positions": file["R"], "REF_energy": file["E"], "REF_forces": file["F"]}
        velocities = file["V"].astype("f8") / units.fs
    trajectory["momenta"] = atomic_masses[trajectory["z"]][:, None] * velocities

    n_frames = len(trajectory["positions"])
    if n_frames < MIN_FRAMES:
        raise SystemExit(f"{trajectory_file} has {n_frames} frames; {MIN_FRAMES} are needed")
    half = n_frames // 2
    learn = int((1 - GAP) * half)
    train = evenly(0, learn, 50)
    between = np.setdiff1d((train[:-1] + train[1:]) // 2, train)
    valid = between[evenly(0, len(between), 20)]

    out.mkdir(parents=True, exist_ok=True)
    write_extxyz(out / f"{molecule}_train.extxyz", trajectory, train, "REF_forces")
    write_extxyz(out / f"{molecule}_valid.extxyz", trajectory, valid, "REF_forces")
    write_extxyz(out / f"{molecule}_target.extxyz", trajectory, evenly(0, learn, 200))
    heldout, reference = evenly(half, n_frames, 64), evenly(half, n_frames, 400)
    write_extxyz(out / f"{molecule}_heldout.extxyz", trajectory, heldout, "REF_forces", "momenta")
    write_extxyz(out / f"{molecule}_reference.extxyz", trajectory, reference)


def main() -> None:
    """Command line: ``simulate`` or ``slice``."""
    parser = argparse.ArgumentParser(description="Remake the data of a molecule.")
    parser.add_argument("molecule", choices=sorted(FRAMES))
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("simulate", help="run the GFN2-xTB trajectory")
    run.add_argument("--out", type=Path, required=True, help="the npz file to write")
    run.add_argument("--frames", type=int, help="one every 5 fs (default: 40 ps of aspirin, 20 of the peptide)")
    run.add_argument("--equilibration-ps", type=float, default=5.0, help="(default: %(default)s)")
    run.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    slices = commands.add_parser("slice", help="cut the extxyz files from a trajectory")
    slices.add_argument("--trajectory", type=Path, required=True, help="the npz file that simulate wrote")
    slices.add_argument("--out", type=Path, default=HERE, help="folder to write to (default: %(default)s)")
    args = parser.parse_args()
    if args.command == "simulate":
        simulate(args.molecule, args.out, args.frames or FRAMES[args.molecule], args.equilibration_ps, args.seed)
    else:
        cut(args.molecule, args.trajectory, args.out)


if __name__ == "__main__":
    main()
