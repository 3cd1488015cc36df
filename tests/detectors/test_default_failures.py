"""Everything that can go wrong in a simulation is caught by the default detector, and told by its atoms."""

from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import add_adsorbate, bulk, fcc111, molecule
from ase.io import read
from detector_tools import water_box

from stable_plugin import Langevin, System
from stable_plugin.defaults import default_detector
from stable_plugin.md.system import stack_positions

TEMPERATURE_K = 300.0

ROOT = Path(__file__).parents[2]

DATA = ROOT / "recipes" / "data"


class Watched:
    """A system with its default detector, bound to thermal copies of one structure."""

    def __init__(self, atoms, scale=0.02, n_frames=20, temperature_K=TEMPERATURE_K):
        frames = [atoms.copy() for _ in range(n_frames)]
        for index, frame in enumerate(frames):
            frame.rattle(scale, seed=index)
        self.system = System.from_frames(frames)
        self.reference = stack_positions(frames, self.system, "reference")
        self.detector = default_detector(self.system, self.reference, Langevin(temperature_K))
        self.detector.bind(self.system, self.reference)
        generator = torch.Generator().manual_seed(0)
        self.velocities = Langevin(temperature_K).initial_velocities((1, len(atoms), 3), self.system.masses, generator)

    def failure(self, positions, velocities=None):
        """Return what the detector says of positions, None if they are stable."""
        positions = torch.as_tensor(np.asarray(positions), dtype=torch.float64)[None]
        velocities = self.velocities if velocities is None else velocities
        if not self.detector.classify(positions, velocities)[0].item():
            return None
        return self.detector.describe(positions, velocities)[0]


def test_a_gas_of_atoms():
    watched = Watched(water_box())
    gas = np.random.default_rng(1).uniform(0, 6.4, size=(24, 3))
    assert watched.failure(water_box().positions) is None
    assert watched.failure(gas).startswith("bond ")


def test_a_crystal_that_melts():
    copper = bulk("Cu", cubic=True) * 3
    watched = Watched(copper, scale=0.08)
    molten = copper.copy()
    molten.rattle(0.35, seed=3)  # a Lindemann ratio of 0.24
    distances = molten.get_all_distances(mic=True) + 9 * np.eye(len(copper))
    assert distances.min() < 2.0
    described = watched.failure(molten.positions)
    assert described is not None
    # The sites alone notice it, where no two atoms come close.
    sites = next(part for part in watched.detector.detectors if type(part).__name__ == "LindemannCriterion")
    positions = torch.tensor(molten.positions)[None]
    assert sites.classify(positions, watched.velocities)[0].item()


def test_two_atoms_of_a_metal_that_collide():
    copper = bulk("Cu", cubic=True) * 2
    positions = copper.positions.copy()
    positions[1] = positions[0] + [0.2, 0.0, 0.0]
    assert Watched(copper).failure(positions).startswith("contact Cu0-Cu1 0.2 Å, limit ")


def test_a_stereo_center_that_flips():
    # CHFClBr is chiral: its mirror image has the same bonds and angles.
    atoms = Atoms(
        "CHFClBr", positions=[[0, 0, 0], [0.63, 0.63, 0.63], [-0.79, -0.79, 0.79], [1.0, -1.0, -1.0], [-1.1, 1.1, -1.1]]
    )
    watched = Watched(atoms)
    assert watched.failure(atoms.positions) is None
    assert watched.failure(atoms.positions * [1, 1, -1]).startswith("chirality C0-H1-F2-Cl3 ")


def test_a_planar_group_that_folds():
    planar = molecule("H2CO")
    watched = Watched(planar)
    folded = planar.positions.copy()
    carbon = planar.get_chemical_symbols().index("C")
    folded[carbon, 0] += 0.6  # the plane of the molecule is normal to x
    plane = next(part for part in watched.detector.detectors if type(part).__name__ == "PlaneLimits")
    positions = torch.tensor(folded)[None]
    assert plane.offending_atoms(positions, watched.velocities)[0][0] == carbon
    assert plane.classify(positions, watched.velocities)[0].item()
    assert not plane.classify(watched.reference, watched.velocities)[0].any()


def test_a_ring_that_folds():
    benzene = molecule("C6H6")
    watched = Watched(benzene)
    chair = benzene.positions.copy()
    chair[:6:2, 2] += 0.6  # every other carbon and its hydrogen
    chair[6::2, 2] += 0.6
    ring = next(part for part in watched.detector.detectors if type(part).__name__ == "RingLimits")
    positions = torch.tensor(chair)[None]
    assert ring.classify(positions, watched.velocities)[0].item()
    assert ring.describe(positions, watched.velocities)[0].startswith("ring torsion C")
    assert watched.failure(chair) is not None


def test_water_that_autoionizes():
    water = water_box()
    watched = Watched(water)
    positions = water.positions.copy()
    hydrogen, acceptor = 1, 3  # of the first molecule, and the oxygen of the second
    vector = positions[acceptor] - positions[0]
    positions[hydrogen] = positions[acceptor] - vector / np.linalg.norm(vector) * 0.98
    described = watched.failure(positions)
    assert described.startswith("bond O0-H1 ")
    assert "mean of the reference 0.96" in described


def test_two_molecules_that_exchange_a_hydrogen():
    water = water_box()
    watched = Watched(water)
    positions = water.positions.copy()
    positions[[1, 4]] = positions[[4, 1]]
    assert watched.failure(positions).startswith("bond ")


