"""Frames of several systems in one data set."""

import numpy as np
import pytest
from ase import Atoms
from ase.constraints import FixAtoms, FixCartesian

from stable_plugin.md.compositions import frames_by_name, split_by_composition


def frames(n_frames=1, symbols="OHH", fixed=None, **info):
    made = []
    for _ in range(n_frames):
        atoms = Atoms(symbols, positions=np.arange(3.0 * len(symbols)).reshape(-1, 3))
        atoms.info.update(info)
        if fixed is not None:
            atoms.set_constraint(FixAtoms(fixed))
        made.append(atoms)
    return made


def counts(named):
    return {name: len(group) for name, group in named.items()}


def test_split_by_composition_counts_frames_and_order():
    named = split_by_composition([*frames(3, "OH"), *frames(6), *frames(1, "HO")])
    assert counts(named) == {"H2O": 6, "HO": 3, "HO_2": 1}
    (periodic,) = frames(1, "OH")
    periodic.set_cell([9.0, 9.0, 9.0])
    periodic.pbc = True
    assert list(split_by_composition([*frames(2, "OH"), periodic])) == ["HO", "HO_2"]


@pytest.mark.parametrize(
    ("one", "other", "names"),
    [
        ({"charge": 0}, {"charge": -1}, ["H2O_charge0", "H2O_charge-1"]),
        ({"charge": 0, "spin": 1}, {"charge": 1, "spin": 2}, ["H2O_charge0_spin1", "H2O_charge1_spin2"]),
        ({"charge": 0, "spin": 1}, {"charge": 0, "spin": 3}, ["H2O_spin1", "H2O_spin3"]),
        ({"head": "pt_head"}, {"head": "Default"}, ["H2O_pt_head", "H2O_Default"]),
        ({}, {"fixed": [0]}, ["H2O_fixed0", "H2O_fixed1"]),
        ({"fixed": [0]}, {"fixed": [1]}, ["H2O_fixed1", "H2O_fixed1_2"]),
    ],
)
def test_split_tells_systems_of_one_composition_apart(one, other, names):
    named = split_by_composition([*frames(1, **other), *frames(2, **one)])
    assert list(named) == names
    assert counts(named) == dict(zip(names, (2, 1), strict=True))


def test_split_names_only_what_differs():
    named = split_by_composition([*frames(2, charge=1, spin=2), *frames(1, "OH", charge=0, spin=2)])
    assert list(named) == ["H2O", "HO"]
    one_number = split_by_composition([*frames(1, charge=1), *frames(1, charge=1.0), *frames(1, charge=np.int64(1))])
    assert list(one_number) == ["H2O"]


def test_split_keeps_frames_that_miss_a_label_with_the_others():
    named = split_by_composition([*frames(1, charge=-1, spin=2), *frames(1, spin=1), *frames(1, charge=0, spin=1)])
    assert counts(named) == {"H2O_spin1": 2, "H2O_spin2": 1}


@pytest.mark.parametrize("value", [float("nan"), 0.5, np.array([0.5, 1.0]), "one"])
def test_split_leaves_numbers_that_are_not_whole_to_the_system(value):
    assert counts(split_by_composition([*frames(1, spin=value), *frames(1, spin=0.9), *frames(1, spin=1)])) == {
        "H2O": 3
    }


def test_split_takes_whole_atoms_of_any_constraint():
    (by_axis,) = frames()
    by_axis.set_constraint(FixCartesian(1, (True, True, True)))
    assert list(split_by_composition([by_axis, *frames(1, fixed=[1])])) == ["H2O"]
    by_axis.set_constraint(FixCartesian(1, (True, False, True)))
    assert list(split_by_composition([by_axis, *frames()])) == ["H2O"]


def test_frames_by_name_prefers_the_same_kind():
    named = split_by_composition([*frames(1, charge=0, fixed=[0]), *frames(1, charge=1, fixed=[0])])
    further = [*frames(2, charge=0), *frames(3, charge=1), *frames(4, charge=1, fixed=[0]), *frames(5, "OH")]
    assert counts(frames_by_name(named, further)) == {"H2O_charge0": 2, "H2O_charge1": 4}


def test_frames_by_name_takes_frames_that_state_less():
    named = split_by_composition(frames(1))
    # Which of the charges is meant is an error of the system that is made of them.
    assert counts(frames_by_name(named, [*frames(2, charge=0), *frames(1, charge=1)])) == {"H2O": 3}
    assert frames_by_name(split_by_composition(frames(1, charge=1)), frames(2, charge=0)) == {}
