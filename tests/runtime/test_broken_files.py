"""Files that are cut off, damaged or wrong: each is refused by name, with the way out, and left as it is."""

from __future__ import annotations

import pickle
import random
import re
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase.build import bulk
from fairchem_tools import network, tasks, write_aselmdb
from toys import tiny_mace

from stable_plugin import StABlECallback, System
from stable_plugin.evaluation import Evaluator
from stable_plugin.integrations.fairchem.checkpoints import STATE_FILE, load_with
from stable_plugin.integrations.lightning import ExtxyzDataModule
from stable_plugin.integrations.lightning.checkpoint_io import AtomicCheckpointIO
from stable_plugin.md.frames import read_frames, read_labeled
from stable_plugin.md.system import check_geometry
from stable_plugin.models import load_potential
from stable_plugin.models.fairchem.files import FairchemModel, save_fairchem
from stable_plugin.models.mace import save_mace
from stable_plugin.runtime.serialization import load_tensors

DATA = Path(__file__).parents[2] / "recipes" / "data"
TRAIN = DATA / "aspirin_train.extxyz"
CUTS = 25


def cuts(content, number=CUTS, seed=0):
    """Beginnings of a file, of random lengths; the shortest and the longest that are not whole are among them."""
    chance = random.Random(seed)
    lengths = [0, 1, len(content) - 1, *(chance.randrange(len(content)) for _ in range(number - 3))]
    return [content[:length] for length in lengths]


def refused(read, path, content, message):
    """Whether a file of that content is refused, by its name, and is still there as it was."""
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"(?s){message}") as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == content


def test_an_extxyz_file_is_refused_wherever_it_was_cut(tmp_path):
    lines = TRAIN.read_bytes().splitlines(keepends=True)
    content = b"".join(lines[: 2 * 23])
    whole = {0, len(b"".join(lines[:23]))}
    for cut in cuts(content, 60):
        if len(cut) not in whole:
            message = r"^train='.*' (cannot be read .*: pass a complete extxyz file|contains no structure)"
            refused(lambda path: read_frames(path, "train"), tmp_path / "cut.extxyz", cut, message)


def test_the_constructors_name_their_argument(tmp_path):
    path = tmp_path / "cut.extxyz"
    path.write_bytes(TRAIN.read_bytes()[:-30])
    for name, make in (
        ("structures", lambda: StABlECallback(structures=path)),
        ("reference", lambda: StABlECallback(reference=path)),
        ("train", lambda: ExtxyzDataModule(path)),
        ("valid", lambda: ExtxyzDataModule(TRAIN, path)),
        ("starts", lambda: Evaluator(path)),
        ("labelled", lambda: Evaluator(TRAIN, labelled=path)),
    ):
        with pytest.raises(ValueError, match=rf"^{name}='.*cut\.extxyz' cannot be read"):
            make()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("21\n", "99999\n"),
        ("21\n", "-3\n"),
        ("21\n", "abc\n"),
        ("C ", "Xx "),
        ("pos:R:3", "pos:R:9"),
        ("pos:R:3", "pos:Z:3"),
    ],
)
def test_an_extxyz_file_with_wrong_words_in_it_is_refused(tmp_path, old, new):
    content = TRAIN.read_text().replace(old, new, 1).encode()
    refused(lambda path: read_frames(path), tmp_path / "odd.extxyz", content, "cannot be read")


def test_labels_that_are_no_numbers_or_too_few_are_named():
    frame = ase.io.read(TRAIN)
    for energy, message in (("abc", "set numbers"), ([1.0, 2.0], "has the shape .*a scalar")):
        odd = frame.copy()
        odd.info["REF_energy"] = energy
        with pytest.raises(ValueError, match=rf"train\[1\] energy_key='REF_energy' .*{message}"):
            read_labeled([frame, odd], "train")
    odd = frame.copy()
    odd.arrays["REF_forces"] = odd.arrays["REF_forces"][:, 0]
    with pytest.raises(
        ValueError, match=r"train\[0\] forces_key='REF_forces' .*shape \(21,\): set numbers of shape \(21, 3\)"
    ):
        read_labeled([odd], "train")


