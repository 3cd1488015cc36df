"""A run that receives a signal writes a checkpoint and stops; the resumed run equals an uninterrupted one."""

import os
import shutil
import signal
from pathlib import Path

import pytest
from ase.io import read
from killing import assert_same, trained
from pytorch_lightning import Trainer, seed_everything
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins.environments import SLURMEnvironment

from stable_plugin import BondDeviation, Execution, Langevin, Schedule, StABlECallback, StABlEMixin
from stable_plugin.integrations.lightning import ExtxyzDataModule
from stable_plugin.integrations.lightning.mixin import ModuleCallback
from stable_plugin.models.mace import MACEModule

TRAIN = Path(__file__).parents[3] / "recipes" / "data" / "aspirin_train.extxyz"
VALID = TRAIN.with_name("aspirin_valid.extxyz")
EPOCHS = 4


@pytest.fixture(scope="module")
def frames():
    return read(TRAIN, ":12")


class Signaled:
    """Sends a signal at a call of the detector, or at the end of a batch; both are counted from one over the whole run."""

    signal = at_call = at_batch = None

    def on_train_start(self, run, module):
        super().on_train_start(run, module)
        measure, self.calls, self.batches = self.loop.simulator.detector.measure, 0, 0

        def measured(positions, velocities):
            self.calls += 1
            if self.calls == self.at_call:
                os.kill(os.getpid(), self.signal)
            return measure(positions, velocities)

        self.loop.simulator.detector.measure = measured

    def on_train_batch_end(self, run, module, *arguments):
        super().on_train_batch_end(run, module, *arguments)
        self.batches += 1
        if self.batches == self.at_batch:
            os.kill(os.getpid(), self.signal)


class SignaledCallback(Signaled, StABlECallback):
    pass


class SignaledModuleCallback(Signaled, ModuleCallback):
    pass


class Mixed(StABlEMixin, MACEModule):
    """Adds the loss in its own step, after the supervised loss."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        observable_loss = self.stable_loss()
        return None if observable_loss is None else loss + 10.0 * observable_loss


def fit(folder, frames, *, stop=None, slurm=False, valid=False, mixin=False, **trainer):
    """Train from the newest checkpoint in the folder, and return the callback."""
    seed_everything(1)
    module = (Mixed if mixin else MACEModule)(r_max=4.0, hidden_irreps="4x0e", max_ell=1, correlation=1, radial_MLP=[8])
    callback = (SignaledModuleCallback if mixin else SignaledCallback)(
        integrator=Langevin(500.0, 0.5, 1.0),
        n_replicas=4,
        window_ps=0.005,
        record_every_fs=2.5,
        check_every_fs=2.5,
        detector=BondDeviation(0.2, 10.0),
        schedule=Schedule(max_failures_per_ns=30_000.0, probe_every=1),
        steps_per_window=1,
        execution=Execution(threads=1),
    )
    for name, value in (stop or {}).items():
        setattr(callback, name, value)
    module._stable = callback  # as configure_stable() does
    last = ModelCheckpoint(folder, filename="last", enable_version_counter=False, save_on_train_epoch_end=True)
    run = Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        callbacks=[last] if mixin else [callback, last],
        logger=CSVLogger(folder, name="csv", flush_logs_every_n_steps=1),
        log_every_n_steps=1,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[SLURMEnvironment(auto_requeue=True)] if slurm else None,
        **trainer,
    )
    data = ExtxyzDataModule(frames, read(VALID, ":2") if valid else None, batch_size=4)
    checkpoint = max(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime, default=None)
    run.fit(module, data, ckpt_path=checkpoint, weights_only=False)
    return callback


@pytest.fixture(scope="module")
def whole(tmp_path_factory, frames):
    folder = tmp_path_factory.mktemp("whole")
    callback = fit(folder, frames)
    phases = [entry.phase for entry in callback.windows]
    assert phases.count("probe") >= 3 and phases.count("learn") >= 3
    return trained(folder), callback.calls


STOPS = [
    *((signal.SIGTERM, {"at_call": fraction}) for fraction in (0.0, 0.2, 0.35, 0.5, 0.9)),  # within a window
    *((signal.SIGTERM, {"at_batch": batch}) for batch in (1, 3)),  # between two batches, and at the end of an epoch
    *((signal.SIGUSR1, {"at_call": fraction}) for fraction in (0.5, 0.7)),
    *((signal.SIGUSR1, {"at_batch": batch}) for batch in (5, 6)),
]


@pytest.mark.parametrize(("number", "where"), STOPS)
def test_signaled_fit_resumes_bit_for_bit(tmp_path, frames, whole, number, where, monkeypatch):
    expected, calls = whole
    where = {name: 1 + int(value * calls) if name == "at_call" else value for name, value in where.items()}
    stop_and_resume(tmp_path, frames, expected, {"signal": number, **where}, monkeypatch)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signaled_mixin_resumes_bit_for_bit(tmp_path, frames, number, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    calls = fit(whole, frames, mixin=True).calls
    cut.mkdir()
    stop = {"signal": number, "at_call": 1 + int(0.6 * calls)}
    stop_and_resume(cut, frames, trained(whole), stop, monkeypatch, mixin=True)


@pytest.mark.slow
def test_signaled_fit_resumes_with_accumulation(tmp_path, frames, monkeypatch):
    options = {"valid": True, "accumulate_grad_batches": 2, "val_check_interval": 1, "num_sanity_val_steps": 0}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    frames = frames * 2  # three optimizer steps per epoch, of two batches each
    calls = fit(whole, frames, **options).calls
    for fraction in (0.5, 0.75):
        cut.mkdir(exist_ok=True)
        stop = {"signal": signal.SIGTERM, "at_call": 1 + int(fraction * calls)}
        stop_and_resume(cut, frames, trained(whole), stop, monkeypatch, **options)
        shutil.rmtree(cut)


def stop_and_resume(folder, frames, expected, stop, monkeypatch, **options):
    slurm = stop["signal"] == signal.SIGUSR1
    if slurm:
        # The command by which Lightning requeues the job, and the variables by which it recognizes one.
        scontrol = folder / "scontrol"
        scontrol.write_text(f"#!/bin/sh\necho $@ >> {folder}/requeued\n")
        scontrol.chmod(0o755)
        monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
        for name, value in {"JOB_ID": "7", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}.items():
            monkeypatch.setenv(f"SLURM_{name}", value)
    with pytest.raises(SystemExit) as stopped:
        fit(folder, frames, stop=stop, slurm=slurm, **options)
    assert not stopped.value.code
    written = [path.name for path in folder.glob("*.ckpt") if path.name != "last.ckpt"]
    assert len(written) == 1 and written[0].startswith("hpc_ckpt" if slurm else "interrupted"), written
    assert not slurm or (folder / "requeued").read_text().split() == ["requeue", "7"]
    fit(folder, frames, slurm=slurm, **options)
    assert_same(expected, trained(folder))
