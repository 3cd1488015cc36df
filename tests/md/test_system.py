"""The simulated system."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

from stable_plugin import System
from stable_plugin.md.system import stack_positions


def pairs(system):
    return {tuple(pair) for pair in system.bonds.tolist()}


def test_from_atoms_water():
    system = System.from_atoms(molecule("H2O"))
    assert system.symbols == ("O", "H", "H")
    assert system.n_atoms == 3
    assert pairs(system) == {(0, 1), (0, 2)}
    assert system.angles.tolist() == [[1, 0, 2]]
    assert system.bond_labels == ["O0-H1", "O0-H2"]
    assert system.numbers.tolist() == [8, 1, 1]
    assert system.masses.dtype == torch.float64
    assert torch.allclose(system.masses, torch.tensor([15.999, 1.008, 1.008], dtype=torch.float64))


def test_from_atoms_bonds_of_thermal_aspirin(aspirin_frames):
    expected = pairs(System.from_atoms(aspirin_frames[0]))
    # C9H8O4 with one ring: as many bonds as atoms.
    assert len(expected) == 21
    for frame in aspirin_frames:
        assert pairs(System.from_atoms(frame)) == expected


def test_from_atoms_benzene():
    system = System.from_atoms(molecule("C6H6"))
    assert len(system.bonds) == 12
    assert len(system.angles) == 6 * 3
    centers = system.angles[:, 1].tolist()
    assert sorted(set(centers)) == [i for i, symbol in enumerate(system.symbols) if symbol == "C"]
    for first, center, second in system.angles.tolist():
        assert {(min(first, center), max(first, center)), (min(second, center), max(second, center))} <= pairs(system)


def test_from_atoms_without_bonds():
    system = System.from_atoms(Atoms("Ar2", positions=[[0, 0, 0], [0, 0, 9.0]]))
    assert system.bonds.shape == (0, 2)
    assert system.angles.shape == (0, 3)
    assert system.bond_labels == []


def test_from_atoms_explicit_bonds_are_sorted():
    system = System.from_atoms(molecule("H2O"), bonds=[(2, 1), (1, 2), (1, 0)])
    assert system.bonds.tolist() == [[0, 1], [1, 2]]


@pytest.mark.parametrize("bond", [(0, 3), (1, 1), (-1, 0)])
def test_from_atoms_rejects_invalid_bonds(bond):
    with pytest.raises(ValueError, match=r"bonds contains .*pass pairs of different atoms from 0 to 2"):
        System.from_atoms(molecule("H2O"), bonds=[bond])


def periodic_without_a_cell():
    return Atoms("H2O", positions=molecule("H2O").positions, pbc=[True, False, False])


def not_finite():
    atoms = molecule("H2O")
    atoms.positions[1, 2] = np.nan
    return atoms


def without_mass():
    atoms = molecule("H2O")
    atoms.set_masses([16.0, 0.0, 1.0])
    return atoms


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (periodic_without_a_cell, r"periodic \(pbc=\[True, False, False\]\).*set atoms\.cell, or atoms\.pbc = False"),
        (lambda: Atoms("H"), r"1 atom\(s\): pass structures of at least two"),
        (lambda: bulk("Cu"), r"one atom of Cu in a periodic cell.*no force acts.*atoms\.repeat\(3\)"),
        (not_finite, r"non-finite positions"),
        (without_mass, r"without a mass.*set_masses"),
    ],
)
def test_from_atoms_rejects_invalid_structures(make, message):
    with pytest.raises(ValueError, match=message):
        System.from_atoms(make())


def test_from_atoms_keeps_masses():
    atoms = molecule("H2O")
    atoms.set_masses([16.0, 2.014, 2.014])
    assert System.from_atoms(atoms).masses.tolist() == [16.0, 2.014, 2.014]


def test_to_changes_only_the_dtype_of_floats():
    system = System.from_atoms(molecule("H2O"))
    moved = system.to("cpu", torch.float32)
    assert moved.masses.dtype == torch.float32
    assert moved.bonds.dtype == moved.numbers.dtype == torch.long
    assert system.masses.dtype == torch.float64
    assert moved.symbols == system.symbols


def test_atoms_round_trip():
    atoms = molecule("CH3CH2OH")
    atoms.set_masses(np.linspace(1.0, 9.0, len(atoms)))
    atoms.set_velocities(np.random.default_rng(0).normal(size=(len(atoms), 3)))
    system = System.from_atoms(atoms)
    frame = system.atoms(torch.tensor(atoms.positions), torch.tensor(atoms.get_velocities()))
    assert frame.get_chemical_symbols() == atoms.get_chemical_symbols()
    np.testing.assert_array_equal(frame.positions, atoms.positions)
    np.testing.assert_allclose(frame.get_velocities(), atoms.get_velocities(), rtol=1e-12)
    np.testing.assert_array_equal(frame.get_masses(), atoms.get_masses())
    assert not frame.pbc.any()


def test_stack_positions_is_double_precision(aspirin_frames):
    stacked = stack_positions(aspirin_frames[:3], System.from_atoms(aspirin_frames[0]), "structures")
    assert stacked.shape == (3, 21, 3)
    assert stacked.dtype == torch.float64
    np.testing.assert_array_equal(stacked[2].numpy(), aspirin_frames[2].positions)


def reordered(atoms):
    return atoms[[1, 0, 2]]


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], r"reference contains no frame: pass at least one"),
        ([molecule("H2O"), molecule("NH3")], r"reference\[1\] is H3N, but the simulated system is H2O"),
        ([reordered(molecule("H2O"))], r"reference\[0\] is H2O, .*in the same order"),
        ([molecule("H2O"), not_finite()], r"reference\[1\] has non-finite positions"),
    ],
)
def test_stack_positions_rejects_other_frames(frames, message):
    with pytest.raises(ValueError, match=message):
        stack_positions(frames, System.from_atoms(molecule("H2O")), "reference")


def test_system_repr_shows_arguments():
    assert repr(System.from_atoms(molecule("H2O"))) == (
        "System(H2O, n_bonds=2, cell=None, pbc=(False, False, False), charge=None, spin=None, is_extended=False)"
    )
    crystal = Atoms("Cu", positions=[[0, 0, 0]], cell=[2.5] * 3, pbc=True).repeat((2, 1, 1))
    shown = repr(System.from_atoms(crystal))
    assert "cell=[[5.0, 0.0, 0.0], [0.0, 2.5, 0.0], [0.0, 0.0, 2.5]], pbc=(True, True, True)" in shown
    assert "is_extended=True" in shown
