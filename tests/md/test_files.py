"""What stands for structures: patterns, folders, parts of files, npz files, and what is refused."""

import ase.db
import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator

from stable_plugin.integrations.lightning.data import ExtxyzDataModule
from stable_plugin.md.frames import read_frames, warn_temperature
from stable_plugin.md.labels import ENERGY_KEY, FORCES_KEY, STRESS_KEY, find_keys, isolated_energies, read_labeled

KCAL_PER_MOL = 0.0433641
"""In eV."""


def water(number, **info):
    """Return water whose first atom tells its number."""
    atoms = molecule("H2O")
    atoms.positions += number
    atoms.info.update(info)
    return atoms


def numbers_of(frames):
    return [round(frame.positions[0, 0] - molecule("H2O").positions[0, 0]) for frame in frames]


@pytest.fixture
def folder(tmp_path):
    for name, numbers in (("b", (2, 3)), ("a", (0, 1))):
        ase.io.write(tmp_path / f"{name}.extxyz", [water(number) for number in numbers])
    return tmp_path


def test_read_frames_of_a_pattern_is_sorted(folder):
    assert numbers_of(read_frames(f"{folder}/*.extxyz")) == [0, 1, 2, 3]


def test_read_frames_of_a_list_keeps_its_order(folder):
    assert numbers_of(read_frames([folder / "b.extxyz", str(folder / "a.extxyz")])) == [2, 3, 0, 1]


@pytest.mark.parametrize(
    ("index", "expected"), [("1", [3]), ("-1", [3]), ("0:1", [2]), ("::-1", [3, 2]), (":", [2, 3])]
)
def test_read_frames_of_a_part(folder, index, expected):
    assert numbers_of(read_frames(f"{folder}/b.extxyz@{index}")) == expected


@pytest.mark.parametrize("index", ["5", "x:", "1:2:3:4"])
def test_read_frames_of_an_invalid_part(folder, index):
    with pytest.raises(
        ValueError, match=rf"structures='.*b\.extxyz@{index}' selects no frame of the 2 .*use an index such"
    ):
        read_frames(f"{folder}/b.extxyz@{index}")


def test_read_frames_expands_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert numbers_of(read_frames("~/a.extxyz")) == [0, 1]


def test_read_frames_of_an_aselmdb_folder(tmp_path):
    pytest.importorskip("fairchem.core.datasets", reason="registers the database")
    for name, number in (("data.0001", 1), ("data.0000", 0)):
        with ase.db.connect(str(tmp_path / f"{name}.aselmdb"), type="aselmdb") as database:
            database.write(water(number))
    assert numbers_of(read_frames(tmp_path)) == [0, 1]


def test_read_frames_of_ase_formats(tmp_path):
    ase.io.write(tmp_path / "run.traj", [water(0), water(1)])
    ase.io.write(tmp_path / "run.xyz.gz", [water(2)], format="extxyz")
    assert numbers_of(read_frames([tmp_path / "run.traj", tmp_path / "run.xyz.gz"])) == [0, 1, 2]


def test_read_frames_without_matching_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train='.*\*\.traj' is not a file: pass .* a pattern such as"):
        read_frames(f"{tmp_path}/*.traj", "train")
    with pytest.raises(ValueError, match=r"is a folder without \.aselmdb files: pass a file"):
        read_frames(tmp_path)


@pytest.mark.parametrize(
    ("name", "reason"), [("a.h5", "graphs of MACE"), ("a.lmdb", "old versions of fairchem"), ("a.pt", "not structures")]
)
def test_read_frames_names_refused_formats(tmp_path, name, reason):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=rf"structures='.*{name}' is a \.{name[2:]} file.*{reason}.*extxyz"):
        read_frames(tmp_path / name)


@pytest.mark.parametrize("content", ['[{"structure": {"lattice": {"a": 3.0}}}]', '[{"@module": "pymatgen.core"}]'])
def test_read_frames_names_json_of_pymatgen(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=r"train='.*a\.json' is a JSON file of pymatgen structures.*AseAtomsAdaptor"):
        read_frames(tmp_path / "a.json", "train")


def test_read_frames_of_a_json_database(tmp_path):
    with ase.db.connect(str(tmp_path / "a.json")) as database:
        database.write(water(1), lattice="none")
    assert numbers_of(read_frames(tmp_path / "a.json")) == [1]


def test_read_frames_of_a_path_that_is_not_ascii(tmp_path):
    path = tmp_path / "Wässer [水].extxyz"
    ase.io.write(path, water(3))
    assert numbers_of(read_frames(path)) == numbers_of(read_frames(f"{path}@0")) == [3]


