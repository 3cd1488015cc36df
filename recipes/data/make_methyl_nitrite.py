"""Write the frames of methyl nitrite (GFN2-xTB) and the anchors that docs/results/chgnet.md uses: needs tblite."""

import numpy as np
from ase import units
from ase.build import bulk, molecule
from ase.io import write
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.optimize import BFGS
from tblite.ase import TBLite

TEMPERATURE_K = 500.0
TRAJECTORIES = [("reference", 40_000, 100), ("heldout", 8_000, 125), ("train", 20_000, 200)]
"""Name of the file, timesteps, and timesteps between two frames."""


def write_trajectories() -> None:
    """Write three trajectories of one molecule, each from velocities of its own."""
    for seed, (name, steps, every) in enumerate(TRAJECTORIES):
        atoms = molecule("CH3ONO")
        atoms.calc = TBLite(method="GFN2-xTB", verbosity=0)
        BFGS(atoms, logfile=None).run(fmax=0.05)
        MaxwellBoltzmannDistribution(atoms, temperature_K=TEMPERATURE_K, rng=np.random.default_rng(seed))
        dynamics = Langevin(
            atoms,
            0.5 * units.fs,
            temperature_K=TEMPERATURE_K,
            friction=0.002 / units.fs,
            rng=np.random.default_rng(100 + seed),
        )
        dynamics.run(2_000)
        frames = []
        for _ in range(steps // every):
            dynamics.run(every)
            frame = atoms.copy()
            frame.set_cell([12.0] * 3)
            frame.center()
            frame.pbc = True
            frames.append(frame)
        write(f"{name}.extxyz", frames)


def write_anchors() -> None:
    """Write rattled and strained cells of metals, semiconductors and salts."""
    crystals = [bulk(element) for element in ("Cu", "Al", "Fe", "W", "Na", "Mg")]
    crystals += [bulk("C", "diamond", 3.57), bulk("Ge", "diamond", 5.66), bulk("GaAs", "zincblende", 5.65)]
    crystals += [bulk("NaCl", "rocksalt", 5.64), bulk("MgO", "rocksalt", 4.21), bulk("LiF", "rocksalt", 4.03)]
    random, anchors = np.random.default_rng(0), []
    for crystal in crystals:
        for _ in range(20):
            atoms = crystal * (2, 2, 2)
            strain = random.normal(0.0, 0.02, (3, 3))
            atoms.set_cell(atoms.cell @ (np.eye(3) + 0.5 * (strain + strain.T)), scale_atoms=True)
            atoms.rattle(0.1, seed=int(random.integers(1_000_000_000)))
            anchors.append(atoms)
    write("anchors.extxyz", anchors)


if __name__ == "__main__":
    write_trajectories()
    write_anchors()
