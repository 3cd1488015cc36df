"""Truncated, damaged and wrong files are refused by name with the remedy, and left unchanged."""

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
from stable_plugin.md.frames import read_frames
from stable_plugin.md.geometry import check_geometry
from stable_plugin.md.labels import read_labeled
from stable_plugin.models import load_potential
from stable_plugin.models.fairchem.files import FairchemModel, save_fairchem
from stable_plugin.models.mace import save_mace
from stable_plugin.runtime.serialization import load_tensors

DATA = Path(__file__).parents[2] / "recipes" / "data"
TRAIN = DATA / "aspirin_train.extxyz"
CUTS = 25


def cuts(content, number=CUTS, seed=0):
    """Return truncations of a file at random lengths, the shortest and the longest among them."""
    chance = random.Random(seed)
    lengths = [0, 1, len(content) - 1, *(chance.randrange(len(content)) for _ in range(number - 3))]
    return [content[:length] for length in lengths]


def assert_refused(read, path, content, message):
    """Assert that a file with the content is refused by its name, and is unchanged afterwards."""
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"(?s){message}") as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == content


def test_truncated_extxyz_is_refused(tmp_path):
    lines = TRAIN.read_bytes().splitlines(keepends=True)
    content = b"".join(lines[: 2 * 23])
    whole = {0, len(b"".join(lines[:23]))}
    for cut in cuts(content, 60):
        if len(cut) not in whole:
            message = r"^train='.*' (cannot be read .*: pass a complete extxyz file|contains no structure)"
            assert_refused(lambda path: read_frames(path, "train"), tmp_path / "cut.extxyz", cut, message)