def test_read_frames_of_vasp(tmp_path):
    crystal = bulk("NaCl", "rocksalt", 5.6)
    ase.io.write(tmp_path / "POSCAR", crystal)
    ase.io.write(tmp_path / "XDATCAR", [crystal] * 2, format="vasp-xdatcar")
    frames = read_frames([tmp_path / "POSCAR", tmp_path / "XDATCAR"])
    assert [frame.get_chemical_formula() for frame in frames] == ["ClNa"] * 3
    np.testing.assert_allclose(frames[2].cell.array, crystal.cell.array, atol=1e-6)


def npz(path, **changes):
    arrays = {
        "z": [8, 1, 1],
        "R": np.stack([water(number).positions for number in range(2)]),
        "E": np.array([-10.0, -20.0]),
        "F": np.ones((2, 3, 3)),
        **changes,
    }
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return path


def test_read_labeled_of_rmd17_is_in_kcal_per_mol(tmp_path):
    path = tmp_path / "rmd17_water.npz"
    np.savez(
        path, nuclear_charges=[8, 1, 1], coords=[water(1).positions], energies=[-10.0], forces=np.ones((1, 3, 3))
    )  # fmt: skip
    (frame,) = read_labeled(path, "train")
    assert frame.get_chemical_formula() == "H2O"
    assert frame.info[ENERGY_KEY] == pytest.approx(-10.0 * KCAL_PER_MOL, rel=1e-5)
    np.testing.assert_allclose(frame.arrays[FORCES_KEY], KCAL_PER_MOL, rtol=1e-5)


def test_read_labeled_of_sgdml_uses_its_unit(tmp_path):
    for unit, factor in (("kcal/mol", KCAL_PER_MOL), ("eV", 1.0)):
        path = npz(tmp_path / f"{factor}.npz", e_unit=unit, r_unit="Ang")
        frames = read_labeled(f"{path}@1", "train")
        assert [frame.info[ENERGY_KEY] for frame in frames] == [pytest.approx(-20.0 * factor, rel=1e-5)]


@pytest.mark.parametrize("changes", [{}, {"e_unit": "Hartree"}, {"e_unit": "eV", "r_unit": "Bohr"}, {"F": None}])
def test_read_frames_refuses_npz_of_unknown_content(tmp_path, changes):
    with pytest.raises(ValueError, match=r"train='.*x\.npz' cannot be read .*use"):
        read_frames(npz(tmp_path / "x.npz", **changes), "train")


def isolated(symbol, **labels):
    atoms = Atoms(symbol, positions=[[0.0, 0.0, 0.0]])
    atoms.info.update(config_type="IsolatedAtom", **labels)
    return atoms


def labeled(number, key="xtb"):
    atoms = water(number, **{f"energy_{key}": -3.0 - number})
    atoms.arrays[f"forces_{key}"] = np.full((3, 3), float(number))
    return atoms


def test_isolated_atoms_are_neither_frames_nor_labels(tmp_path):
    path = tmp_path / "train.extxyz"
    atoms = [isolated("H", energy_xtb=-10.0), isolated("O", energy_xtb=-102.0), isolated("H", energy_xtb=-10.0)]
    ase.io.write(path, [*atoms[:2], labeled(0), labeled(1), atoms[2]])
    assert [len(frame) for frame in read_frames(path)] == [3, 3]
    data = ExtxyzDataModule(path)
    assert [frame.info[ENERGY_KEY] for frame in data.train_frames] == [-3.0, -4.0]
    np.testing.assert_array_equal(data.train_frames[1].arrays[FORCES_KEY], 1.0)
    assert data.isolated_energies == {1: -10.0, 8: -102.0}


def test_isolated_energies_that_disagree():
    atoms = [isolated("H", energy=-10.0), isolated("H", energy=-13.6)]
    with pytest.raises(ValueError, match=r"train: isolated atoms H have the energies -10 and -13\.6 eV: remove"):
        isolated_energies(atoms, "train", "energy")
    with pytest.raises(ValueError, match=r"train: the isolated atom H has no energy_key='other': set"):
        isolated_energies(atoms, "train", "other")


def test_read_frames_of_isolated_atoms_alone():
    with pytest.raises(ValueError, match=r"contains no structure"):
        read_frames([isolated("H")])


def test_find_keys_takes_the_only_candidates(caplog):
    caplog.set_level("INFO", "stable_plugin")
    assert find_keys([labeled(0)], "train", ENERGY_KEY, FORCES_KEY) == ("energy_xtb", "forces_xtb", STRESS_KEY)
    assert "train: energies are 'energy_xtb', forces are 'forces_xtb'" in caplog.text


def test_find_keys_leaves_the_choice_between_two_to_the_user():
    atoms = labeled(0)
    atoms.info["energy_dft"] = -5.0
    assert find_keys([atoms], "train", ENERGY_KEY, FORCES_KEY)[0] == ENERGY_KEY
    with pytest.raises(ValueError, match=r"no energy_key='REF_energy'.*energy_dft.*energy_xtb"):
        read_labeled([atoms], "train")


