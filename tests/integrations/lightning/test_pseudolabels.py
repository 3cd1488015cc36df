"""Frames labeled by the potential itself, against MACE's own calculator."""

import ase.io
import numpy as np
import pytest
import torch
from ase.build import molecule
from small_training import DATA
from toys import tiny_mace

from stable_plugin import PseudoLabeledDataModule
from stable_plugin.md.labels import ENERGY_KEY, FORCES_KEY, STRESS_KEY
from stable_plugin.testing.tools import small_water_box


def frames_of(*names, n_frames=2):
    random = np.random.default_rng(0)
    frames = []
    for name in names:
        for _ in range(n_frames):
            atoms = molecule(name)
            atoms.positions += random.normal(scale=0.05, size=atoms.positions.shape)
            frames.append(atoms)
    return frames


def test_labels_are_those_of_the_model(tmp_path):
    from mace.calculators import MACECalculator

    model = tiny_mace([1, 6, 8])
    path = tmp_path / "tiny.model"
    torch.save(model, path)
    data = PseudoLabeledDataModule(frames_of("H2O", "CH3OH"), path, valid=frames_of("CH4"))
    assert [len(frame) for frame in data.train_frames] == [3, 3, 6, 6]
    calculator = MACECalculator(model_paths=[str(path)], device="cpu", default_dtype="float64")
    for frame in [*data.train_frames, *data.valid_frames]:
        alone = frame.copy()
        alone.calc = calculator
        assert frame.info[ENERGY_KEY] == pytest.approx(alone.get_potential_energy(), rel=1e-9)
        np.testing.assert_allclose(frame.arrays[FORCES_KEY], alone.get_forces(), atol=1e-9)


def test_labeled_frames_are_added():
    labeled = ase.io.read(DATA / "aspirin_valid.extxyz", ":3")
    data = PseudoLabeledDataModule(frames_of("CH4"), tiny_mace([1, 6, 8]), labeled=labeled)
    assert [len(frame) for frame in data.train_frames] == [5, 5, 21, 21, 21]
    assert data.train_frames[-1].info[ENERGY_KEY] == labeled[-1].info[ENERGY_KEY]


def test_frames_are_repeated_to_the_share_of_the_potentials_own_labels():
    labeled = ase.io.read(DATA / "aspirin_valid.extxyz", ":3")
    for share, counts in ((0.5, (3, 3)), (0.25, (2, 6)), (0.8, (12, 3))):
        data = PseudoLabeledDataModule(
            frames_of("CH4"),
            tiny_mace([1, 6, 8]),
            valid=frames_of("CH4"),
            labeled=labeled,
            labeled_valid=labeled,
            share=share,
        )
        assert tuple(sum(len(frame) == n for frame in data.train_frames) for n in (5, 21)) == counts
        assert [len(frame) for frame in data.valid_frames] == [5, 5, 21, 21, 21]


def test_energies_move_to_the_zero_of_labels_of_another_code():
    model = tiny_mace([1, 6, 8])
    plain = PseudoLabeledDataModule(frames_of("CH4", "CO2", n_frames=4), model).train_frames
    moved = [frame.copy() for frame in plain[:4]]
    for frame in moved:  # of CH4: 5 eV from each atom
        frame.info[ENERGY_KEY] += 25.0
    data = PseudoLabeledDataModule(frames_of("CH4", "CO2", n_frames=4), model, labeled=moved)
    shifts = [
        own.info[ENERGY_KEY] - frame.info[ENERGY_KEY] for own, frame in zip(data.train_frames, plain, strict=False)
    ]
    # The shifts of C and H cannot be told apart, and are shared as least squares of smallest norm do: 25 (1, 4) / 17.
    np.testing.assert_allclose(shifts, [25.0] * 4 + [25.0 / 17.0] * 4, atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 1.0, 2, "half"])
def test_a_share_that_leaves_no_rest_is_an_error(share):
    frames = ase.io.read(DATA / "aspirin_valid.extxyz", ":3")
    with pytest.raises((ValueError, TypeError), match="share="):
        PseudoLabeledDataModule(frames_of("CH4"), tiny_mace([1, 6, 8]), labeled=frames, share=share)


def test_a_share_without_labeled_frames_is_an_error():
    with pytest.raises(ValueError, match=r"share=0\.5 needs labeled frames"):
        PseudoLabeledDataModule(frames_of("CH4"), tiny_mace([1, 6]), share=0.5)


def test_stresses_are_those_of_the_model(tmp_path):
    from mace.calculators import MACECalculator

    model = tiny_mace([1, 6, 8])
    torch.save(model, tmp_path / "tiny.model")
    box = small_water_box()
    squeezed = box.copy()
    squeezed.set_cell(box.cell @ np.array([[0.98, 0.01, 0], [0, 1.01, 0], [0, 0, 1]]), scale_atoms=True)
    data = PseudoLabeledDataModule([box, squeezed, *frames_of("CH4")], model, stresses=True)
    calculator = MACECalculator(model_paths=[str(tmp_path / "tiny.model")], device="cpu", default_dtype="float64")
    for frame in data.train_frames[:2]:
        alone = frame.copy()
        alone.calc = calculator
        np.testing.assert_allclose(frame.info[STRESS_KEY], alone.get_stress(voigt=False), atol=1e-9)
    assert not any(STRESS_KEY in frame.info for frame in data.train_frames[2:])  # a molecule has no volume
