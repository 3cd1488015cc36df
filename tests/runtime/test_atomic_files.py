"""Write errors name the path and the remedy, and leave the previous version in place."""

import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from disk import MEGABYTE, files_up_to
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from toys import TRIATOMIC, Springs

from stable_plugin import BondDeviation, Execution, Langevin, Schedule, StABlECallback
from stable_plugin.evaluation import write_report
from stable_plugin.models import ModulePotential
from stable_plugin.models.base import save_new
from stable_plugin.runtime.atomic_files import atomic_folder, atomic_write

BONDS = [(0, 1), (0, 2)]


@contextmanager
def mounted(folder, options):
    """Mount a small file system in a folder, if this user may mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("the mount command is missing")
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:  # lazily, because the error may hold files open
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_atomic_write_keeps_previous_file(tmp_path):
    path = tmp_path / "model.pt"
    path.write_text("before")
    cannot = pytest.raises(OSError, match=r"model .*model\.pt.* cannot be written.*free some space.*untouched")
    with files_up_to(1000), cannot, atomic_write(path, "model") as partial:
        partial.write_bytes(bytes(2000))
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["model.pt"]


def test_write_error_of_torch_names_the_reason(tmp_path):
    with (
        files_up_to(100_000),
        pytest.raises(OSError, match=r"model\.pt.*disk is full.*MB are free in .*free some space"),
    ):
        save_new(MEGABYTE, tmp_path / "model.pt")
    assert not os.listdir(tmp_path)


def test_atomic_folder_is_complete_or_unchanged(tmp_path):
    path = tmp_path / "step_4"
    for content in ("old", "new"):
        with atomic_folder(path) as partial:
            (partial / "state").write_text(content)
    assert (path / "state").read_text() == "new"
    cannot = pytest.raises(OSError, match=r"step_4.*cannot be written.*The previous version is untouched")
    with files_up_to(10), cannot, atomic_folder(path) as partial:
        (partial / "state").write_bytes(bytes(20))
    assert (path / "state").read_text() == "new" and os.listdir(tmp_path) == ["step_4"]


def test_atomic_folder_survives_kill_at_rename(tmp_path):
    seen = []
    for survived in range(3):
        path = tmp_path / str(survived) / "step_4"
        path.parent.mkdir()
        with atomic_folder(path) as partial:
            (partial / "state").write_text("old")
        child = os.fork()
        if child == 0:
            replace_and_die(path, survived)
        os.waitpid(child, 0)
        # Searched as fairchem searches for checkpoints: one level deep.
        seen.append([(found.parent.name, found.read_text()) for found in path.parent.glob("*/state")])
    assert seen == [[("step_4", "old")], [("step_4.old", "old")], [("step_4", "new")]]


def replace_and_die(path, survived):
    """Replace a folder in a process that is killed at a rename, or at the end."""
    renames = []

    def die(event, arguments):
        if event == "os.rename":
            renames.append(event)
            if len(renames) > survived:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die)
    with atomic_folder(path) as partial:
        (partial / "state").write_text("new")
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("blocked_by", ["runs", "runs/a"])
def test_report_names_file_in_place_of_folder(tmp_path, blocked_by):
    blocked = tmp_path / blocked_by
    blocked.parent.mkdir(exist_ok=True)
    blocked.touch()
    with pytest.raises(OSError, match=f"report .*{blocked_by}.* is a file where a folder is needed: move the file"):
        write_report(tmp_path / "runs" / "a", *finished_run())


def test_report_names_full_disk(tmp_path):
    with (
        files_up_to(2000),
        pytest.raises(OSError, match=r"report .*(json|html|png)' cannot be written.*free some space"),
    ):
        write_report(tmp_path / "run", *finished_run())
    assert not list(tmp_path.rglob("*.partial"))


def finished_run():
    survival = {"time_ps": [0.0, 1.0], "probability": [1.0, 0.5], "low": [1.0, 0.2], "high": [1.0, 0.8]}
    summary = {
        "replicas": 4, "horizon_ps": 1.0, "threshold": 0.5, "unstable": 2, "median_stable_ps": 1.0, "failures_per_ns": 1.0,
        "failures_per_ns_interval": [0.1, 3.0], "force_mae_mev_per_A": 1.0, "energy_mae_mev_per_atom": 1.0,
        "observables": {},
    }  # fmt: skip
    return {"title": "t" * 3000, "evaluation": summary}, {
        "evaluation": {"survival": survival, "observables": {}},
        "axes": {},
    }


def test_full_and_read_only_disks_are_distinguished(tmp_path):
    with mounted(tmp_path / "full", "size=512k") as folder:
        with pytest.raises(OSError, match=r"disk is full.* MB are free.*free some space"):
            save_new(MEGABYTE, folder / "model.pt")
        assert not list(folder.iterdir())
    with mounted(tmp_path / "read-only", "ro") as folder:
        with pytest.raises(OSError, match=r"Read-only file system.*mounted read-only: choose another folder"):
            save_new(MEGABYTE, folder / "model.pt")
        with pytest.raises(OSError, match=r"report .*mounted read-only: choose another folder"):
            write_report(folder / "run", *finished_run())


class Water(LightningModule):
    """Springs, and a loss without gradient; ``ballast`` makes the checkpoints long."""

    def __init__(self):
        super().__init__()
        self.springs = Springs(BONDS, stiffness=3.0, lengths=[1.0, 1.0])
        self.register_buffer("ballast", MEGABYTE)

    def stable_potential(self, system):
        return ModulePotential(self.springs, system)

    def training_step(self, batch, batch_idx):
        return 0.0 * self.springs.log_k

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class FullDisk(StABlECallback):
    """Limits the length of files from the third epoch on."""

    limit = None

    def on_train_epoch_start(self, run, module):
        super().on_train_epoch_start(run, module)
        if run.current_epoch == 2 and self.limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.RLIM_INFINITY))


def fit(folder, *, logger=False, limit=None, checkpoint=None, max_epochs=4):
    generator = np.random.default_rng(0)
    frames = [TRIATOMIC.copy() for _ in range(8)]
    for frame in frames:
        frame.positions += generator.normal(scale=0.03, size=frame.positions.shape)
    callback = FullDisk(
        structures=frames,
        bonds=BONDS,
        integrator=Langevin(300.0, 0.5, 1.0),
        detector=BondDeviation(0.1, 10.0),
        n_replicas=2,
        window_ps=0.01,
        record_every_fs=2.5,
        check_every_fs=2.5,
        schedule=Schedule(),
        learning_rate=1e-3,
        observable_weight=1.0,
        execution=Execution(threads=1, compile=False),
    )
    callback.limit = limit
    last = ModelCheckpoint(folder, filename="last", enable_version_counter=False, save_on_train_epoch_end=True)
    run = Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        callbacks=[callback, last],
        logger=logger,
        log_every_n_steps=1,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        run.fit(Water(), torch.utils.data.DataLoader(torch.zeros(2)), ckpt_path=checkpoint, weights_only=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return run


def displayed(error):
    """Return what a user sees: the messages and notes of an error and its context."""
    lines, each = [], error.value
    while each is not None:  # Lightning closes the loggers, which may raise again
        lines += [str(each), *getattr(each, "__notes__", [])]
        each = each.__context__
    return "\n".join(lines)


def test_full_disk_keeps_last_checkpoint(tmp_path):
    with pytest.raises(OSError) as error:
        fit(tmp_path, limit=500_000)
    text = displayed(error)
    assert f"checkpoint '{tmp_path / 'last.ckpt'}' cannot be written" in text
    assert "free some space" in text and "The previous version is untouched" in text
    assert f"resume with ckpt_path='{tmp_path / 'last.ckpt'}'" in text
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert fit(tmp_path, checkpoint=tmp_path / "last.ckpt").current_epoch == 4


def test_unwritable_checkpoint_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as error:
        fit(tmp_path / "file" / "run")
    assert f"'{tmp_path / 'file'}' is a file where a folder is needed" in displayed(error)
    with mounted(tmp_path / "read-only", "ro") as folder:
        with pytest.raises(OSError) as error:
            fit(folder / "run")
        assert "mounted read-only: choose another folder" in displayed(error)


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_unwritable_logger_folder_is_named(tmp_path, kind):
    (tmp_path / "logs").touch()
    with pytest.raises(OSError) as error:
        fit(tmp_path / "run", logger=kind(tmp_path / "logs", name="here"))
    assert f"'{tmp_path / 'logs'}' is a file where a folder is needed" in displayed(error)


def test_full_log_disk_keeps_last_checkpoint(tmp_path):
    with mounted(tmp_path / "small", "size=64k") as small:
        logger = CSVLogger(small, name="log", flush_logs_every_n_steps=1)
        on_epoch = FullDisk.on_train_epoch_start

        def fill(callback, run, module):
            on_epoch(callback, run, module)
            if run.current_epoch == 2:
                with (small / "other").open("wb", buffering=0) as other:
                    while True:
                        try:
                            other.write(bytes(512))
                        except OSError:
                            break

        with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError) as error:
            patch.setattr(FullDisk, "on_train_epoch_start", fill)
            fit(tmp_path / "run", logger=logger, max_epochs=100)
        text = displayed(error)
    assert str(small) in text and "free some space" in text
    assert f"resume with ckpt_path='{tmp_path / 'run' / 'last.ckpt'}'" in text
    assert fit(tmp_path / "run", checkpoint=tmp_path / "run" / "last.ckpt", max_epochs=100).current_epoch == 100