def test_find_keys_does_not_replace_keys_of_the_user():
    with pytest.raises(ValueError, match=r"no energy_key='energy_pbe'"):
        read_labeled([labeled(0)], "train", "energy_pbe", "forces_xtb")


def test_read_labeled_warns_of_unused_labels(caplog):
    atoms = labeled(0)
    atoms.info["REF_virials"] = np.zeros(6)
    read_labeled([atoms], "train")
    assert "train: the labels ['REF_virials'] are not used" in caplog.text


def strained(stress, key="stress"):
    """Return a crystal with labels of a calculator, and the stress under a key."""
    atoms = bulk("Cu", cubic=True)
    atoms.info.update({"energy_emt": -1.0, key: stress})
    atoms.arrays["forces_emt"] = np.zeros((4, 3))
    return atoms


TENSOR = np.array([[1.0, 6.0, 5.0], [6.0, 2.0, 4.0], [5.0, 4.0, 3.0]])


@pytest.mark.parametrize("stress", [np.arange(1.0, 7.0), TENSOR, TENSOR.reshape(9)], ids=["Voigt", "tensor", "flat"])
def test_stresses_are_read_in_every_form(stress):
    (frame,) = read_labeled([strained(stress, "stress_emt")], "train")
    np.testing.assert_array_equal(frame.info[STRESS_KEY], TENSOR)


def test_stresses_of_a_calculator_are_read():
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.1, seed=0)
    atoms.calc = EMT()
    expected = atoms.get_stress(voigt=False)
    (frame,) = read_labeled([atoms], "train", "energy", "forces")
    np.testing.assert_allclose(frame.info[STRESS_KEY], expected)


def test_stresses_without_a_volume_are_left_out():
    atoms = strained(TENSOR)
    atoms.pbc = [True, True, False]
    without = strained(None)
    del without.info["stress"]
    frames = read_labeled([strained(TENSOR), atoms, without], "train")
    assert [STRESS_KEY in frame.info for frame in frames] == [True, False, False]


@pytest.mark.parametrize(
    ("stress", "message"),
    [
        (np.zeros(5), r"train\[0\] stress_key='REF_stress' has the shape \(5,\): set 6 numbers in Voigt order"),
        (np.arange(9.0), r"stress_key='REF_stress' is .* not symmetric: set the stress in eV/Å³"),
        (np.full(6, np.nan), r"stress_key='REF_stress' is .* not finite"),
    ],
)
def test_stresses_that_are_none(stress, message):
    with pytest.raises(ValueError, match=message):
        read_labeled([strained(stress, STRESS_KEY)], "train")


def test_read_labeled_warns_of_unused_labels_of_any_frame(caplog):
    frames = [labeled(0), labeled(1)]
    frames[1].arrays["mulliken_charges"] = np.zeros(3)
    read_labeled(frames, "train")
    assert "train: the labels ['mulliken_charges'] are not used" in caplog.text


def test_read_labeled_takes_guesses_of_moments_for_no_labels(caplog):
    atoms = labeled(0)
    atoms.set_initial_magnetic_moments(np.ones(3))
    atoms.set_initial_charges(np.ones(3))
    read_labeled([atoms], "train")
    assert "are not used" not in caplog.text


def smeared(energy, free_energy):
    atoms = water(0)
    atoms.calc = SinglePointCalculator(atoms, energy=energy, free_energy=free_energy, forces=np.zeros((3, 3)))
    return atoms


def test_read_labeled_tells_energy_from_free_energy(caplog):
    (frame,) = read_labeled([smeared(-3.0, -3.2)], "train")
    assert frame.info[ENERGY_KEY] == -3.0
    assert "train: energies are 'energy', which differ from 'free_energy'" in caplog.text
    (frame,) = read_labeled([smeared(-3.0, -3.2)], "train", "free_energy", "forces")
    assert frame.info[ENERGY_KEY] == -3.2
    assert "train: energies are 'free_energy', which differ from 'energy'" in caplog.text
    caplog.clear()
    read_labeled([smeared(-3.0, -3.0)], "train")
    assert "which differ" not in caplog.text


def test_read_labeled_of_primitive_cells():
    atoms = bulk("Cu")
    atoms.calc = SinglePointCalculator(atoms, energy=-3.7, forces=np.zeros((1, 3)))
    (frame,) = read_labeled([atoms], "train")
    assert (len(frame), frame.info[ENERGY_KEY], frame.pbc.all()) == (1, -3.7, True)


def test_frames_of_another_temperature_are_a_warning(caplog):
    frames = [water(0, temperature_K=500.0), water(1)]
    warn_temperature(frames, 505.0, "reference")
    assert "states temperature_K" not in caplog.text
    warn_temperature(frames, 300.0, "reference")
    assert "reference states temperature_K=500, but the simulation runs at 300 K" in caplog.text
    assert "1.7 times those of the simulation" in caplog.text
