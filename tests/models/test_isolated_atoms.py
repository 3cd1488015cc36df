"""Isolated-atom energies and heads: the same for loader, training, simulation and the family's own calculator."""

import copy

import numpy as np
import pytest
import torch
from ase.build import molecule
from mace.calculators import MACECalculator
from small_training import small_module, trainer
from toys import tiny_mace

from stable_plugin.integrations.lightning.data import ExtxyzDataModule
from stable_plugin.md.labels import ENERGY_KEY, FORCES_KEY
from stable_plugin.models.base import default_dtype
from stable_plugin.models.isolated_atoms import fit_offset
from stable_plugin.models.mace import MACEModule
from stable_plugin.models.mace.files import save_mace

SHIFTS = {1: -13.6, 6: -1030.0, 8: -2041.0}
MOLECULES = ("CH3CH2OH", "H2O", "CH4", "CH3OH")


def structures(n_each=2):
    frames = []
    for name in MOLECULES:
        for seed in range(n_each):
            atoms = molecule(name)
            atoms.rattle(0.05, seed=seed)
            frames.append(atoms)
    return frames


def predicted(model, frames, folder, head=None, name="model"):
    """Return energies and forces of MACE's own calculator."""
    path = folder / f"{name}.model"
    save_mace(model, path)
    with default_dtype(torch.get_default_dtype()):  # the calculator changes the default
        calculator = MACECalculator(model_paths=str(path), device="cpu", default_dtype="float64", head=head)
    energies, forces = [], []
    for frame in frames:
        atoms = frame.copy()
        atoms.calc = calculator
        energies.append(atoms.get_potential_energy())
        forces.append(atoms.get_forces())
    return np.array(energies), forces


def labeled(model, folder, shifts=None, noise=0.0):
    """Return structures with the labels of a model, its energies shifted as by another code."""
    frames = structures()
    energies, forces = predicted(model, frames, folder, name="labels")
    rng = np.random.default_rng(0)
    for frame, energy, force in zip(frames, energies, forces, strict=True):
        shift = sum((shifts or {}).get(int(number), 0.0) for number in frame.numbers)
        frame.info[ENERGY_KEY] = energy + shift + noise * len(frame) * rng.normal()
        frame.arrays[FORCES_KEY] = force
    return frames


def test_fit_offset_is_exact_for_several_compositions():
    frames = structures()
    labels = [sum(SHIFTS[int(number)] for number in frame.numbers) for frame in frames]
    offset = fit_offset(frames, np.zeros(len(frames)), labels)
    assert offset.shifts == pytest.approx(SHIFTS, rel=1e-9)
    assert offset.rms_after < 1e-9 < offset.rms
    assert offset.is_of_another_code
    assert offset.mean == pytest.approx(
        -np.mean([label / len(frame) for label, frame in zip(labels, frames, strict=True)])
    )


def test_fit_offset_of_one_composition_has_the_smallest_norm():
    frames = [molecule("H2O")] * 3
    offset = fit_offset(frames, [0.0] * 3, [-6.0] * 3)
    # Minimizes h² + o² under 2 h + o = -6.
    assert offset.shifts == pytest.approx({1: -2.4, 8: -1.2})


def test_errors_of_a_poor_fit_are_not_an_offset():
    frames = structures()
    rng = np.random.default_rng(1)
    errors = [0.3 * len(frame) * rng.normal() for frame in frames]
    assert not fit_offset(frames, np.zeros(len(frames)), errors).is_of_another_code
    assert not fit_offset(frames, np.zeros(len(frames)), [0.001 * len(frame) for frame in frames]).is_of_another_code


def test_as_many_shifts_as_frames_are_not_an_offset():
    frames = structures(1)[:3]
    assert not fit_offset(frames, [0.0] * 3, [9.0, -3.0, 5.0]).is_of_another_code
    assert not fit_offset(frames[:1], [0.0], [9.0]).is_of_another_code
    # Two frames of one composition leave one degree of freedom.
    assert fit_offset([molecule("H2O")] * 2, [0.0, 0.0], [30.0, 30.01]).is_of_another_code
    assert not fit_offset([molecule("H2O")] * 2, [0.0, 0.0], [3.0, -3.0]).is_of_another_code


def test_labels_of_the_same_code_leave_the_model_unchanged(tmp_path, caplog):
    model = tiny_mace([1, 6, 8])
    before = copy.deepcopy(model.state_dict())
    module = MACEModule(model=model)
    module.prepare(labeled(model, tmp_path, noise=0.002))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert "differ" not in caplog.text


@pytest.mark.parametrize("mode", [None, "average", "isolated", "given"])
def test_labels_of_another_code_move_isolated_atoms(mode, tmp_path, caplog):
    model = tiny_mace([1, 6, 8])
    frames = labeled(model, tmp_path, SHIFTS)
    _, forces = predicted(model, frames, tmp_path, name="before")
    own = dict(zip([1, 6, 8], model.atomic_energies_fn.atomic_energies.flatten().tolist(), strict=True))
    wanted = {number: own[number] + shift for number, shift in SHIFTS.items()}
    module = MACEModule(model=model, E0s=wanted if mode == "given" else mode)
    module.prepare(frames, wanted)
    energies, same_forces = predicted(model, frames, tmp_path, name="after")
    np.testing.assert_allclose(energies, [frame.info[ENERGY_KEY] for frame in frames], atol=5e-3)
    np.testing.assert_allclose(np.concatenate(same_forces), np.concatenate(forces), atol=1e-10)
    assert module.isolated_atoms() == pytest.approx(wanted, rel=1e-5)
    assert ("meV/atom on average, as those of two codes do" in caplog.text) == (mode in (None, "average"))


