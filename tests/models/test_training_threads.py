"""The number of threads of training steps."""

import pytest
import torch
from pytorch_lightning import Callback, seed_everything

from stable_plugin.models.training_threads import TrainingThreads
from stable_plugin.runtime import threads

pytest.importorskip("mace")

from small_training import TRAIN, small_module, trainer

from stable_plugin import ExtxyzDataModule


class Observed(Callback):
    """Records the number of threads of each forward pass."""

    def __init__(self):
        self.threads = []

    def on_before_backward(self, *arguments):
        self.threads.append(torch.get_num_threads())


@pytest.fixture
def two_threads(monkeypatch):
    own = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(threads, "_measurements", {})
    yield
    torch.set_num_threads(own)


def fit(folder, monkeypatch, fastest, ckpt_path=None, max_epochs=2):
    measured = []

    def fastest_threads(call, max_threads, present=None):
        call()
        measured.append(max_threads)
        return fastest

    monkeypatch.setattr(threads, "fastest_threads", fastest_threads)
    observed = Observed()
    seed_everything(0, verbose=False)
    run = trainer(folder, observed, max_epochs=max_epochs)
    run.fit(small_module(), ExtxyzDataModule(TRAIN, batch_size=25), ckpt_path=ckpt_path)
    return run, observed.threads, measured


def test_training_steps_use_the_fastest_number(tmp_path, monkeypatch, two_threads):
    _, used, measured = fit(tmp_path, monkeypatch, fastest=1)
    assert used == [1] * 4
    assert measured == [2], "measured once, in the first epoch"
    assert torch.get_num_threads() == 2, "restored"


def test_measuring_leaves_the_training_unchanged(tmp_path, monkeypatch, two_threads):
    measured, _, _ = fit(tmp_path / "measured", monkeypatch, fastest=1)
    monkeypatch.setattr(TrainingThreads, "on_train_start", lambda *arguments: None)
    torch.set_num_threads(1)
    plain, used, calls = fit(tmp_path / "plain", monkeypatch, fastest=1)
    assert (used, calls) == ([1] * 4, [])
    for first, second in zip(measured.lightning_module.parameters(), plain.lightning_module.parameters(), strict=True):
        assert torch.equal(first, second)


def test_resumed_training_keeps_the_number(tmp_path, monkeypatch, two_threads):
    run, _, _ = fit(tmp_path / "first", monkeypatch, fastest=1)
    run.save_checkpoint(tmp_path / "first.ckpt")
    threads._measurements.clear()
    _, used, measured = fit(
        tmp_path / "second", monkeypatch, fastest=2, ckpt_path=tmp_path / "first.ckpt", max_epochs=3
    )
    assert used == [1] * 2
    assert measured == []
