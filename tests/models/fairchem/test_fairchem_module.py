"""fairchem models under Lightning: supervised training, the callback, checkpoints."""

import pytest
import torch
from fairchem_tools import network, write_aselmdb
from pytorch_lightning import Trainer

from stable_plugin import Execution, Schedule, StABlECallback, System
from stable_plugin.integrations.lightning import ExtxyzDataModule
from stable_plugin.md.labels import read_labeled
from stable_plugin.models.fairchem import FairchemModule
from stable_plugin.models.fairchem.files import load_fairchem


def module(**changes):
    config = network("esen")
    settings = {"backbone": config["backbone"], "heads": config["heads"], "task_name": "omol", "charge": 0, "spin": 1}
    return FairchemModule(**{**settings, "lr": 0.003, **changes})


def trainer(folder, *callbacks, **changes):
    settings = {
        "max_epochs": 2, "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
        "default_root_dir": folder, "accelerator": "cpu", "enable_checkpointing": False,
    }  # fmt: skip
    return Trainer(callbacks=list(callbacks), **{**settings, **changes})


@pytest.fixture
def data(aspirin_frames):
    return ExtxyzDataModule(train=aspirin_frames[:8], valid=aspirin_frames[8:12], batch_size=4)


def test_fit_lowers_loss_and_opens_in_fairchem(tmp_path, aspirin_frames):
    data = ExtxyzDataModule(train=aspirin_frames[:40], valid=aspirin_frames[40:], batch_size=10)
    ours = module()
    run = trainer(tmp_path, max_epochs=1)
    run.fit(ours, data)
    before = run.callback_metrics["valid/loss"].item()
    run = trainer(tmp_path, max_epochs=18, check_val_every_n_epoch=18)
    run.fit(ours, data)
    assert run.callback_metrics["valid/loss"].item() < 0.9 * before
    assert {"valid/energy_mae", "valid/forces_mae", "train/loss"} <= set(run.callback_metrics)
    ours.save_potential(tmp_path / "after.pt")

    from fairchem.core import FAIRChemCalculator
    from fairchem.core.units.mlip_unit import load_predict_unit

    atoms = aspirin_frames[0].copy()
    atoms.info = {"charge": 0, "spin": 1}
    atoms.calc = FAIRChemCalculator(load_predict_unit(tmp_path / "after.pt", device="cpu"), task_name="omol")
    # Element references from the data: without them the energy would be off by more than a thousand eV.
    assert atoms.get_potential_energy() == pytest.approx(aspirin_frames[0].info["REF_energy"], abs=20.0)


def test_validation_errors_equal_the_potential(tmp_path, data):
    ours = module()
    run = trainer(tmp_path)
    run.fit(ours, data)
    frames = data.valid_frames
    potential = ours.stable_potential(System.from_atoms(frames[0]))
    positions = torch.tensor([frame.positions for frame in frames]).float()
    with potential.frozen():
        energies, forces = potential.energies_and_forces(positions, potential.edges(positions))
    expected = torch.tensor([frame.arrays["REF_forces"] for frame in frames])
    assert run.callback_metrics["valid/forces_mae"].item() == pytest.approx(
        (forces - expected).abs().mean().item(), rel=1e-4
    )
    total = energies + potential.constant_energy
    labels = torch.tensor([frame.info["REF_energy"] for frame in frames])
    assert run.callback_metrics["valid/energy_mae"].item() == pytest.approx(
        ((total - labels).abs().mean() / 21).item(), rel=1e-2
    )


def test_callback_repairs_within_fit(tmp_path, data):
    callback = StABlECallback(
        start_epoch=1,
        n_replicas=2,
        window_ps=0.05,
        steps_per_window=2,
        schedule=Schedule(max_failures_per_ns=5000.0, max_windows=1),
    )
    ours = module()
    trainer(tmp_path, callback, max_epochs=10).fit(ours, data)
    assert callback.session.done
    assert callback.loop.potential.module is ours.model.network