def test_model_mode_keeps_isolated_atoms_of_another_code(tmp_path):
    model = tiny_mace([1, 6, 8])
    frames = labeled(model, tmp_path, SHIFTS)
    before = copy.deepcopy(model.state_dict())
    MACEModule(model=model, E0s="model").prepare(frames)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_isolated_mode_names_missing_elements(tmp_path):
    model = tiny_mace([1, 6, 8])
    with pytest.raises(ValueError, match=r"E0s lacks the atomic number\(s\) \[6, 8\]: add .* frames of isolated atoms"):
        MACEModule(model=model, E0s="isolated").prepare(labeled(model, tmp_path), {1: -13.6})
    with pytest.raises(ValueError, match=r"E0s='model' is for an existing model: pass model="):
        small_module(E0s="model").prepare(labeled(model, tmp_path / ".."))
    with pytest.raises(ValueError, match=r"E0s='foo' is not valid: pass 'average', 'isolated', 'model'"):
        small_module(E0s="foo")


@pytest.mark.parametrize(("mode", "isolated"), [(None, SHIFTS), ("average", SHIFTS), (None, {1: -13.6}), (SHIFTS, {})])
def test_new_model_takes_isolated_atoms(mode, isolated, tmp_path):
    frames = labeled(tiny_mace([1, 6, 8]), tmp_path)
    module = small_module(E0s=mode)
    module.prepare(frames, isolated)
    taken = module.isolated_atoms()
    if mode == SHIFTS or (mode is None and isolated == SHIFTS):
        assert taken == pytest.approx(SHIFTS)
    else:
        counts = np.array([[np.count_nonzero(frame.numbers == number) for number in (1, 6, 8)] for frame in frames])
        fitted = np.linalg.lstsq(counts, [frame.info[ENERGY_KEY] for frame in frames], rcond=None)[0]
        assert list(taken.values()) == pytest.approx(fitted, rel=1e-4)


def test_shift_survives_a_fit_and_its_checkpoint(tmp_path):
    model = tiny_mace([1, 6, 8])
    frames = labeled(model, tmp_path, SHIFTS)
    module = MACEModule(model=model, lr=1e-4)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, ExtxyzDataModule(frames, frames, batch_size=4))
    assert run.callback_metrics["valid/energy_mae"].item() < 0.05
    run.test(module, module.dataloader(frames, 4, shuffle=False), verbose=False)
    assert run.callback_metrics["test/energy_mae"].item() < 0.05


def two_heads():
    return tiny_mace(
        [1, 6, 8],
        heads=["pt_head", "Default"],
        atomic_energies=np.array([[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]]),
        atomic_inter_scale=[1.5, 0.3],
        atomic_inter_shift=[0.1, -0.2],
    )


@pytest.mark.parametrize("head", [None, "pt_head"])
def test_heads_are_the_same_in_training_simulation_and_calculator(head, tmp_path):
    model, frames = two_heads(), structures()
    energies, forces = predicted(model, frames, tmp_path, head)
    other, _ = predicted(model, frames, tmp_path, "Default" if head else "pt_head", "other")
    assert np.abs(energies - other).min() > 1.0
    for frame, energy, force in zip(frames, energies, forces, strict=True):
        frame.info[ENERGY_KEY], frame.arrays[FORCES_KEY] = energy, force
    module = MACEModule(model=model, head=head)
    loader = module.dataloader(frames, len(frames), shuffle=False)
    output = module(next(iter(loader)))
    np.testing.assert_allclose(output["energy"].detach().numpy(), energies, atol=1e-8)
    assert module.total_energies(frames) == pytest.approx(energies, abs=1e-8)
    run = trainer(tmp_path)
    run.test(module, loader, verbose=False)
    assert run.callback_metrics["test/forces_mae"].item() < 1e-8


def test_heads_of_frames_come_first(tmp_path):
    model, frames = two_heads(), structures(1)
    for frame, head in zip(frames, ["pt_head", "Default", "pt_head", "Default"], strict=True):
        frame.info["head"] = head
    expected = [predicted(model, [frame], tmp_path, frame.info["head"], f"{i}")[0][0] for i, frame in enumerate(frames)]
    for frame, energy in zip(frames, expected, strict=True):
        frame.info[ENERGY_KEY], frame.arrays[FORCES_KEY] = energy, np.zeros((len(frame), 3))
    module = MACEModule(model=model)
    output = module(next(iter(module.dataloader(frames, 4, shuffle=False))))
    np.testing.assert_allclose(output["energy"].detach().numpy(), expected, atol=1e-8)
    assert module.total_energies(frames) == pytest.approx(expected, abs=1e-8)
    frames[0].info["head"] = "dft"
    with pytest.raises(ValueError, match=r"head='dft' is not one of the model's heads \['pt_head', 'Default'\]"):
        module.dataloader(frames, 4, shuffle=False)


def test_unknown_head_is_refused_at_once():
    with pytest.raises(ValueError, match=r"head='dft' is not one of the model's heads"):
        MACEModule(model=two_heads(), head="dft")


def test_arguments_of_a_new_model_beside_an_existing_one_are_named(caplog):
    MACEModule(model=tiny_mace([1, 6, 8]))
    assert "not used" not in caplog.text
    MACEModule(model=tiny_mace([1, 6, 8]), r_max=6.0, lr=0.003, dtype="float64")
    assert "r_max=6.0, dtype='float64': not used, because an existing model was passed (model=)" in caplog.text
