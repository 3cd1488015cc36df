"""Holes at known places are found and named; without them there are none."""

import json

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.units import kB
from force_fields import ForceField

from stable_plugin import System
from stable_plugin.evaluation import check_potential
from stable_plugin.evaluation.preflight.fragments import Fragments
from stable_plugin.evaluation.preflight.holes import hole_of
from stable_plugin.evaluation.preflight.scans import Scan, Scanner

ETHANOL = molecule("CH3CH2OH")
KT = 300.0 * kB


def rattled(atoms, n_frames=12, seed=0):
    rng = np.random.default_rng(seed)
    frames = [atoms.copy() for _ in range(n_frames)]
    for frame in frames:
        frame.positions += rng.normal(scale=0.03, size=frame.positions.shape)
    return frames


def water_pair():
    pair = molecule("H2O") + molecule("H2O")
    pair.positions[3:] += [0.0, 0.0, 3.2]
    return pair


@pytest.fixture(scope="module")
def frames():
    return rattled(ETHANOL)


def holes_of(found, kind):
    (scan,) = [each for each in found.scans if each.kind == kind]
    return scan


def test_sound_field_has_no_hole(frames):
    found = check_potential(ForceField(ETHANOL), frames, n_frames=3)
    assert found.n_holes == 0 and not any("hole" in problem for problem in found.problems)
    assert {scan.kind: scan.n_scans for scan in found.scans}["bond"] == 3 * 8
    assert all(scan.n_out_of_reach == 0 for scan in found.scans)


@pytest.mark.parametrize(
    ("kind", "at", "width"),
    [("bond", 1.9, 0.1), ("angle", 62.0, 8.0)],
)
def test_hole_is_found_and_named(frames, kind, at, width):
    system = System.from_frames(frames)
    if kind == "bond":
        hole = next(bond for bond in system.bonds.tolist() if {system.symbols[i] for i in bond} == {"C", "O"})
    else:
        hole = next(triple for triple in system.angles.tolist() if system.symbols[triple[1]] == "O")
    name = system.label(hole)
    found = check_potential(ForceField(ETHANOL, hole, at, width, depth=3.0), frames, n_frames=3)
    scan = holes_of(found, kind)
    assert [each.atoms for each in scan.holes] == [name]
    assert scan.holes[0].value == pytest.approx(at, abs=1.2 * width)
    assert scan.holes[0].energy_eV < -0.5 and scan.n_holes == 3
    assert name in str(found) and any(f"{kind} scans" in problem for problem in found.problems)


def test_contact_hole_between_molecules():
    frames = rattled(water_pair())
    assert check_potential(ForceField(water_pair()), frames, n_frames=2).n_holes == 0
    found = check_potential(ForceField(water_pair(), (0, 3), at=1.4, width=0.15, depth=15.0), frames, n_frames=2)
    deepest = holes_of(found, "contact").holes[0]
    assert deepest.atoms == "O0-O3" and deepest.value == pytest.approx(1.4, abs=0.15) and deepest.limits[0] < 1.9


def test_crystal_has_no_hole():
    copper = bulk("Cu", cubic=True) * 2
    found = check_potential(EMT(), rattled(copper), n_frames=2)
    assert found.n_holes == 0 and found.scans[0].kind == "contact" and found.n_scans == 8


def scan_of(values, limits=(0.9, 1.1)):
    values = torch.as_tensor(values, dtype=torch.float64)
    return Scan("bond", "Å", (0, 1), values, limits, torch.zeros(len(values), 2, 3))


def test_hole_of_reports_depth_and_barrier():
    scan = scan_of([0.8, 1.0, 1.2, 1.4, 1.6])
    energies = torch.tensor([1.0, 5.0, 5.3, 4.5, 9.0], dtype=torch.float64)
    hole = hole_of(scan, energies, KT, "C0-C1", 7)
    assert (hole.value, hole.energy_eV, hole.barrier_eV, hole.frame) == (0.8, -4.0, 0.0, 7)
    hole = hole_of(scan, energies + torch.tensor([9.0, 0, 0, 0, 0]), KT, "C0-C1", 7)
    assert (hole.value, hole.energy_eV) == (1.4, -0.5) and hole.barrier_eV == pytest.approx(0.3)


