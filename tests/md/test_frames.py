"""Readers of structures and labels, and their errors."""

from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase.build import molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.singlepoint import SinglePointCalculator

from stable_plugin.md.frames import read_frames
from stable_plugin.md.labels import ENERGY_KEY, FORCES_KEY, read_labeled

TRAIN = Path(__file__).parents[2] / "recipes" / "data" / "aspirin_train.extxyz"


def water(energy=-3.0, energy_key=ENERGY_KEY, forces_key=FORCES_KEY):
    atoms = molecule("H2O")
    atoms.info[energy_key] = energy
    atoms.arrays[forces_key] = np.arange(9.0).reshape(3, 3)
    return atoms


def calculated(energy=-3.0):
    """Return a structure with its labels in a calculator, as ASE keeps them."""
    atoms = molecule("H2O")
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=np.arange(9.0).reshape(3, 3))
    return atoms


@pytest.mark.parametrize("kind", [str, Path])
def test_read_frames_of_a_file(kind):
    frames = read_frames(kind(TRAIN))
    assert len(frames) == 50
    assert {frame.get_chemical_formula() for frame in frames} == {"C9H8O4"}


def test_read_frames_of_structures():
    frames = (water(), water())
    assert read_frames(iter(frames)) == list(frames)


def test_read_labeled_default_keys():
    frames = read_labeled(TRAIN, "train")
    raw = ase.io.read(TRAIN, "3")
    assert frames[3].info[ENERGY_KEY] == raw.info["REF_energy"]
    np.testing.assert_array_equal(frames[3].arrays[FORCES_KEY], raw.arrays["REF_forces"])
    assert isinstance(frames[3].info[ENERGY_KEY], float)


def test_read_labeled_other_keys():
    (frame,) = read_labeled([water(-7.5, "dft_energy", "dft_forces")], "train", "dft_energy", "dft_forces")
    assert frame.info[ENERGY_KEY] == -7.5
    np.testing.assert_array_equal(frame.arrays[FORCES_KEY], np.arange(9.0).reshape(3, 3))


def test_read_labeled_from_calculator(tmp_path):
    path = tmp_path / "ase.extxyz"
    ase.io.write(path, [calculated(-1.0), calculated(-2.0)])
    for source in (path, [calculated(-1.0), calculated(-2.0)]):
        frames = read_labeled(source, "train", "energy", "forces")
        assert [frame.info[ENERGY_KEY] for frame in frames] == [-1.0, -2.0]
        np.testing.assert_allclose(frames[1].arrays[FORCES_KEY], np.arange(9.0).reshape(3, 3))
        assert all(frame.calc is None for frame in frames)


def test_read_labeled_keeps_the_originals():
    atoms = calculated(-4.0)
    read_labeled([atoms], "train", "energy", "forces")
    assert atoms.get_potential_energy() == -4.0
    assert ENERGY_KEY not in atoms.info
    assert FORCES_KEY not in atoms.arrays


def test_read_frames_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train='.*nothing\.extxyz' is not a file: pass the path"):
        read_frames(tmp_path / "nothing.extxyz", "train")


@pytest.mark.parametrize("lines_lost", [1, 10])
def test_read_frames_rejects_a_truncated_file(tmp_path, lines_lost):
    path = tmp_path / "cut.extxyz"
    lines = TRAIN.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: 3 * 23 - lines_lost]))
    with pytest.raises(ValueError, match=r"valid='.*cut\.extxyz' cannot be read .*pass a complete extxyz file"):
        read_frames(path, "valid")


def test_read_frames_rejects_another_format(tmp_path):
    path = tmp_path / "notes.extxyz"
    path.write_text("not a structure\nat all\n")
    with pytest.raises(ValueError, match=r"notes\.extxyz' cannot be read"):
        read_frames(path)


@pytest.mark.parametrize("source", ["file", "list"])
def test_read_frames_rejects_no_structure(tmp_path, source):
    path = tmp_path / "empty.extxyz"
    path.touch()
    with pytest.raises(ValueError, match=r"structures=.*(contains no structure|cannot be read)"):
        read_frames([] if source == "list" else path)


def test_read_labeled_names_missing_keys():
    other = water(-1.0, "dft_energy", "dft_forces")
    with pytest.raises(ValueError, match=r"train\[1\] has no energy_key='REF_energy' and no forces_key=") as caught:
        read_labeled([water(), other], "train")
    message = str(caught.value)
    assert "Found per frame: ['dft_energy']" in message
    assert "per atom: ['dft_forces']" in message


def test_read_labeled_names_only_missing_keys():
    no_forces, no_energy = water(), water()
    del no_forces.arrays[FORCES_KEY], no_energy.info[ENERGY_KEY]
    with pytest.raises(ValueError, match=r"train\[0\] has no forces_key='REF_forces'\. .*per atom: nothing"):
        read_labeled([no_forces], "train")
    with pytest.raises(ValueError, match=r"train\[0\] has no energy_key='REF_energy'\. Found per frame: nothing"):
        read_labeled([no_energy], "train")


def test_read_labeled_finds_calculator_keys():
    (frame,) = read_labeled([calculated(-4.0)], "train")
    assert frame.info[ENERGY_KEY] == -4.0


def test_read_labeled_lists_the_keys_of_a_calculator():
    with pytest.raises(ValueError, match=r"Found per frame: \['energy', 'forces'\]"):
        read_labeled([calculated()], "train", "dft_energy")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_read_labeled_rejects_nonfinite_labels(value):
    broken_forces = water()
    broken_forces.arrays[FORCES_KEY][2, 1] = value
    for broken in (water(value), broken_forces):
        with pytest.raises(ValueError, match=r"valid\[1\] has a non-finite energy or force: remove that frame"):
            read_labeled([water(), broken], "valid")


def test_read_labeled_rejects_too_few_frames():
    with pytest.raises(ValueError, match=r"train contains 1 frame\(s\): pass at least 2"):
        read_labeled([water()], "train", least=2)


def test_read_labeled_copies_have_no_calculator():
    (frame,) = read_labeled([calculated()], "train", "energy", "forces")
    with pytest.raises((RuntimeError, PropertyNotImplementedError)):
        frame.get_potential_energy()