def crystal(cell=None, **changes):
    atoms = bulk("Cu", cubic=True)
    if cell is not None:
        atoms.cell = cell
    for name, value in changes.items():
        setattr(atoms, name, value)
    return atoms


FLAT = [[3.6, 0, 0], [0, 3.6, 0], [3.6, 3.6, 0]]


@pytest.mark.parametrize(
    ("atoms", "message"),
    [
        (crystal(FLAT), "does not span"),
        (crystal([[3.6, 0, 0], [0, 3.6, 0], [0, 0, 0]]), "does not span"),
        (crystal(np.zeros((3, 3))), "does not span"),
        (crystal([[3.6, 0, 0], [0, np.nan, 0], [0, 0, 3.6]]), "not finite"),
        (crystal([[np.inf, 0, 0], [0, 3.6, 0], [0, 0, 3.6]]), "not finite"),
        (crystal(positions=np.zeros((4, 3))), r"two atoms at the same place, Cu0 and Cu1 .*6 such pair"),
        (crystal(positions=[[0, 0, 0], [0, 0, 3.61], [1, 1, 1], [2, 2, 2]], cell=np.eye(3) * 3.61), "Cu0 and Cu1"),
        (crystal(positions=[[0, 0, 0], [0, 0, np.nan], [1, 1, 1], [2, 2, 2]]), "non-finite positions"),
        (crystal(numbers=[29, 29, 0, 29]), "atomic number 0"),
    ],
)
def test_structures_that_are_none_are_refused_by_name(atoms, message):
    with pytest.raises(ValueError, match=rf"^train\[3\] .*{message}"):
        check_geometry(atoms, "train[3]")
    with pytest.raises(ValueError, match=message):
        System.from_atoms(atoms)


def test_wrong_structures_in_a_file_are_named_by_every_constructor(tmp_path):
    frames = ase.io.read(TRAIN, ":3")
    frames[2].positions[5] = frames[2].positions[4]
    path = tmp_path / "twice.extxyz"
    ase.io.write(path, frames)
    for name, make in (
        ("train", lambda: ExtxyzDataModule(path)),
        ("starts", lambda: Evaluator(path, TRAIN)),
        ("reference", lambda: Evaluator(TRAIN, path)),
        ("structures", lambda: StABlECallback(structures=path, reference=TRAIN).session.settings.validate()),
    ):
        with pytest.raises(ValueError, match=rf"{name}\[2\] has two atoms at the same place, C4 and C5"):
            make()


def test_which_way_round_the_cell_is_does_not_matter():
    atoms = crystal()
    mirrored = atoms.copy()
    mirrored.cell = atoms.cell[[1, 0, 2]]
    assert np.linalg.det(mirrored.cell) < 0
    first, second = System.from_atoms(atoms), System.from_atoms(mirrored)
    positions = torch.tensor(atoms.positions)
    torch.testing.assert_close(first.distances(positions, first.bonds), second.distances(positions, second.bonds))
    assert first.minimum_image_cutoff == pytest.approx(second.minimum_image_cutoff)


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    path = tmp_path_factory.mktemp("database") / "frames.aselmdb"
    write_aselmdb(path, ase.io.read(TRAIN, ":4"))
    return path.read_bytes()


def test_a_database_is_refused_wherever_it_was_cut(database, tmp_path):
    expected = [frame.positions for frame in read_frames(write(tmp_path / "whole.aselmdb", database))]
    assert len(expected) == 4
    n_refused = 0
    for cut in cuts(database, 12):
        path = write(tmp_path / "cut.aselmdb", cut)
        try:
            found = [frame.positions for frame in read_frames(path, "train")]
        except ValueError as error:
            # Its first page alone is an empty database.
            message = r"(?s)train='.*' (cannot be read .*: pass a complete database|contains no structure)"
            assert re.match(message, str(error)) and str(path) in str(error)
            n_refused += 1
        else:  # it was cut in pages that nothing is in
            np.testing.assert_array_equal(found, expected)
        assert path.read_bytes() == cut
    assert n_refused >= 10