@pytest.mark.parametrize(("height", "found"), [(7.9, True), (8.1, False)])
def test_least_energy_is_eight_kT(height, found):
    energies = torch.tensor([1.0, 0.0, height * KT], dtype=torch.float64)
    assert (hole_of(scan_of([0.8, 1.0, 1.2]), energies, KT, "", 0) is not None) == found


def test_nearer_hole_counts_before_deeper_one_out_of_reach():
    energies = torch.tensor([1.0, 0.0, 0.1, 9.0, -9.0], dtype=torch.float64)
    hole = hole_of(scan_of([0.8, 1.0, 1.2, 1.4, 1.6]), energies, KT, "", 0)
    assert hole.value == 1.2


def test_energy_that_is_not_finite_is_a_hole():
    energies = torch.tensor([1.0, 0.0, torch.nan], dtype=torch.float64)
    hole = hole_of(scan_of([0.8, 1.0, 1.2]), energies, KT, "C0-C1", 0)
    assert hole.value == 1.2 and hole.energy_eV is None and hole.barrier_eV == 0.0


def test_hole_behind_a_high_barrier_is_out_of_reach(frames):
    system = System.from_frames(frames)
    bond = next(bond for bond in system.bonds.tolist() if {system.symbols[i] for i in bond} == {"C", "O"})
    found = check_potential(ForceField(ETHANOL, bond, at=2.35, width=0.05, depth=9.0), frames, n_frames=3)
    assert holes_of(found, "bond").n_holes == 0 and holes_of(found, "bond").n_out_of_reach == 3
    json.dumps(found.to_json(), allow_nan=False)


def test_scans_have_the_values_they_state(frames):
    system = System.from_frames(frames)
    reference = torch.tensor(np.stack([frame.positions for frame in frames]))
    for scan in Scanner(system, reference, 300.0).scans(reference[3], 3):
        atoms = [Atoms(system.symbols, positions=each.numpy()) for each in scan.positions]
        if scan.kind == "angle":
            values = [each.get_angle(*scan.atoms) for each in atoms]
        else:
            values = [each.get_distance(*scan.atoms) for each in atoms]
        np.testing.assert_allclose(values, scan.values, atol=1e-6 if scan.kind == "angle" else 1e-9)
        moved = (scan.positions - reference[3]).norm(dim=-1).amax(dim=0) > 1e-9
        assert 0 < int(moved.sum()) <= (5 if scan.kind == "contact" else 4)


def test_scans_across_a_boundary_keep_molecules_rigid():
    water = molecule("H2O")
    water.set_cell([8.0, 8.0, 8.0])
    water.pbc = True
    frames = rattled(water)
    inside = torch.tensor(np.stack([frame.positions for frame in frames]))
    for frame in frames:
        frame.wrap()
    wrapped = torch.tensor(np.stack([frame.positions for frame in frames]))
    system = System.from_frames(frames)
    pairs = [Scanner(system, each, 300.0).scans(each[0], 0) for each in (inside, wrapped)]
    for one, other in zip(*pairs, strict=True):
        off = (one.positions - other.positions) / 8.0
        torch.testing.assert_close(off, off.round(), atol=1e-9, rtol=0.0)


def test_rings_move_by_halves():
    benzene = System.from_atoms(molecule("C6H6"))
    ring = next(bond for bond in benzene.bonds.tolist() if {benzene.symbols[i] for i in bond} == {"C"})
    weights = Fragments(benzene).of_bond(*ring)
    assert weights.unique().tolist() == [-0.5, 0.0, 0.5] and int((weights != 0).sum()) == 4  # each C with its H


def test_smaller_side_of_a_bond_moves():
    system = System.from_atoms(ETHANOL)
    oxygen = list(system.symbols).index("O")
    bond = next(bond for bond in system.bonds.tolist() if oxygen in bond and system.symbols[sum(bond) - oxygen] == "C")
    weights = Fragments(system).of_bond(*bond)
    assert int((weights != 0).sum()) == 2 and weights[oxygen] != 0
