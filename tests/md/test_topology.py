"""Bonds from the whole reference."""

import logging

import numpy as np
import pytest
from ase.build import molecule

from stable_plugin import System


def thermal(name, n_frames=20, scale=0.03):
    """Return frames of a molecule with random displacements."""
    frames = [molecule(name) for _ in range(n_frames)]
    for index, frame in enumerate(frames):
        frame.rattle(scale, seed=index)
    return frames


def stretched(frame, atom, factor):
    """Return a frame with an atom moved away from the first one."""
    copy = frame.copy()
    copy.positions[atom] = copy.positions[0] + factor * (copy.positions[atom] - copy.positions[0])
    return copy


def test_from_frames_finds_bonds_missing_in_the_first():
    frames = thermal("CH3Cl")
    frames[0] = stretched(frames[0], 1, 1.25)  # 2.2 Å, beyond 1.2 times the covalent radii
    assert len(System.from_atoms(frames[0]).bonds) == 3
    assert len(System.from_frames(frames).bonds) == 4


def test_from_frames_drops_contacts_of_the_first():
    frames = [frame + frame for frame in thermal("N2")]
    for index, frame in enumerate(frames):
        frame.positions[2:, 0] += 4.0 if index else 1.6
    assert len(System.from_atoms(frames[0]).bonds) > 2
    assert System.from_frames(frames).bonds.tolist() == [[0, 1], [2, 3]]


def test_from_frames_logs_frames_with_a_broken_bond(caplog):
    frames = thermal("CH4", 30)
    frames[3], frames[17] = stretched(frames[3], 2, 2.5), stretched(frames[17], 2, 2.5)
    with caplog.at_level(logging.WARNING):
        system = System.from_frames(frames)
    assert len(system.bonds) == 4
    assert "1 bond(s) are broken and 0 added in reference frames 3, 17" in caplog.text


def test_from_frames_drops_a_bond_that_reacts(caplog):
    frames = thermal("CH4")
    frames[12:] = [stretched(frame, 2, 2.5) for frame in frames[12:]]
    with caplog.at_level(logging.WARNING):
        system = System.from_frames(frames)
    assert system.bonds.tolist() == [[0, 1], [0, 3], [0, 4]]
    assert "12, 13, 14, 15, 16, 17, 18, 19" in caplog.text
    assert "1 bond(s) are broken in more than 10% of the frames" in caplog.text


def test_from_frames_rejects_another_order():
    frames = thermal("CH3CH2OH")
    order = np.arange(9)
    order[3:] = order[3:][::-1]
    for index in (4, 9):
        frames[index].positions = frames[index].positions[order]
    with pytest.raises(ValueError, match=r"reference frames 4, 9 have other bonds than the rest"):
        System.from_frames(frames)


def test_from_frames_rejects_an_isomer():
    frames, isomer = thermal("CH3CH2OH"), molecule("CH3OCH3")
    template = frames[0].numbers
    by_element = {number: iter(np.flatnonzero(isomer.numbers == number)) for number in set(template)}
    frames[7].positions = isomer.positions[[next(by_element[number]) for number in template]]
    with pytest.raises(ValueError, match=r"structures frames 7 have other bonds"):
        System.from_frames(frames, name="structures")


def test_from_frames_takes_explicit_bonds():
    frames = thermal("CH4")
    frames[4:] = [stretched(frame, 2, 2.5) for frame in frames[4:]]
    assert System.from_frames(frames, bonds=[(1, 0)]).bonds.tolist() == [[0, 1]]


def test_from_frames_rejects_one_atom():
    with pytest.raises(ValueError, match=r"reference have 1 atom\(s\): pass structures of at least two"):
        System.from_frames([molecule("H")])
