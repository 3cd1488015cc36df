"""Reading structures and labels: what is found, and what is said when it is not."""

from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase.build import molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.singlepoint import SinglePointCalculator

from stable_plugin.md.frames import ENERGY_KEY, FORCES_KEY, read_frames, read_labeled

TRAIN = Path(__file__).parents[2] / "recipes" / "data" / "aspirin_train.extxyz"


def water(energy=-3.0, energy_key=ENERGY_KEY, forces_key=FORCES_KEY):
    atoms = molecule("H2O")
    atoms.info[energy_key] = energy
    atoms.arrays[forces_key] = np.arange(9.0).reshape(3, 3)
    return atoms


def calculated(energy=-3.0):
    """As ASE itself keeps labels: in a calculator."""
    atoms = molecule("H2O")
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=np.arange(9.0).reshape(3, 3))
    return atoms


@pytest.mark.parametrize("kind", [str, Path])
def test_a_file_is_read_whole(kind):
    frames = read_frames(kind(TRAIN))
    assert len(frames) == 50
    assert {frame.get_chemical_formula() for frame in frames} == {"C9H8O4"}


def test_structures_at_hand_are_taken_as_they_are():
    frames = (water(), water())
    assert read_frames(iter(frames)) == list(frames)


def test_labels_are_found_under_the_default_keys():
    frames = read_labeled(TRAIN, "train")
    raw = ase.io.read(TRAIN, "3")
    assert frames[3].info[ENERGY_KEY] == raw.info["REF_energy"]
    np.testing.assert_array_equal(frames[3].arrays[FORCES_KEY], raw.arrays["REF_forces"])
    assert isinstance(frames[3].info[ENERGY_KEY], float)


def test_labels_under_other_keys_are_copied_to_the_default_ones():
    (frame,) = read_labeled([water(-7.5, "dft_energy", "dft_forces")], "train", "dft_energy", "dft_forces")
    assert frame.info[ENERGY_KEY] == -7.5
    np.testing.assert_array_equal(frame.arrays[FORCES_KEY], np.arange(9.0).reshape(3, 3))


def test_ases_own_keys_read_its_calculator(tmp_path):
    path = tmp_path / "ase.extxyz"
    ase.io.write(path, [calculated(-1.0), calculated(-2.0)])
    for source in (path, [calculated(-1.0), calculated(-2.0)]):
        frames = read_labeled(source, "train", "energy", "forces")
        assert [frame.info[ENERGY_KEY] for frame in frames] == [-1.0, -2.0]
        np.testing.assert_allclose(frames[1].arrays[FORCES_KEY], np.arange(9.0).reshape(3, 3))
        assert all(frame.calc is None for frame in frames)


def test_the_callers_structures_stay_as_they_are():
    atoms = calculated(-4.0)
    read_labeled([atoms], "train", "energy", "forces")
    assert atoms.get_potential_energy() == -4.0
    assert ENERGY_KEY not in atoms.info
    assert FORCES_KEY not in atoms.arrays


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train='.*nothing\.extxyz' is not a file: give the path"):
        read_frames(tmp_path / "nothing.extxyz", "train")


def test_a_folder_is_not_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a file"):
        read_frames(tmp_path)


@pytest.mark.parametrize("lines_lost", [1, 10])
def test_a_truncated_file_is_refused_and_named(tmp_path, lines_lost):
    path = tmp_path / "cut.extxyz"
    lines = TRAIN.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: 3 * 23 - lines_lost]))
    with pytest.raises(ValueError, match=r"valid='.*cut\.extxyz' cannot be read .*give a complete extxyz file"):
        read_frames(path, "valid")


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "notes.extxyz"
    path.write_text("not a structure\nat all\n")
    with pytest.raises(ValueError, match=r"notes\.extxyz' cannot be read"):
        read_frames(path)


@pytest.mark.parametrize("source", ["file", "list"])
def test_no_structure_at_all_is_refused(tmp_path, source):
    path = tmp_path / "empty.extxyz"
    path.touch()
    with pytest.raises(ValueError, match=r"structures=.*(holds no structure|cannot be read)"):
        read_frames([] if source == "list" else path)


def test_missing_labels_are_named_with_the_keys_that_were_found():
    other = water(-1.0, "dft_energy", "dft_forces")
    with pytest.raises(ValueError, match=r"train\[1\] has no energy_key='REF_energy' and no forces_key=") as caught:
        read_labeled([water(), other], "train")
    message = str(caught.value)
    assert "Found per frame: ['dft_energy']" in message
    assert "per atom: ['dft_forces']" in message


def test_only_the_label_that_is_missing_is_named():
    no_forces, no_energy = water(), water()
    del no_forces.arrays[FORCES_KEY], no_energy.info[ENERGY_KEY]
    with pytest.raises(ValueError, match=r"train\[0\] has no forces_key='REF_forces'\. .*per atom: nothing"):
        read_labeled([no_forces], "train")
    with pytest.raises(ValueError, match=r"train\[0\] has no energy_key='REF_energy'\. Found per frame: nothing"):
        read_labeled([no_energy], "train")


def test_labels_in_a_calculator_are_among_those_found():
    with pytest.raises(ValueError, match=r"Found per frame: \['energy', 'forces'\]"):
        read_labeled([calculated()], "train")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_labels_that_are_not_finite_are_refused_with_their_frame(value):
    broken_forces = water()
    broken_forces.arrays[FORCES_KEY][2, 1] = value
    for broken in (water(value), broken_forces):
        with pytest.raises(ValueError, match=r"valid\[1\] has a non-finite energy or force: remove that frame"):
            read_labeled([water(), broken], "valid")


def test_too_few_frames_are_refused():
    with pytest.raises(ValueError, match=r"train holds 1 frame\(s\): give at least 2"):
        read_labeled([water()], "train", least=2)


def test_a_labelled_copy_has_no_calculator_to_ask():
    (frame,) = read_labeled([calculated()], "train", "energy", "forces")
    with pytest.raises((RuntimeError, PropertyNotImplementedError)):
        frame.get_potential_energy()