def test_checkpoint_loads_without_data(tmp_path, data):
    ours = module()
    run = trainer(tmp_path)
    run.fit(ours, data)
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = FairchemModule.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    for mine, saved in zip(ours.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(mine, saved)


def test_fine_tuning_keeps_tasks_of_checkpoint(tmp_path, data):
    ours = module()
    trainer(tmp_path).fit(ours, data)
    ours.save_potential(tmp_path / "pretrained.pt")
    tuned = FairchemModule(checkpoint=tmp_path / "pretrained.pt", charge=0, spin=1, lr=1e-4)
    scales = [float(task.normalizer.rmsd) for task in tuned.tasks]
    trainer(tmp_path, max_epochs=1).fit(tuned, data)
    assert scales == [float(task.normalizer.rmsd) for task in ours.tasks]
    tuned.save_potential(tmp_path / "tuned.pt")
    assert load_fairchem(tmp_path / "tuned.pt").dataset == "omol"


def test_shift_energies_is_saved_without_forces(tmp_path, data):
    ours = module()
    trainer(tmp_path).fit(ours, data)
    system = System.from_atoms(data.train_frames[0])
    positions = torch.tensor(data.train_frames[0].positions)[None].float()

    def evaluate(model):
        potential = model.stable_potential(system)
        with potential.frozen():
            energies, forces = potential.energies_and_forces(positions, potential.edges(positions))
        return energies.item() + potential.constant_energy, forces

    before = evaluate(ours)
    ours.shift_energies(0.5)
    ours.save_potential(tmp_path / "shifted.pt")
    for after in (evaluate(ours), evaluate(load_fairchem(tmp_path / "shifted.pt", charge=0, spin=1))):
        assert after[0] == pytest.approx(before[0] + 0.5 * 21, abs=1e-3)
        assert torch.allclose(after[1], before[1], rtol=1e-4, atol=1e-6)


def test_read_labeled_reads_aselmdb(tmp_path, aspirin_frames):
    write_aselmdb(tmp_path / "train.aselmdb", aspirin_frames[:3])
    frames = read_labeled(str(tmp_path / "train.aselmdb"), "train", "energy", "forces")
    assert len(frames) == 3
    assert frames[1].info["REF_energy"] == pytest.approx(aspirin_frames[1].info["REF_energy"])
    assert frames[1].info["charge"] == 0 and frames[1].info["spin"] == 1
    assert abs(frames[2].arrays["REF_forces"] - aspirin_frames[2].arrays["REF_forces"]).max() < 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": None}, r"pass checkpoint=, or backbone= and heads="),
        ({"task_name": None}, r"task_name="),
        ({"lr": -1.0}, r"lr=-1"),
    ],
)
def test_fairchem_module_names_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        module(**arguments)


def test_fit_requires_charge_for_omol(tmp_path, data):
    for frame in data.train_frames:
        del frame.info["charge"]
    with pytest.raises(ValueError, match=r"'omol' needs.*no charge"):
        trainer(tmp_path).fit(module(charge=None), data)


def test_mixed_precision_keeps_simulation_exact(tmp_path, data):
    observable_losses, losses = [], []
    for precision in ("32-true", "bf16-mixed"):
        torch.manual_seed(0)
        ours = module()
        callback = StABlECallback(
            n_replicas=2, window_ps=0.02, record_every_fs=5.0, schedule=Schedule(max_failures_per_ns=20_000.0, max_windows=1),
            execution=Execution(compile=False, threads=1),
        )  # fmt: skip
        run = trainer(tmp_path, callback, max_epochs=1, limit_train_batches=1, precision=precision)
        run.fit(ours, data)
        observable_losses.append(callback.windows[0].observable_loss)
        losses.append(run.callback_metrics["train/loss"].item())
    assert observable_losses[0] == observable_losses[1]
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.05)
