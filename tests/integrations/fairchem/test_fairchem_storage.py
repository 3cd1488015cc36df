"""Checkpoints of native fairchem training, and the run folder of a recipe, when writing fails."""

import os
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from disk import MEGABYTE, files_up_to
from omegaconf import OmegaConf
from pytorch_lightning import Trainer

from stable_plugin import Execution, StABlECallback
from stable_plugin.integrations.fairchem.checkpoints import STATE_FILE, Interruption, StopSignaled, save_with
from stable_plugin.integrations.fairchem.runner import EvaluateRunner, StABlERunner, job_of
from stable_plugin.integrations.lightning import ExtxyzDataModule
from stable_plugin.models.base import save_new

ASPIRIN = Path(__file__).parents[3] / "recipes" / "data" / "aspirin_train.extxyz"


class Unit:
    """Saves as fairchem's own does: in a folder, and what tells a checkpoint before the last of it."""

    def __init__(self, folder, mode="local"):
        metadata = SimpleNamespace(checkpoint_dir=str(folder))
        self.job_config = SimpleNamespace(metadata=metadata, scheduler=SimpleNamespace(mode=mode))
        self.train_progress = SimpleNamespace(num_steps_completed=6)
        self.weights = 1

    def save_state(self, location):
        torch.distributed.checkpoint.save({"weights": torch.full((2**17,), self.weights)}, checkpoint_id=location)


class Session:
    def state_dict(self):
        return {"replicas": 4}


def weights(folder):
    state = {"weights": torch.zeros(2**17, dtype=torch.long)}
    torch.distributed.checkpoint.load(state, checkpoint_id=str(folder))
    return int(state["weights"].unique())


@pytest.mark.filterwarnings("ignore")
def test_full_disk_keeps_the_old_checkpoint(tmp_path):
    unit = Unit(tmp_path)
    save_with(unit, Session())
    unit.save_state(str(tmp_path / "step_4"))
    unit.weights = 2
    message = r"checkpoint .*step_4' cannot be written.*free some space.*The previous version is untouched"
    with files_up_to(100_000), pytest.raises(OSError, match=message):
        unit.save_state(str(tmp_path / "step_4"))
    assert os.listdir(tmp_path) == ["step_4"]
    assert weights(tmp_path / "step_4") == 1
    unit.save_state(str(tmp_path / "step_4"))
    assert os.listdir(tmp_path) == ["step_4"]
    assert weights(tmp_path / "step_4") == 2
    assert torch.load(tmp_path / "step_4" / STATE_FILE) == {"replicas": 4}


@pytest.mark.filterwarnings("ignore")
def test_checkpoint_appears_only_when_complete(tmp_path):
    from fairchem.core.components.train.train_runner import get_most_recent_viable_checkpoint_path

    found = []

    class Looking(Session):
        def state_dict(self):
            return found  # what torch.save is given is written last

    class Late(Unit):
        def save_state(self, location):
            super().save_state(location)
            found.append(get_most_recent_viable_checkpoint_path(str(tmp_path)))

    unit = Late(tmp_path)
    save_with(unit, Looking())
    unit.save_state(str(tmp_path / "step_4"))
    unit.save_state(str(tmp_path / "step_8"))
    assert found == [None, str(tmp_path / "step_4")]
    assert get_most_recent_viable_checkpoint_path(str(tmp_path)) == str(tmp_path / "step_8")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_left_to_submitit_on_a_cluster(tmp_path, number):
    before = signal.getsignal(number)
    assert Interruption(Unit(tmp_path, "slurm")) and signal.getsignal(number) is before
    unit = Unit(tmp_path)
    interruption = Interruption(unit)
    interruption.raise_if_signaled()
    os.kill(os.getpid(), number)
    with pytest.raises(StopSignaled) as stopped:
        interruption.raise_if_signaled()
    assert stopped.value.code == 0
    interruption.save(interruption.signaled)
    assert weights(tmp_path / "step_6") == 1
    assert signal.getsignal(number) is before


def runner_in(folder, kind=StABlERunner):
    runner = kind.__new__(kind)
    metadata = {"results_dir": str(folder / "results"), "config_path": str(folder / "canonical_config.yaml")}
    runner.job_config = OmegaConf.create({"metadata": metadata, "device_type": "cpu"})
    return runner


@pytest.mark.parametrize("write", [lambda path: save_new(MEGABYTE, path), lambda path: path.write_bytes(bytes(10**6))])
def test_runner_explains_a_full_disk(tmp_path, write, monkeypatch):
    runner = runner_in(tmp_path / "run")
    monkeypatch.setattr(StABlERunner, "validate", lambda runner: None)
    monkeypatch.setattr(StABlERunner, "_trained", lambda runner, name, *_: write(runner.folder / f"{name}.model"))
    runner.model = runner.supervised = None
    with files_up_to(100_000), pytest.raises(OSError, match=r"/run.* cannot be written.*free some space") as error:
        runner.run()
    (note,) = error.value.__notes__
    assert note == f"Finished stages are kept. Resume with: fairchem -c {tmp_path / 'run' / 'canonical_config.yaml'}"


@pytest.mark.parametrize("kind", [StABlERunner, EvaluateRunner])
def test_runner_names_a_run_folder_that_is_a_file(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(StABlERunner, "validate", lambda runner: None)
    (tmp_path / "run").touch()
    runner = runner_in(tmp_path / "run", kind)
    runner.model = torch.nn.Module()
    with pytest.raises(OSError, match=r"run folder .*/run' is a file where a folder is needed: move the file"):
        runner.run()


def test_runner_stops_when_the_signal_is_lost(tmp_path):
    pytest.importorskip("mace")
    from stable_plugin.models.mace import MACEModule

    class Signaled(StABlECallback):
        looks = 0

        def on_train_start(self, run, module):
            super().on_train_start(run, module)
            classify = self.loop.simulator.detector.classify

            def classified(positions, velocities):
                self.looks += 1
                if self.looks == 3:
                    runner.save_state(str(tmp_path))  # as fairchem's handler does, whose SystemExit is lost
                return classify(positions, velocities)

            self.loop.simulator.detector.classify = classified

    runner = runner_in(tmp_path / "run")
    runner.job = job_of(runner.job_config)
    runner.raise_if_stopped()
    runner.data = ExtxyzDataModule(ASPIRIN)
    module = MACEModule(r_max=4.0, hidden_irreps="4x0e", max_ell=1, correlation=1, radial_MLP=[8])
    callback = Signaled(n_replicas=2, window_ps=0.1, check_every_fs=5.0, execution=Execution(compile=False, threads=1))
    with pytest.raises(SystemExit):
        runner._fit(partial(Trainer, max_epochs=1, enable_progress_bar=False), "stable", module, [callback])
    assert callback.looks == 3
    assert (runner.folder / "stable" / "interrupted-step=0.ckpt").is_file()
    with pytest.raises(SystemExit):
        runner.raise_if_stopped()
