"""SevenNet-0 fine-tuned and repaired in miniature: silicon with the labels of another potential."""

import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.tersoff import Tersoff, TersoffParameters
from pytorch_lightning import Trainer

from stable_plugin import ExtxyzDataModule, Langevin, RunawayTemperature, Schedule, StABlECallback
from stable_plugin.models import FineTuningModule

pytest.importorskip("sevenn")

TEMPERATURE = 600.0
SILICON = TersoffParameters(
    m=3.0, gamma=1.0, lambda3=0.0, c=1.0039e5, d=16.217, h=-0.59825, n=0.78734, beta=1.1e-6, lambda2=1.73222, B=471.18,
    R=2.85, D=0.15, lambda1=2.4799, A=1830.8,
)  # fmt: skip


def silicon(n=6):
    """Return frames of eight atoms with the energies and forces of Tersoff's potential."""
    frames = []
    for seed in range(n):
        atoms = bulk("Si", cubic=True)
        atoms.rattle(0.08, seed=seed)
        atoms.calc = Tersoff({("Si", "Si", "Si"): SILICON})
        frame = atoms.copy()
        frame.info["REF_energy"], frame.arrays["REF_forces"] = atoms.get_potential_energy(), atoms.get_forces()
        frames.append(frame)
    return frames


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return frames, energies before training, and the module, the callback and metrics after three epochs, two of StABlE."""
    frames, folder = silicon(), tmp_path_factory.mktemp("run")
    module = FineTuningModule("7net-0", lr=2e-4)
    module.prepare(frames)
    untrained = module.total_energies(frames)
    callback = StABlECallback(
        objective="boltzmann",
        reference=frames,
        integrator=Langevin(TEMPERATURE, 2.0, 5.0),
        detector=RunawayTemperature(0.5 * TEMPERATURE),  # all replicas are above it
        n_replicas=2,
        window_ps=0.02,
        record_every_fs=4.0,
        check_every_fs=4.0,
        steps_per_window=2,
        chunk=4,
        start_epoch=1,
        schedule=Schedule(max_failures_per_ns=30_000.0, max_windows=1),
    )
    trainer = Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=[callback],
    )  # fmt: skip
    data = ExtxyzDataModule(frames, frames, batch_size=3)
    (before,) = trainer.validate(module, data, verbose=False)
    trainer.fit(module, data)
    return frames, untrained, module, callback, {"before": before, "after": trainer.callback_metrics}


def test_labels_of_another_code_move_the_isolated_atoms(trained):
    frames, untrained, *_ = trained
    errors = np.array(untrained) - [frame.info["REF_energy"] for frame in frames]
    assert abs(errors.mean()) < 1e-3  # eV in 8 atoms, in single precision
    assert errors.std() > 0.01


def test_fine_tuning_and_repair_lower_force_errors(trained):
    *_, callback, metrics = trained
    assert [window.phase for window in callback.windows] == ["probe", "learn", "probe"]
    assert callback.windows[-1].observable_loss > 0.0
    assert metrics["after"]["valid/forces_mae"] < metrics["before"]["valid/forces_mae"]


def test_file_opens_in_the_calculator_of_sevennet(trained, tmp_path):
    calculator = pytest.importorskip("sevenn.calculator").SevenNetCalculator
    frames, _, module, *_ = trained
    module.save_potential(tmp_path / "repaired.pth")
    atoms = frames[0].copy()
    atoms.calc = calculator(str(tmp_path / "repaired.pth"), device="cpu")
    assert atoms.get_potential_energy() == pytest.approx(module.total_energies(frames[:1])[0], abs=1e-4)