def test_a_damaged_database_is_refused_or_read_and_never_kills_the_process(database, tmp_path):
    chance = random.Random(0)
    for _ in range(12):
        place, length = chance.randrange(len(database)), chance.choice([1, 8, 300])
        damaged = bytearray(database)
        damaged[place : place + length] = chance.randbytes(len(damaged[place : place + length]))
        path = write(tmp_path / "damaged.aselmdb", bytes(damaged))
        try:
            read_labeled(path, "train", "energy", "forces")
        except ValueError as error:
            assert re.match(r"train(='.*' cannot be read|\[\d+\] has|='.*' contains no)", str(error)), error
        assert path.read_bytes() == damaged


def write(path, content):
    path.write_bytes(content)
    return path


def test_a_mace_model_is_refused_wherever_it_was_cut(tmp_path):
    save_mace(tiny_mace([1, 8]), tmp_path / "whole.model")
    content = (tmp_path / "whole.model").read_bytes()
    for cut in cuts(content):
        refused(
            load_potential,
            tmp_path / "cut.model",
            cut,
            "does not load under the installed e3nn .*check that the file is",
        )


def test_a_fairchem_checkpoint_is_refused_wherever_it_was_cut(tmp_path):
    model = FairchemModel.from_configs(network("esen"), tasks("esen"), task_name="omol")
    save_fairchem(model, tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    for cut in cuts(content):
        refused(
            load_potential,
            tmp_path / "cut.pt",
            cut,
            "cannot be read as a fairchem checkpoint .*pass the inference_ckpt",
        )


class Plain:
    """Reads as Lightning does."""

    def load_checkpoint(self, path, map_location=None, weights_only=None):
        return torch.load(path, map_location=map_location, weights_only=weights_only)


def saved(path, extra=None):
    torch.save(
        {"state_dict": {"weight": torch.randn(50, 50)}, "callbacks": {"StABlECallback": {"windows": [1, 2]}}}, path
    )
    return path.read_bytes()


def test_a_lightning_checkpoint_is_refused_wherever_it_was_cut(tmp_path):
    content = saved(tmp_path / "whole.ckpt")
    assert set(AtomicCheckpointIO(Plain()).load_checkpoint(tmp_path / "whole.ckpt")) == {"state_dict", "callbacks"}
    for cut in cuts(content):
        refused(
            AtomicCheckpointIO(Plain()).load_checkpoint,
            tmp_path / "cut.ckpt",
            cut,
            r"^checkpoint '.*' is (cut off|not made of)",
        )


class Unit:
    """What is known of fairchem's unit when a run goes on."""

    def __init__(self, folder):
        self.lazy_state_location = str(folder)


class Session:
    """Takes up a state."""

    taken = None

    def load_state_dict(self, state):
        self.taken = state


def test_the_state_in_a_fairchem_checkpoint_is_refused_wherever_it_was_cut(tmp_path):
    content, session = saved(tmp_path / STATE_FILE), Session()
    assert load_with(Unit(tmp_path), session) and session.taken is not None
    for cut in cuts(content):
        session = Session()
        message = r"^state of StABlE training '.*' is (cut off or damaged|not made of)"
        refused(lambda path, taker=session: load_with(Unit(path.parent), taker), tmp_path / STATE_FILE, cut, message)
        assert session.taken is None


@pytest.mark.parametrize("content", [b"hello", pickle.dumps([1]), b"PK\x03\x04" + bytes(100), bytes(1000)])
def test_a_file_of_another_kind_is_no_checkpoint(tmp_path, content):
    refused(load_tensors, tmp_path / "other.ckpt", content, "is (cut off or damaged|not made of)")
