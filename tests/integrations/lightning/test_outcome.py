"""What a run ends with: repaired.ckpt, and warnings about what the user would otherwise miss."""

import logging
from types import SimpleNamespace

import pytest
import torch
from ase.io import read
from pytorch_lightning import seed_everything
from pytorch_lightning.callbacks import ModelCheckpoint
from small_training import TRAIN, short_callback, small_module, trainer

from stable_plugin import BondDeviation, Schedule
from stable_plugin.integrations.lightning import ExtxyzDataModule
from stable_plugin.integrations.lightning.outcome import Baseline

STABLE = {
    "detector": BondDeviation(2.5, 10.0), "window_ps": 0.005,
    "schedule": Schedule(max_failures_per_ns=100_000.0, max_windows=3),
}  # fmt: skip
"""Settings with which the untrained potential counts as stable."""


def fit(folder, frames, *callbacks, valid=None, **changes):
    callback, module = short_callback(**changes), small_module()
    run = trainer(folder, callback, *callbacks, max_epochs=6, enable_checkpointing=bool(callbacks))
    run.fit(module, ExtxyzDataModule(frames, valid, batch_size=5))
    return callback, module


def test_repaired_checkpoint_has_the_final_weights(tmp_path, frames, caplog):
    caplog.set_level(logging.INFO)
    callback, module = fit(tmp_path, frames, **STABLE)
    path = tmp_path / "repaired.ckpt"
    assert callback.repaired_path == str(path)
    assert f"the repaired weights are in '{path}'" in caplog.text
    saved = torch.load(path, weights_only=False)["state_dict"]
    assert all(torch.equal(tensor, saved[name]) for name, tensor in module.state_dict().items())
    assert "not verified" not in caplog.text and "is verified to have less than 100000 failures" in caplog.text


def test_repaired_checkpoint_goes_to_the_checkpoint_folder(tmp_path, frames):
    folder = tmp_path / "checkpoints"
    callback, _ = fit(tmp_path, frames, ModelCheckpoint(folder), **STABLE)
    assert callback.repaired_path == str(folder / "repaired.ckpt")
    assert (folder / "repaired.ckpt").is_file()


def test_repaired_checkpoint_overwrites_no_file(tmp_path, frames):
    (tmp_path / "repaired.ckpt").write_text("mine")
    callback, _ = fit(tmp_path, frames, **STABLE)
    assert (tmp_path / "repaired.ckpt").read_text() == "mine"
    assert callback.repaired_path == str(tmp_path / "repaired-v1.ckpt")


def test_repaired_checkpoint_resumes_as_done(tmp_path, frames):
    callback, module = fit(tmp_path, frames, **STABLE)
    resumed, other = short_callback(**STABLE), small_module()
    run = trainer(tmp_path, resumed, max_epochs=9)
    run.fit(other, ExtxyzDataModule(frames, batch_size=5), ckpt_path=callback.repaired_path, weights_only=False)
    assert resumed.loop.phase == "done"
    assert len(resumed.windows) == len(callback.windows)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in module.state_dict().items())


class Growing(ModelCheckpoint):
    """Monitors a loss that only grows: the best checkpoint is the one from before the first StABlE step."""

    def on_validation_end(self, run, module):
        run.callback_metrics["grows"] = torch.tensor(float(run.current_epoch))
        super().on_validation_end(run, module)


TWO_WINDOWS = {"schedule": Schedule(max_failures_per_ns=30_000.0, max_windows=2), "start_epoch": 2}


