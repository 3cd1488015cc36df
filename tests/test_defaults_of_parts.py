"""Defaults of everything that people simulate: molecules, gases, crystals, slabs, ions, mixtures."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import add_adsorbate, bulk, fcc111, graphene, molecule
from ase.constraints import FixAtoms
from ase.units import kB

from stable_plugin import Langevin, System, TemperatureLimits
from stable_plugin.config import SystemConfig
from stable_plugin.defaults import choose
from stable_plugin.md.system import stack_positions

TEMPERATURE_K = 300.0


def thermal(atoms, n_frames=6, scale=0.02):
    """Return copies with random displacements."""
    frames = [atoms.copy() for _ in range(n_frames)]
    for index, frame in enumerate(frames):
        frame.rattle(scale, seed=index)
    return frames


def on_slab(adsorbate, metal="Pt", height=1.9):
    """Return a molecule on a metal surface."""
    surface = fcc111(metal, (3, 3, 3), vacuum=8.0)
    add_adsorbate(surface, adsorbate, height)
    return surface


def together(*names, spacing=4.0, box=None):
    """Return molecules or atoms in a row, isolated or in a periodic box."""
    system = Atoms() if box is None else Atoms(cell=[box] * 3, pbc=True)
    for index, name in enumerate(names):
        part = molecule(name) if name not in ("Na", "Cl", "Ar", "K") else Atoms(name, [[0, 0, 0]])
        part.positions += [spacing * index, 0, 0]
        system += part
    return system


def boxed(atoms, side=12.0):
    """Return a structure in a periodic box."""
    atoms.cell, atoms.pbc = [side] * 3, True
    return atoms


def above_graphene():
    sheet = graphene(size=(4, 4, 1), vacuum=8.0)
    sheet.pbc = [True, True, False]
    water = molecule("H2O")
    water.translate(sheet.positions.mean(axis=0) + np.array([0, 0, 3.2]))
    return sheet + water


SYSTEMS = {
    "hydrogen": molecule("H2"),
    "fluorine": molecule("F2"),
    "nitrogen in a box": boxed(molecule("N2")),
    "sodium chloride molecule": molecule("NaCl"),
    "methane": molecule("CH4"),
    "methane in a box": boxed(molecule("CH4")),
    "argon gas": together(*["Ar"] * 4, spacing=9.0, box=36.0),
    "argon cluster": together(*["Ar"] * 4, spacing=3.8),
    "argon crystal": bulk("Ar", "fcc", a=5.3, cubic=True) * 2,
    "one argon and a molecule": together("Ar", "H2O", box=12.0),
    "silicon": bulk("Si", cubic=True),
    "primitive silicon": bulk("Si"),
    "lithium": bulk("Li", cubic=True) * 2,
    "molybdenum": bulk("Mo", cubic=True) * 2,
    "sodium chloride": bulk("NaCl", "rocksalt", a=5.64, cubic=True),
    "metal slab": fcc111("Cu", (3, 3, 3), vacuum=8.0),
    "metal cluster": Atoms(fcc111("Au", (3, 3, 2)), pbc=False),
    "CO on platinum": on_slab(Atoms("CO", [[0, 0, 0], [0, 0, 1.15]])),
    "water on copper": on_slab(molecule("H2O"), "Cu", 2.3),
    "waters on copper": on_slab(together("H2O", "H2O"), "Cu", 3.0),
    "water above graphene": above_graphene(),
    "ions in water": together("Na", "H2O", "H2O", "Cl", "H2O", box=20.0, spacing=3.9),
    "ion in vacuum with water": together("K", "H2O", spacing=2.8),
    "dimer": together("CH3OH", "CH3OH", spacing=5.0),
    "mixture": together("CH3OH", "H2O", "CH3CN", spacing=5.0),
    "gases": together("H2", "N2", spacing=4.0, box=12.0),
    "one of each": together("H2O", "CO2", spacing=4.0, box=12.0),
}  # fmt: skip


def chosen(frames):
    """Return system, reference, velocities at rest in the thermostat, and what is chosen for them."""
    system = System.from_frames(frames)
    reference = stack_positions(frames, system, "reference")
    velocities = Langevin(TEMPERATURE_K).initial_velocities(
        reference.shape, system.masses, torch.Generator().manual_seed(0)
    )
    return system, reference, velocities.to(reference), choose(SystemConfig(), system, reference)


@pytest.mark.parametrize("atoms", SYSTEMS.values(), ids=SYSTEMS)
def test_defaults_flag_nothing_in_a_stable_system(atoms):
    _, reference, velocities, choices = chosen(thermal(atoms))
    unstable, discarded = choices.detector.classify(reference, velocities)
    assert not unstable.any()
    assert not discarded.any()
    for observable in choices.observables:
        observable.update(reference)
        assert observable.compute().reshape(-1).shape == observable.known_target.shape
        assert observable.mean_absolute_error() == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("atoms", SYSTEMS.values(), ids=SYSTEMS)
def test_defaults_flag_hot_broken_and_collided_systems(atoms):
    system, reference, velocities, choices = chosen(thermal(atoms))
    flagged = []
    for first, second in system.bonds.tolist():
        pulled = reference[:1].clone()
        vector = system.separations(pulled, torch.tensor([[second, first]]))[0, 0]
        pulled[0, second] += (3.0 - vector.norm()) / vector.norm() * vector
        flagged.append(choices.detector.classify(pulled, velocities[:1])[0].item())
    for part, other in pairwise(system.parts):
        collided = reference[:1].clone()
        collided[0, other.atoms[0]] = collided[0, part.atoms[0]] + torch.tensor([0.4, 0.0, 0.0])
        flagged.append(choices.detector.classify(collided, velocities[:1])[0].item())
    if system.is_extended or len(system.bonds) == 0:
        flagged.append(choices.detector.classify(reference[:1], 3.0 * velocities[:1])[0].item())
    assert flagged
    assert all(flagged)


MOLECULE = "BondLimits AngleLimits"
ALWAYS = "TemperatureLimits MomentumLimits"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hydrogen", f"BondLimits {ALWAYS}"),
        ("methane", f"{MOLECULE} ChiralityLimits {ALWAYS}"),
        ("dimer", f"{MOLECULE} ChiralityLimits ContactLimits {ALWAYS}"),
        ("argon gas", f"ContactLimits {ALWAYS}"),
        ("ions in water", f"{MOLECULE} ContactLimits {ALWAYS}"),
        ("silicon", f"ContactLimits LindemannCriterion {ALWAYS}"),
        ("CO on platinum", f"BondLimits ContactLimits {ALWAYS}"),
    ],
)
def test_default_detector_follows_the_parts(name, expected):
    detector = chosen(thermal(SYSTEMS[name]))[-1].detector
    assert " ".join(type(part).__name__ for part in detector.detectors) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("methane in a box", "bond_lengths bond_amplitudes"),
        ("argon crystal", "radial_distribution_Ar_Ar"),
        ("metal slab", "distance_distribution"),
        ("water above graphene", "bond_lengths bond_amplitudes"),
        ("dimer", "local_bond_lengths local_bond_amplitudes local_contacts local_contact_amplitudes"),
    ],
)
def test_default_observables_follow_the_parts(name, expected):
    *_, choices = chosen(thermal(SYSTEMS[name]))
    assert " ".join(observable.name for observable in choices.observables) == expected


def test_contact_distance_of_a_dilute_gas():
    _, reference, velocities, choices = chosen(thermal(SYSTEMS["argon gas"]))
    unstable = []
    for distance in (2.0, 2.3, 4.0):
        moved = reference[:1].clone()
        moved[0, 1] = moved[0, 0] + torch.tensor([0.0, 0.0, distance])
        unstable.append(choices.detector.classify(moved, velocities[:1])[0].item())
    # 0.6 of two van der Waals radii of 1.88 Å, and not a fraction of the 9 Å that the atoms are apart.
    assert unstable == [True, False, False]


def test_default_detector_tolerates_a_hot_reference():
    *_, choices = chosen(thermal(molecule("CH4"), 50, scale=0.1))
    bonds = choices.detector.detectors[0]
    lengths = [frame.get_distance(0, 1) for frame in thermal(molecule("CH4"), 500, scale=0.1)]
    stretched = torch.tensor(molecule("CH4").positions)[None]
    stretched[0, 1] *= max(lengths) / 1.09
    assert not bonds.classify(stretched, torch.zeros_like(stretched))[0]


@pytest.mark.parametrize("n_frames", [10, 60])
def test_default_detector_reports_a_broken_reference(n_frames):
    frames = thermal(molecule("CH4"), n_frames)
    frames[4].set_distance(0, 1, 3.0, fix=0)
    with pytest.raises(ValueError, match=rf"1 of {n_frames} reference frames are unstable.*frame 4"):
        chosen(frames)


MLEARN = Path(__file__).parents[2] / "shared" / "data" / "real"


@pytest.mark.skipif(not MLEARN.is_dir(), reason="public data that is not part of the project")
@pytest.mark.parametrize("element", ["Si", "Li", "Mo"])
def test_defaults_of_real_crystals(element):
    groups = {}
    for entry in json.loads((MLEARN / f"mlearn_{element}.json").read_text()):
        atoms = Atoms(f"{element}{len(entry['frac'])}", scaled_positions=entry["frac"], cell=entry["lattice"], pbc=True)
        groups.setdefault((len(atoms), entry["group"]), []).append(atoms)
    for frames in groups.values():
        if len(frames[0]) > 1:
            same_cell = [frame for frame in frames if np.allclose(frame.cell, frames[0].cell)][:5]
            system, reference, velocities, choices = chosen(same_cell)
            assert system.is_extended
            assert not choices.detector.classify(reference, velocities)[0].any()


def test_fixed_atoms_do_not_count_in_the_temperature():
    frames = thermal(bulk("Cu", cubic=True) * 2)
    for frame in frames:
        frame.set_constraint(FixAtoms(range(4, 32)))
    system = System.from_frames(frames).with_fixed(frames, frames)
    reference = torch.tensor(np.stack([frame.positions for frame in frames]))
    detector = TemperatureLimits(TEMPERATURE_K)
    detector.bind(system, reference)
    few = torch.zeros_like(reference)
    few[:, :4] = ((kB * 700.0) / system.masses[:4]).sqrt()[:, None]  # 700 K, which 32 atoms would not reach
    assert not detector.classify(reference, few)[0].any()
