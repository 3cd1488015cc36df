"""Bonds that chemistry gives, for molecules, crystals, slabs and ions."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import add_adsorbate, bulk, fcc111, graphene, molecule

from stable_plugin import System

# Bonds counted in the structural formula.
MOLECULES = {
    "H2": 1, "F2": 1, "N2": 1, "O2": 1, "Cl2": 1, "HF": 1, "HCl": 1, "CO": 1, "NO": 1, "LiH": 1, "LiF": 1, "NaCl": 1,
    "Li2": 1, "Na2": 1, "P2": 1, "S2": 1, "ClF": 1, "BeH": 1, "H2O": 2, "CO2": 2, "O3": 2, "SO2": 2, "HCN": 2,
    "F2O": 2, "NH3": 3, "PH3": 3, "BF3": 3, "AlCl3": 3, "ClF3": 3, "H2O2": 3, "CH4": 4, "SiH4": 4, "CF4": 4,
    "CCl4": 4, "C2H4": 5, "CH3OH": 5, "C2H6": 7, "Si2H6": 7, "CH3CH2OH": 8, "C4H4S": 9, "cyclobutane": 12, "C6H6": 12,
}  # fmt: skip

# Atoms of the framework.
CRYSTALS = {
    "silicon": bulk("Si"),
    "diamond": bulk("C", cubic=True),
    "copper": bulk("Cu", cubic=True),
    "lithium": bulk("Li", cubic=True),
    "molybdenum": bulk("Mo", cubic=True),
    "sodium chloride": bulk("NaCl", "rocksalt", a=5.64),
    "magnesium oxide": bulk("MgO", "rocksalt", a=4.21, cubic=True),
    "cesium chloride": bulk("CsCl", "cesiumchloride", a=4.12),
    "lithium hydride": bulk("LiH", "rocksalt", a=4.08, cubic=True),
    "calcium fluoride": bulk("CaF2", "fluorite", a=5.46),
    "gallium arsenide": bulk("GaAs", "zincblende", a=5.65),
}


def kinds(atoms):
    """Return the kind and the formula of each part."""
    parts = System.from_atoms(atoms).parts
    return sorted((part.kind, atoms[list(part.atoms)].get_chemical_formula()) for part in parts)


def slab(adsorbate, metal, height):
    """Return a molecule on a metal surface."""
    surface = fcc111(metal, (3, 3, 3), vacuum=8.0)
    add_adsorbate(surface, adsorbate, height)
    return surface


def solvated(*ions):
    """Return ions that six waters each surround, oxygen first where the ion is a cation."""
    system = Atoms(cell=[24.0] * 3, pbc=True)
    for index, ion in enumerate(ions):
        center = np.array([6.0 + 11.0 * index, 12.0, 12.0])
        system += Atoms(ion, [center])
        for direction in np.vstack([np.eye(3), -np.eye(3)]):
            water = molecule("H2O")
            water.positions -= water.positions[0]
            water.rotate([0, 0, -1], direction)
            water.positions += center + {"Cl": 3.2, "Mg": 2.1}.get(ion, 2.4) * direction
            system += water
    return system


@pytest.mark.parametrize(("name", "n_bonds"), MOLECULES.items(), ids=MOLECULES)
def test_bonds_of_molecules(name, n_bonds):
    system = System.from_atoms(molecule(name))
    assert len(system.bonds) == n_bonds
    assert [part.kind for part in system.parts] == ["molecule"]


@pytest.mark.parametrize("atoms", CRYSTALS.values(), ids=CRYSTALS)
def test_crystals_are_frameworks(atoms):
    system = System.from_atoms(atoms)
    assert system.is_extended
    assert len(system.bonds) == 0
    assert [part.kind for part in system.parts] == ["framework"]


def test_noble_gases_have_no_bonds():
    assert kinds(bulk("Ar", "fcc", a=3.0, cubic=True)) == [("atom", "Ar")] * 4
    xenon = Atoms("FXeF", [[0, 0, -1.98], [0, 0, 0], [0, 0, 1.98]])
    assert kinds(xenon) == [("molecule", "F2Xe")]


@pytest.mark.parametrize("ion", ["Li", "Na", "K", "Mg", "Ca", "Cl"])
def test_ions_have_no_bonds_to_water(ion):
    assert kinds(solvated(ion)) == [("ion", ion), *[("molecule", "H2O")] * 6]


def test_solvated_contact_pair_has_no_bond():
    pair = solvated("Na")
    del pair[[1, 2, 3]]
    pair += Atoms("Cl", [pair.positions[0] + [2.8, 0, 0]])
    assert kinds(pair) == [("ion", "Cl"), ("ion", "Na"), *[("molecule", "H2O")] * 5]


@pytest.mark.parametrize(
    ("atoms", "n_bonds", "expected"),
    [
        (slab(molecule("CO"), "Pt", 3.0), 1, [("framework", "Pt27"), ("molecule", "CO")]),
        (slab(Atoms("CO", [[0, 0, 0], [0, 0, 1.15]]), "Pt", 1.85), 1, [("framework", "Pt27"), ("molecule", "CO")]),
        (slab(molecule("H2O"), "Cu", 2.2), 2, [("framework", "Cu27"), ("molecule", "H2O")]),
        (slab(molecule("CH3OH"), "Cu", 2.2), 5, [("framework", "Cu27"), ("molecule", "CH4O")]),
        (slab("O", "Pt", 1.3), 0, [("framework", "OPt27")]),
    ],
    ids=["CO above Pt", "CO bound to Pt", "water on Cu", "methanol on Cu", "oxygen on Pt"],
)
def test_molecules_on_slabs_are_parts(atoms, n_bonds, expected):
    assert kinds(atoms) == expected
    assert len(System.from_atoms(atoms).bonds) == n_bonds


def test_molecule_above_graphene_is_a_part():
    sheet = graphene(size=(4, 4, 1), vacuum=8.0)
    sheet.pbc = [True, True, False]
    water = molecule("H2O")
    water.translate(sheet.positions.mean(axis=0) + np.array([0, 0, 3.2]))
    assert kinds(sheet + water) == [("framework", "C32"), ("molecule", "H2O")]


def test_metal_cluster_is_a_framework():
    assert kinds(bulk("Au", cubic=True) * 1 + Atoms()) == [("framework", "Au4")]
    cluster = fcc111("Au", (3, 3, 2))
    cluster.pbc = False
    assert kinds(cluster) == [("framework", "Au18")]


def test_complex_keeps_bonds_of_metal_and_ligands():
    complex_ = solvated("Zn")
    # Six Zn-O bonds of 2.1 Å, and two O-H bonds of each water.
    complex_.positions[1:] -= np.repeat(0.3 * np.vstack([np.eye(3), -np.eye(3)]), 3, axis=0)
    assert len(System.from_atoms(complex_).bonds) == 18


def test_bonds_do_not_depend_on_wrapping():
    box = solvated("Na", "Cl")
    shifted = box.copy()
    shifted.positions += [9.0, 13.0, 17.0]
    wrapped = shifted.copy()
    wrapped.wrap()
    expected = System.from_atoms(box).bonds.tolist()
    assert len(expected) == 24
    assert System.from_atoms(shifted).bonds.tolist() == expected
    assert System.from_atoms(wrapped).bonds.tolist() == expected


def test_molecule_across_the_boundary_is_not_extended():
    chain = molecule("C2H6")
    chain.cell, chain.pbc = [8.0] * 3, True
    chain.wrap()
    assert kinds(chain) == [("molecule", "C2H6")]


def test_stretched_hydrogen_is_bonded():
    methane = molecule("CH4")
    for length, n_bonds in ((1.40, 4), (1.55, 4), (1.70, 3)):
        methane.set_distance(0, 1, length, fix=0)
        assert len(System.from_atoms(methane).bonds) == n_bonds