def assert_holds(path, module):
    saved = torch.load(path, weights_only=False)["state_dict"]
    assert all(torch.equal(tensor, saved[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("save_last", [True, "link"])
def test_best_and_last_become_the_repaired_weights(tmp_path, frames, caplog, save_last):
    best = Growing(tmp_path / "best", "best", monitor="grows", mode="min", save_last=save_last)
    callback, module = fit(tmp_path, frames, best, valid=frames[:2], **TWO_WINDOWS)
    assert sum(record.steps for record in callback.windows) > 0
    for name in ("best", "last", "repaired"):
        assert_holds(tmp_path / "best" / f"{name}.ckpt", module)
    kept = tmp_path / "best" / "best-not-repaired.ckpt"
    assert torch.load(kept, weights_only=False)["epoch"] == 0
    assert f"best checkpoint by grows is not repaired and is kept as '{kept}'" in caplog.text
    assert best.best_model_path == str(tmp_path / "best" / "best.ckpt")


def test_best_checkpoint_named_after_its_score_is_kept(tmp_path, frames, caplog):
    best = Growing(tmp_path / "best", "{epoch}-{grows:.1f}", monitor="grows", mode="min")
    callback, module = fit(tmp_path, frames, best, valid=frames[:2], **TWO_WINDOWS)
    kept = tmp_path / "best" / "epoch=0-grows=0.0.ckpt"
    assert best.best_model_path == callback.repaired_path
    assert_holds(best.best_model_path, module)
    assert torch.load(kept, weights_only=False)["epoch"] == 0
    assert f"kept as '{kept}': from here on the best checkpoint is {callback.repaired_path!r}" in caplog.text


def test_best_checkpoint_stays_without_a_repair(tmp_path, frames):
    best = Growing(tmp_path / "best", "best", monitor="grows", mode="min")
    schedule = Schedule()
    callback, _ = fit(tmp_path, frames, best, valid=frames[:2], start_epoch=4, schedule=schedule)
    assert callback.repaired_path is None
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["best.ckpt"]


def test_end_without_verification_is_reported(tmp_path, frames, caplog):
    schedule = Schedule(max_failures_per_ns=30_000.0)
    callback = short_callback(schedule=schedule, min_ess_fraction=0.01)
    trainer(tmp_path, callback, max_epochs=1).fit(small_module(), ExtxyzDataModule(frames, batch_size=5))
    assert callback.loop.phase != "done"
    message = caplog.records[-1].getMessage()
    assert (
        "not verified to have less than 30000 failures per ns: training ended before the next verification" in message
    )
    assert "It would take 0.0315 ps per replica without a further failure to verify it" in message
    assert callback.repaired_path is None and not list(tmp_path.glob("repaired*"))


def test_max_windows_is_not_a_verification(tmp_path, frames, caplog):
    callback, _ = fit(tmp_path, frames)
    assert callback.loop.phase == "done" and callback.windows[-1].phase == "probe"
    assert callback.repaired_path is not None
    last = callback.windows[-1]
    message = caplog.records[-1].getMessage()
    assert "not verified to have less than 30000 failures per ns: max_windows is reached" in message
    assert (
        f"{last.failures} failure(s) in {last.exposure_ps:.4g} ps of all replicas, at most {last.bound_per_ns:.3g}"
        in message
    )


@pytest.mark.parametrize(("start_epoch", "warns"), [(2, False), (3, True), (9, True)])
def test_start_epoch_beyond_the_run_is_reported(tmp_path, frames, caplog, start_epoch, warns):
    callback = short_callback(start_epoch=start_epoch, **STABLE)
    trainer(tmp_path, callback, max_epochs=3).fit(small_module(), ExtxyzDataModule(frames, batch_size=5))
    assert (f"start_epoch={start_epoch} is not below max_epochs=3" in caplog.text) == warns
    assert (callback.windows == []) == warns


@pytest.mark.parametrize(("max_steps", "batches", "warns"), [(2, 1, True), (3, 1, False), (2, 2, True), (1, 2, True)])
def test_start_epoch_beyond_the_last_step_is_reported(tmp_path, frames, caplog, max_steps, batches, warns):
    callback = short_callback(start_epoch=2, **STABLE)
    run = trainer(tmp_path, callback, max_epochs=-1, max_steps=max_steps, accumulate_grad_batches=batches)
    # One optimizer step in each epoch, whether of one batch or of two.
    run.fit(small_module(), ExtxyzDataModule(frames, batch_size=-(-len(frames) // batches)))
    assert (f"start_epoch=2 is not below max_steps={max_steps} ({max_steps} epochs)" in caplog.text) == warns
    assert (callback.windows == []) == warns


def run_with(**metrics):
    return SimpleNamespace(
        callback_metrics={name: torch.tensor(value) for name, value in metrics.items()}, checkpoint_callbacks=[]
    )


@pytest.mark.parametrize(
    ("name", "before", "after", "warns"),
    [
        ("val/forces_mae", 1.0, 1.05, False),
        ("val/forces_mae", 1.0, 1.2, True),
        ("val0_epoch/forces_rmse", 1.0, float("nan"), True),
        ("val/energy_mae", 1.0, 1.9, False),
        ("val/energy_mae", 1.0, 2.1, True),
        ("val0_epoch/per_atom_energy_rmse", 15.0, 118.0, True),
        ("train/forces_mae", 1.0, 9.0, False),
        ("val/loss", 1.0, 9.0, False),
    ],
)
def test_worse_energies_and_forces_are_reported(caplog, name, before, after, warns):
    baseline = Baseline()
    baseline.record(run_with(**{name: before}))
    baseline.record(run_with(**{name: 100.0 * before}))  # only the first counts
    restored = Baseline()
    restored.load_state_dict(baseline.state_dict())
    for each in (baseline, restored):
        caplog.clear()
        each.warn_worse(run_with(**{name: after}))
        assert (f"{name} was {before:.4g} before the first StABlE step" in caplog.text) == warns


def test_worse_forces_of_a_run_are_reported(tmp_path, frames, caplog):
    schedule = Schedule(max_failures_per_ns=30_000.0, max_windows=3)
    valid = read(TRAIN, "10:14")
    seed_everything(0)
    # The learning rate is far too high, so the steps spoil the fit.
    callback, module = fit(tmp_path, frames, valid=valid, start_epoch=1, learning_rate=1.0, schedule=schedule)
    before = callback._baseline.metrics["valid/forces_mae"]
    after = module.trainer.callback_metrics["valid/forces_mae"].item()
    assert after > 1.1 * before > 0.0
    expected = (
        f"valid/forces_mae was {before:.4g} before the first StABlE step and is {after:.4g} now, more than 1.1 times"
    )
    assert any(record.getMessage().startswith(expected) for record in caplog.records)