def test_an_adsorbate_that_dissociates():
    slab = fcc111("Pt", (3, 3, 2), vacuum=8.0)
    add_adsorbate(slab, Atoms("CO", [[0, 0, 0], [0, 0, 1.15]]), 1.9)
    watched = Watched(slab)
    positions = slab.positions.copy()
    positions[-1] += [2.5, 0.0, -1.0]
    assert watched.failure(slab.positions) is None
    assert watched.failure(positions).startswith("bond C18-O19 ")


def test_a_frozen_system_and_one_that_runs_away():
    watched = Watched(bulk("Cu", cubic=True) * 2)
    positions = watched.reference[0]
    assert watched.failure(positions, 0.1 * watched.velocities).startswith("kinetic temperature 3 K")
    assert watched.failure(positions, 2.0 * watched.velocities).startswith("kinetic temperature 1")
    assert watched.failure(positions) is None


def test_forces_that_do_not_add_up_to_zero():
    watched = Watched(molecule("CH3CH2OH"))
    # Slow enough for the temperature to stay within its limits.
    drifting = watched.velocities + torch.tensor([0.16, 0.0, 0.0], dtype=torch.float64)
    assert watched.failure(watched.reference[0], drifting).startswith("center of mass ")


def test_atoms_of_a_molecule_that_collide():
    hexane = molecule("C3H8")
    watched = Watched(hexane)
    # Two hydrogens of the methyl groups, more than two bonds apart.
    first, second = 3, 9
    apart = hexane.get_distance(first, second)
    assert apart > 2.0
    positions = hexane.positions.copy()
    positions[second] = positions[first] + [0.9, 0.0, 0.0]
    contacts = next(part for part in watched.detector.detectors if type(part).__name__ == "ContactLimits")
    moved = torch.tensor(positions)[None]
    assert contacts.describe(moved, watched.velocities)[0].startswith("contact H")
    assert watched.failure(positions) is not None


@pytest.mark.parametrize(("name", "temperature_K"), [("aspirin", 500.0), ("peptide", 500.0), ("water", 300.0)])
@pytest.mark.parametrize("n_reference", [10, 50])
def test_no_false_alarm_on_held_out_frames(name, temperature_K, n_reference):
    frames, held_out = (read(DATA / f"{name}_{part}.extxyz", ":") for part in ("train", "heldout"))
    system = System.from_frames(frames[:n_reference])
    reference, positions = (stack_positions(each, system, "frames") for each in (frames[:n_reference], held_out))
    detector = default_detector(system, reference, Langevin(temperature_K))
    detector.bind(system, reference)
    generator = torch.Generator().manual_seed(0)
    velocities = Langevin(temperature_K).initial_velocities(positions.shape, system.masses, generator)
    assert not detector.classify(positions, velocities)[0].any()


REAL = ROOT.parent / "shared" / "data"


@pytest.mark.skipif(not REAL.is_dir(), reason="public data that is not part of the project")
class TestRealData:
    """At most one frame in 10,000 of reference trajectories is flagged, and the failing one of a public model is."""

    @pytest.mark.parametrize(
        ("name", "temperature_K"),
        [
            ("aspirin_gfn2_500K", 500.0),
            ("peptide_gfn2_500K", 500.0),
            ("water_spcfw_300K", 300.0),
            ("real/rmd17_aspirin", 500.0),
            ("real/water_pbe0ts_64", 300.0),
            ("real/dmc_gfn2_1200K", 1200.0),
        ],
    )
    def test_reference_is_stable(self, name, temperature_K):
        detector, frames = self.halves(name, temperature_K)
        generator = torch.Generator().manual_seed(0)
        masses = detector.detectors[-1]._masses
        velocities = Langevin(temperature_K).initial_velocities(frames.shape, masses, generator)
        flagged = [detector.classify(*parts)[0] for parts in zip(frames.split(200), velocities.split(200), strict=True)]
        assert int(torch.cat(flagged).sum()) == 0

    def test_angles_of_the_tutorial_model_are_flagged(self):
        detector, _ = self.halves("real/dmc_gfn2_1200K", 1200.0)
        failing = torch.tensor(np.load(REAL / "real" / "dmc_mace02_failing_1200K.npz")["R"])
        masses = detector.detectors[-1]._masses
        generator = torch.Generator().manual_seed(0)
        velocities = Langevin(1200.0).initial_velocities(failing.shape, masses, generator)
        unstable = detector.classify(failing, velocities)[0]
        assert unstable.double().mean() > 0.5
        described = detector.describe(failing[unstable], velocities[unstable])
        assert sum(text.startswith("angle ") for text in described) > 0.9 * len(described)

    def halves(self, name, temperature_K):
        """Return the default detector of the first half of a trajectory, and the second half."""
        data = np.load(REAL / f"{name}.npz")
        atoms = Atoms(data["z"])
        if "cell" in data:
            atoms.set_cell(data["cell"] if data["cell"].ndim == 2 else data["cell"][0])
            atoms.pbc = True
        positions = torch.tensor(data["R"][:: 4 if name.startswith("water") else 1], dtype=torch.float64)
        first, second = positions.split((len(positions) + 1) // 2)
        frames = [atoms.copy() for _ in range(50)]
        for frame, moved in zip(frames, first[:: len(first) // 50], strict=False):
            frame.positions = moved.numpy()
        system = System.from_frames(frames)
        detector = default_detector(system, first[::4], Langevin(temperature_K))
        detector.bind(system, first[::4])
        return detector, second
