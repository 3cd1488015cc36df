"""Properties of systems that hold for any structure, cell and masses."""

import math

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from strategies import anything, check_argument_is_named, crystals, few, nearest_image_distances

from stable_plugin import Langevin, NoseHooverChain, System
from stable_plugin.md.geometry import MIN_DISTANCE_A, check_geometry
from stable_plugin.md.system import stack_positions
from stable_plugin.units import BOLTZMANN

WATER = molecule("H2O")


@few
@given(crystals(), st.data())
def test_check_geometry_rejects_overlapping_atoms(atoms, data):
    check_geometry(atoms, "x")
    images = data.draw(arrays(int, 3, elements=st.integers(-3, 3))) * atoms.pbc
    overlapping = atoms.copy()
    overlapping.positions[-1] = atoms.positions[0] + images @ atoms.cell.array
    overlapping.positions[-1] += data.draw(arrays(float, 3, elements=st.floats(-0.3, 0.3))) * MIN_DISTANCE_A
    with pytest.raises(ValueError, match=r"^x\[2\] has two atoms at the same place"):
        check_geometry(overlapping, "x[2]")


@few
@given(crystals())
def test_distances_are_minimum_image_within_cutoff(atoms):
    system = System.from_atoms(atoms, bonds=[])
    pairs = torch.combinations(torch.arange(len(atoms)), 2)
    found = system.distances(torch.tensor(atoms.positions), pairs).numpy()
    nearest = nearest_image_distances(atoms, n_images=5)
    within = nearest < system.minimum_image_cutoff
    np.testing.assert_allclose(found[within], nearest[within], atol=1e-9)
    assert (found >= nearest - 1e-9).all()


@few
@given(crystals(), st.permutations([0, 1, 2]), st.data())
def test_bonds_ignore_images_and_order_of_axes(atoms, order, data):
    images = data.draw(arrays(int, (len(atoms), 3), elements=st.integers(-3, 3))) * atoms.pbc
    order = list(order)
    moved = Atoms(
        atoms.numbers, atoms.positions + images @ atoms.cell.array, cell=atoms.cell.array[order], pbc=atoms.pbc[order]
    )
    first, second = System.from_atoms(atoms), System.from_atoms(moved)
    assert first.bonds.tolist() == second.bonds.tolist()
    assert first.is_extended == second.is_extended
    assert first.molecules.tolist() == second.molecules.tolist()
    assert (
        first.minimum_image_cutoff == pytest.approx(second.minimum_image_cutoff)
        or first.minimum_image_cutoff == second.minimum_image_cutoff == math.inf
    )


@few
@given(crystals(), st.data())
def test_atoms_returns_the_structure(atoms, data):
    masses = data.draw(arrays(float, len(atoms), elements=st.floats(0.5, 300.0)))
    atoms.set_masses(masses)
    system = System.from_atoms(atoms)
    back = system.atoms(torch.tensor(atoms.positions))
    np.testing.assert_array_equal(back.positions, atoms.positions)
    np.testing.assert_array_equal(back.get_masses(), masses)
    assert back.get_chemical_symbols() == atoms.get_chemical_symbols() and (back.pbc == atoms.pbc).all()
    assert stack_positions([back], system, "back").shape == (1, len(atoms), 3)


@few
@given(st.floats() | st.integers(-5, 5))
@example(0.0)
@example(math.nan)
def test_from_atoms_rejects_invalid_masses(mass):
    atoms = molecule("H2O")
    atoms.set_masses([16.0, mass, 1.0])
    if math.isfinite(mass) and mass > 0:
        assert System.from_atoms(atoms).masses[1] == mass
    else:
        with pytest.raises(ValueError, match="without a mass"):
            System.from_atoms(atoms)


@few
@given(arrays(float, 3, elements=st.floats(0.5, 300.0)), st.floats(1.0, 2000.0), st.integers(0, 2**63 - 2))
def test_initial_velocities_scale_with_temperature(masses, temperature_K, seed):
    def drawn(masses, temperature_K):
        generator = torch.Generator().manual_seed(seed)
        return Langevin(temperature_K).initial_velocities((4, 3, 3), torch.tensor(masses), generator)

    scale = np.sqrt(BOLTZMANN * temperature_K / masses)[:, None]
    unit = drawn(np.full(3, BOLTZMANN * 300.0), 300.0)
    np.testing.assert_allclose(drawn(masses, temperature_K).numpy(), unit.numpy() * scale, rtol=1e-9)


def test_with_electrons_fills_in_missing_values():
    charged = WATER.copy()
    charged.info["charge"] = 1
    neutral, stated = System.from_atoms(WATER).with_electrons(0, 1), System.from_atoms(charged).with_electrons(0, 2)
    assert (neutral.charge, neutral.spin) == (0, 1)
    assert (stated.charge, stated.spin) == (1, 2)


def test_stack_positions_rejects_bad_frames():
    system = System.from_atoms(WATER)
    with pytest.raises(ValueError, match=r"reference contains no frame: pass at least one structure"):
        stack_positions([], system, "reference")
    charged, other = WATER.copy(), WATER.copy()
    charged.info["charge"], other.info["charge"] = 1, 0
    with pytest.raises(ValueError, match=r"reference\[1\] has charge=0, but the simulated system has charge=1"):
        stack_positions([charged, other], System.from_atoms(charged), "reference")
    invalid = WATER.copy()
    invalid.positions[0, 0] = np.nan
    with pytest.raises(ValueError, match=r"reference\[0\] has non-finite positions"):
        stack_positions([invalid], system, "reference")
    fractional = WATER.copy()
    fractional.info["charge"] = 0.5
    with pytest.raises(ValueError, match=r"atoms\.info\['charge'\]=0\.5: set a whole number"):
        System.from_atoms(fractional)


@pytest.mark.parametrize(
    ("kind", "name", "also"),
    [
        *((Langevin, name, None) for name in ("temperature_K", "friction_per_ps")),
        (Langevin, "timestep_fs", None),
        *((NoseHooverChain, name, None) for name in ("temperature_K", "relaxation_fs", "chain_length")),
        (NoseHooverChain, "timestep_fs", "relaxation_fs"),
    ],
    ids=lambda each: getattr(each, "__name__", each),
)
@settings(few, max_examples=15)
@given(value=anything)
@example(value=math.nan)
@example(value=10**30)
@example(value="1")
def test_integrator_names_any_invalid_argument(kind, name, also, value):
    check_argument_is_named(kind, name, value, also)
