"""MACEModule and ExtxyzDataModule: the results of MACE itself, trained by Lightning."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.io import read
from mace import data as mace_data
from mace import modules
from mace.calculators import MACECalculator
from mace.tools import AtomicNumberTable
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import EMAWeightAveraging

from stable_plugin.integrations.lightning import ExtxyzDataModule
from stable_plugin.models.mace import MACEModule, save_mace

DATA = Path(__file__).parents[3] / "recipes" / "data"
SMALL = {"r_max": 4.0, "hidden_irreps": "4x0e", "max_ell": 1, "correlation": 1, "radial_MLP": [8]}


@pytest.fixture(scope="module")
def frames():
    return read(DATA / "aspirin_train.extxyz", ":10")


def fit(module, data, *callbacks, epochs=3, **settings):
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=bool(settings.pop("folder", None)),
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks), **settings,
    )  # fmt: skip
    trainer.fit(module, data)
    return trainer


def test_new_model_is_scaled_as_by_mace(frames):
    module = MACEModule(**SMALL, dtype="float64")
    fit(module, ExtxyzDataModule(frames, batch_size=5), epochs=1)
    keys = mace_data.KeySpecification(info_keys={"energy": "REF_energy"}, arrays_keys={"forces": "REF_forces"})
    configs = [mace_data.config_from_atoms(frame, keys) for frame in frames]
    expected = mace_data.compute_average_E0s(configs, AtomicNumberTable([1, 6, 8]))
    energies = module.model.atomic_energies_fn.atomic_energies.squeeze().tolist()
    assert energies == pytest.approx([expected[z] for z in (1, 6, 8)], rel=1e-12)
    forces = np.concatenate([frame.arrays["REF_forces"] for frame in frames])
    assert module.model.scale_shift.scale.item() == pytest.approx(np.sqrt((forces**2).mean()), rel=1e-9)
    neighbors = [(frame.get_all_distances() < 4.0).sum() / len(frame) - 1 for frame in frames]
    assert module.model.interactions[0].avg_num_neighbors == pytest.approx(np.mean(neighbors), rel=1e-9)


def test_fit_lowers_loss_and_steps_scheduler(frames):
    halve = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    module = MACEModule(**SMALL, scheduler=halve)
    data = ExtxyzDataModule(frames, frames, batch_size=5)
    losses = []
    module.on_validation_epoch_end = lambda: losses.append(module.trainer.callback_metrics["valid/forces_mae"].item())
    trainer = fit(module, data, epochs=5, num_sanity_val_steps=0)
    assert losses[-1] < losses[0]
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01 * 0.5**5)


def test_validation_metrics_equal_calculator(frames, tmp_path):
    module = MACEModule(**SMALL, dtype="float64")
    valid = read(DATA / "aspirin_valid.extxyz", ":4")
    trainer = fit(module, ExtxyzDataModule(frames, valid, batch_size=3), epochs=1)
    save_mace(module.model, tmp_path / "trained.model")
    calculator = MACECalculator(str(tmp_path / "trained.model"), device="cpu", default_dtype="float64")
    force_errors, energy_errors = [], []
    for frame in valid:
        atoms = frame.copy()
        atoms.calc = calculator
        force_errors.append(atoms.get_forces() - frame.arrays["REF_forces"])
        energy_errors.append((atoms.get_potential_energy() - frame.info["REF_energy"]) / len(frame))
    metrics = trainer.callback_metrics
    assert metrics["valid/forces_mae"].item() == pytest.approx(np.abs(force_errors).mean(), rel=1e-5)
    assert metrics["valid/forces_rmse"].item() == pytest.approx(np.sqrt(np.square(force_errors).mean()), rel=1e-5)
    assert metrics["valid/energy_mae"].item() == pytest.approx(np.abs(energy_errors).mean(), rel=1e-5)


def test_shift_energies_is_saved_without_forces(frames, tmp_path):
    module = MACEModule(**SMALL)
    fit(module, ExtxyzDataModule(frames, frames[:4], batch_size=4))
    module.save_potential(tmp_path / "before.model")
    module.shift_energies(0.5)
    module.save_potential(tmp_path / "after.model")
    atoms = frames[0].copy()
    energies, forces = [], []
    for name in ("before", "after"):
        atoms.calc = MACECalculator(str(tmp_path / f"{name}.model"), device="cpu", default_dtype="float64")
        energies.append(atoms.get_potential_energy())
        forces.append(atoms.get_forces())
    assert energies[1] - energies[0] == pytest.approx(0.5 * len(atoms), abs=1e-2)
    np.testing.assert_array_equal(*forces)


def test_fit_with_lightning_weight_averaging(frames):
    module = MACEModule(**SMALL)
    seen = []

    class Watch(EMAWeightAveraging):
        def on_train_batch_end(self, trainer, pl_module, *arguments):
            super().on_train_batch_end(trainer, pl_module, *arguments)
            seen.append(torch.cat([p.detach().flatten() for p in pl_module.parameters()]))

    fit(module, ExtxyzDataModule(frames, batch_size=5), Watch(decay=0.5), epochs=2)
    average = seen[0]
    for weights in seen[1:]:
        average = 0.5 * average + 0.5 * weights
    final = torch.cat([p.detach().flatten() for p in module.parameters()])
    assert not torch.allclose(final, seen[-1])
    torch.testing.assert_close(final, average, rtol=1e-5, atol=1e-6)


def test_fine_tuning_starts_from_the_model(frames, tmp_path):
    trained = MACEModule(**SMALL)
    fit(trained, ExtxyzDataModule(frames, batch_size=5), epochs=1)
    save_mace(trained.model, tmp_path / "one.model")
    module = MACEModule(tmp_path / "one.model", optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    fit(module, ExtxyzDataModule(frames, batch_size=5), epochs=1)
    assert isinstance(module.model, modules.ScaleShiftMACE)
    for ours, theirs in zip(module.model.parameters(), trained.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_fit_names_unknown_elements(frames):
    module = MACEModule(**SMALL)
    fit(module, ExtxyzDataModule(frames, batch_size=5), epochs=1)
    foreign = frames[0].copy()
    foreign.numbers[0] = 7
    with pytest.raises(ValueError, match=r"element\(s\) N "):
        fit(MACEModule(module.model), ExtxyzDataModule([foreign, foreign]), epochs=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float16"}, "dtype='float16'"),
        ({"scaling": "none"}, "scaling='none'"),
        ({"lr": 0.0}, "lr=0"),
        ({"r_max": -1.0}, "r_max=-1"),
    ],
)
def test_mace_module_names_invalid_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        MACEModule(**{**SMALL, **changes})


def test_fit_names_missing_isolated_energies(frames):
    with pytest.raises(ValueError, match=r"E0s lacks the atomic number\(s\) \[6, 8\]"):
        fit(MACEModule(**SMALL, E0s={1: -10.0}), ExtxyzDataModule(frames), epochs=1)


def test_data_module_names_the_labels_found(tmp_path):
    with pytest.raises(ValueError, match=r"no energy_key='E'.*Found per frame: .*REF_energy.*per atom: .*REF_forces"):
        ExtxyzDataModule(DATA / "aspirin_train.extxyz", energy_key="E")
    with pytest.raises(ValueError, match="no energy_key='REF_energy' and no forces_key='REF_forces'"):
        ExtxyzDataModule([Atoms("H2", [[0, 0, 0], [0, 0, 1]])] * 2)


def test_data_module_requires_two_frames(frames):
    with pytest.raises(ValueError, match="pass at least 2"):
        ExtxyzDataModule(frames[:1])