def test_constructors_name_the_damaged_argument(tmp_path):
    path = tmp_path / "cut.extxyz"
    path.write_bytes(TRAIN.read_bytes()[:-30])
    for name, make in (
        ("structures", lambda: StABlECallback(structures=path)),
        ("reference", lambda: StABlECallback(reference=path)),
        ("train", lambda: ExtxyzDataModule(path)),
        ("valid", lambda: ExtxyzDataModule(TRAIN, path)),
        ("starts", lambda: Evaluator(path)),
        ("labeled", lambda: Evaluator(TRAIN, labeled=path)),
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
def test_invalid_extxyz_is_refused(tmp_path, old, new):
    content = TRAIN.read_text().replace(old, new, 1).encode()
    assert_refused(lambda path: read_frames(path), tmp_path / "odd.extxyz", content, "cannot be read")


def test_invalid_labels_are_named():
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
def test_invalid_structures_are_refused(atoms, message):
    with pytest.raises(ValueError, match=rf"^train\[3\] .*{message}"):
        check_geometry(atoms, "train[3]")
    with pytest.raises(ValueError, match=message):
        System.from_atoms(atoms)


def test_constructors_name_invalid_structures(tmp_path):
    frames = ase.io.read(TRAIN, ":3")
    frames[2].positions[5] = frames[2].positions[4]
    path = tmp_path / "twice.extxyz"
    ase.io.write(path, frames)
    for name, make in (
        ("train", lambda: ExtxyzDataModule(path)),
        ("starts", lambda: Evaluator(path, TRAIN)),
        ("reference", lambda: Evaluator(TRAIN, path)),
        ("structures", lambda: StABlECallback(structures=path, reference=TRAIN).validate()),
    ):
        with pytest.raises(ValueError, match=rf"{name}\[2\] has two atoms at the same place, C4 and C5"):
            make()


def test_left_handed_cell_is_equivalent():
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


def test_truncated_database_is_refused(database, tmp_path):
    expected = [frame.positions for frame in read_frames(write(tmp_path / "whole.aselmdb", database))]
    assert len(expected) == 4
    n_refused = 0
    for cut in cuts(database, 12):
        path = write(tmp_path / "cut.aselmdb", cut)
        try:
            found = [frame.positions for frame in read_frames(path, "train")]
        except ValueError as error:
            # The first page alone is an empty database.
            message = r"(?s)train='.*' (cannot be read .*: pass a complete database|contains no structure)"
            assert re.match(message, str(error)) and str(path) in str(error)
            n_refused += 1
        else:  # only unused pages are missing
            np.testing.assert_array_equal(found, expected)
        assert path.read_bytes() == cut
    assert n_refused >= 10


def test_damaged_database_never_crashes(database, tmp_path):
    chance = random.Random(0)
    for _ in range(12):
        place, length = chance.randrange(len(database)), chance.choice([1, 8, 300])
        damaged = bytearray(database)
        damaged[place : place + length] = chance.randbytes(len(damaged[place : place + length]))
        path = write(tmp_path / "damaged.aselmdb", bytes(damaged))
        try:
            read_labeled(path, "train", "energy", "forces")
        except ValueError as error:
            assert re.match(r"train(='.*' cannot be read|\[\d+\] has|='.*' holds no)", str(error)), error
        assert path.read_bytes() == damaged


def write(path, content):
    path.write_bytes(content)
    return path


def test_truncated_mace_model_is_refused(tmp_path):
    save_mace(tiny_mace([1, 8]), tmp_path / "whole.model")
    content = (tmp_path / "whole.model").read_bytes()
    for cut in cuts(content):
        assert_refused(
            load_potential,
            tmp_path / "cut.model",
            cut,
            "does not load under the installed e3nn .*check that the file is",
        )


def test_truncated_fairchem_checkpoint_is_refused(tmp_path):
    model = FairchemModel.from_configs(network("esen"), tasks("esen"), task_name="omol")
    save_fairchem(model, tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    for cut in cuts(content):
        assert_refused(
            load_potential,
            tmp_path / "cut.pt",
            cut,
            "cannot be read as a fairchem checkpoint .*pass the inference_ckpt",
        )


class Plain:
    """Reads as Lightning does, and checks what it reads."""

    def load_checkpoint(self, path, map_location=None, weights_only=None):
        return torch.load(path, map_location=map_location, weights_only=weights_only)


def saved(path, extra=None):
    torch.save(
        {"state_dict": {"weight": torch.randn(50, 50)}, "callbacks": {"StABlECallback": {"windows": [1, 2]}}}, path
    )
    return path.read_bytes()


def test_truncated_lightning_checkpoint_is_refused(tmp_path):
    content = saved(tmp_path / "whole.ckpt")
    assert set(AtomicCheckpointIO(Plain()).load_checkpoint(tmp_path / "whole.ckpt")) == {"state_dict", "callbacks"}
    for cut in cuts(content):
        assert_refused(
            AtomicCheckpointIO(Plain()).load_checkpoint,
            tmp_path / "cut.ckpt",
            cut,
            r"^checkpoint '.*' (is truncated|contains more than)",
        )


class Unit:
    """The part of fairchem's unit that is used when a run resumes."""

    def __init__(self, folder):
        self.lazy_state_location = str(folder)


class Session:
    """Records the loaded state."""

    loaded = None

    def load_state_dict(self, state):
        self.loaded = state


def test_truncated_stable_state_is_refused(tmp_path):
    content, session = saved(tmp_path / STATE_FILE), Session()
    assert load_with(Unit(tmp_path), session) and session.loaded is not None
    for cut in cuts(content):
        session = Session()
        message = r"^state of StABlE training '.*' (is truncated or damaged|contains more than)"
        assert_refused(
            lambda path, session=session: load_with(Unit(path.parent), session), tmp_path / STATE_FILE, cut, message
        )
        assert session.loaded is None


@pytest.mark.parametrize("content", [b"hello", pickle.dumps([1]), b"PK\x03\x04" + bytes(100), bytes(1000)])
def test_file_of_another_kind_is_refused(tmp_path, content):
    assert_refused(load_tensors, tmp_path / "other.ckpt", content, "(is truncated or damaged|contains more than)")


class Strict:
    """Raises its own error about the keys of an intact checkpoint, as loaders of other packages do."""

    def load_checkpoint(self, path, weights_only=None):
        keys = set(torch.load(path, weights_only=weights_only))
        raise RuntimeError(f"Error(s) in loading state_dict: unexpected keys {sorted(keys)}")


def test_error_of_an_intact_checkpoint_keeps_its_words(tmp_path):
    content = saved(tmp_path / "foreign.ckpt")
    reader = AtomicCheckpointIO(Strict())
    with pytest.raises(
        RuntimeError, match=r"^Error\(s\) in loading state_dict: unexpected keys \['callbacks', 'state_dict'\]$"
    ):
        reader.load_checkpoint(tmp_path / "foreign.ckpt")
    damaged = bytearray(content)
    damaged[len(content) // 2] ^= 255
    assert_refused(
        reader.load_checkpoint,
        tmp_path / "damaged.ckpt",
        bytes(damaged),
        "(is truncated or damaged|contains more than)",
    )


def test_untrusted_checkpoint_names_class_and_remedy(tmp_path):
    torch.save({"hyper_parameters": Path("a")}, tmp_path / "foreign.ckpt")
    message = r"(?s)contains more than tensors.*PosixPath.*Trainer\.fit\(\.\.\., weights_only=False\)"
    with pytest.raises(ValueError, match=message):
        AtomicCheckpointIO(Plain()).load_checkpoint(tmp_path / "foreign.ckpt", weights_only=True)
