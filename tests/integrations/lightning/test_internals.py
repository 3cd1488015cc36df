"""The private attributes of Lightning: present in both packages, and optional."""

import logging
import re
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stable_plugin.integrations.lightning import _lightning_internals as internals
from stable_plugin.integrations.lightning.preemption import EpochPosition
from stable_plugin.integrations.resume import ResumePoint

SOURCE = Path(internals.__file__).parent


@pytest.fixture(params=["pytorch_lightning", "lightning.pytorch"])
def trainer(request, tmp_path):
    package = pytest.importorskip(request.param)
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return package.Trainer(accelerator="cpu", default_root_dir=tmp_path, enable_model_summary=False, **settings)


def test_missing_attributes_is_empty(trainer):
    assert internals.missing_attributes(trainer) == []


def test_missing_attributes_names_what_is_missing():
    trainer = SimpleNamespace(fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=1)))
    assert internals.missing_attributes(trainer) == [
        "fit_loop._data_fetcher",
        "_accelerator_connector.cluster_environment",
        "_signal_connector.received_sigterm",
    ]


def test_request_stop_sets_the_flag(trainer):
    assert not trainer.received_sigterm
    internals.request_stop(trainer)
    assert trainer.received_sigterm
    internals.request_stop(SimpleNamespace())


def test_uncount_stepped_batch(trainer):
    before = trainer.fit_loop.epoch_loop._batches_that_stepped
    internals.uncount_stepped_batch(trainer)
    assert trainer.fit_loop.epoch_loop._batches_that_stepped == before - 1
    internals.uncount_stepped_batch(SimpleNamespace(fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace())))


@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
def test_slurm_environment_of_both_packages(package, tmp_path, monkeypatch):
    lightning = pytest.importorskip(package)
    for name, value in {"JOB_ID": "7", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    environment = import_module(f"{package}.plugins.environments").SLURMEnvironment(auto_requeue=True)
    settings = {"accelerator": "cpu", "logger": False, "default_root_dir": tmp_path}
    trainer = lightning.Trainer(plugins=[environment], **settings)
    assert internals.slurm_environment(trainer) is environment
    monkeypatch.delenv("SLURM_NTASKS")
    assert internals.slurm_environment(lightning.Trainer(**settings)) is None
    assert internals.slurm_environment(SimpleNamespace()) is None


def test_position_warns_where_batches_cannot_be_skipped(caplog):
    resume = ResumePoint()
    position = EpochPosition(resume)
    progress = SimpleNamespace(_batches_that_stepped=0)
    trainer = SimpleNamespace(
        fit_loop=SimpleNamespace(epoch_loop=progress),
        train_dataloader=torch.utils.data.DataLoader([0.0, 1.0]),
    )
    position.on_fit_start(trainer)
    assert "resuming in the middle of an epoch is not exact (this version of Lightning has no fit_loop" in caplog.text
    caplog.clear()
    state = resume.state_dict()
    resume.load_state_dict(
        {**state, "batches": {"taken": 1, "start": state["random"], "random": state["random"], "was_validated": False}}
    )
    with caplog.at_level(logging.WARNING):
        position.on_train_start(trainer)
    assert "its batches cannot be skipped" in caplog.text


def test_only_internals_reads_private_attributes():
    private = r"(trainer|loop|fit_loop|epoch_loop|strategy|fetcher|connector)\._[a-z]"
    for path in SOURCE.glob("*.py"):
        if path.name != "_lightning_internals.py":
            assert not re.search(private, path.read_text()), path
