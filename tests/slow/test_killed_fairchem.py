"""Native fairchem trainings that are killed at random times and resumed equal the uninterrupted one."""

import json
import signal

import pytest
import yaml
from fairchem_tools import native_config, write_aselmdb
from killing import Trainings, Whole, assert_same, ended, flat, kill_and_compare, stop_and_compare
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

import torch  # isort: skip

pytestmark = pytest.mark.slow

STABLE = {
    "_target_": "stable_plugin.integrations.fairchem.StABlECallback",
    "task_name": "omol",
    "charge": 0,
    "spin": 1,
    "n_replicas": 2,
    "window_ps": 0.01,
    "record_every_fs": 2.5,
    "check_every_fs": 2.5,
    "integrator": {"_target_": "stable_plugin.Langevin", "temperature_K": 500.0, "timestep_fs": 0.5},
    "detector": {"_target_": "stable_plugin.BondDeviation", "threshold": 0.2, "discard": 10.0},
    "steps_per_window": 2,
    "min_ess_fraction": 0.01,
    "schedule": {
        "_target_": "stable_plugin.Schedule",
        "max_failures_per_ns": 30_000.0,
        "probe_every": 1,
    },
    "execution": {"_target_": "stable_plugin.Execution", "threads": 1},
}


@pytest.fixture(scope="module")
def trainings():
    with Trainings("fairchem") as forked:
        yield forked


@pytest.fixture(scope="module")
def make_folder(tmp_path_factory, aspirin_frames):
    tmp_path = tmp_path_factory.mktemp("fairchem")
    write_aselmdb(tmp_path / "train.aselmdb", aspirin_frames[:8])
    write_aselmdb(tmp_path / "val.aselmdb", aspirin_frames[8:10])

    def make(name):
        folder = tmp_path / name
        folder.mkdir()
        log = {"_target_": "killed_run.LogToFile", "path": str(folder / "log.jsonl")}
        config = native_config(tmp_path, "esen", epochs=6, callbacks=[log, STABLE], save_inference_ckpt=False)
        config["job"].update(run_dir=str(folder), timestamp_id="run")
        config["runner"]["callbacks"][0].update(checkpoint_every_n_steps=2, max_saved_checkpoints=2)
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        return folder

    return make


@pytest.fixture(scope="module")
def whole(trainings, make_folder):
    return Whole(trainings, make_folder("whole"), result)


def result(folder):
    """Return all of the last checkpoint but wall times, and what was logged."""
    final = folder / "run" / "checkpoints" / "final"
    kept = {}
    _load_state_dict(kept, storage_reader=FileSystemReader(final), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    kept = {"unit": kept["unit_state"], "stable": torch.load(final / "stable.pt", weights_only=True)}
    everything = {**dict(flat("", kept)), "logged": logged(folder)}
    assert any("windows.5." in name for name in everything)
    return everything


def logged(folder):
    """Return the last log entry of each step and window: a resumed run logs those after its checkpoint again.

    A probe falls between two steps: it is logged with the one before, or after a resumption with the one after it.
    """
    last = {}
    for line in (folder / "log.jsonl").read_text().splitlines():
        numbers = {name: value for name, value in json.loads(line).items() if "_per_second" not in name}
        if "stable/window" in numbers:
            numbers["step"] = f"window {numbers['stable/window']:g}"
        last[numbers["step"], tuple(sorted(numbers))] = numbers
    return last


@pytest.mark.timeout(3000)
def test_killed_fairchem_run_resumes_bit_for_bit(trainings, whole, make_folder):
    def lengths(folder):
        final = folder / "run" / "checkpoints" / "final"
        return range(1_000_000, max(path.stat().st_size for path in final.iterdir()))

    counts = kill_and_compare(
        trainings,
        whole,
        make_folder,
        result,
        half_written=lambda folder: (folder / "run" / "checkpoints").glob(".partial/*/*"),
        lengths=lengths,
    )
    assert counts["writing"] >= 5


@pytest.mark.timeout(1800)
def test_signaled_fairchem_run_resumes_bit_for_bit(trainings, whole, make_folder):
    folder = make_folder("signaled")
    stop_and_compare(trainings, whole, folder, result, signal.SIGTERM, stops=4, begun="Started train epoch")
    assert "SIGTERM: training has stopped. Resume with: fairchem -c" in (folder / "output.txt").read_text()


@pytest.mark.timeout(1800)
def test_fairchem_run_resumes_after_full_disk(trainings, whole, make_folder):
    folder = make_folder("full")
    trainings.start(folder, die=("full", 0.5 * whole.duration, 1_000_000))
    ended(trainings, folder, status=1)
    text = (folder / "output.txt").read_text()
    assert f"OSError: checkpoint '{folder / 'run' / 'checkpoints'}" in text and "free some space" in text
    trainings.start(folder)
    ended(trainings, folder)
    assert_same(whole.result, result(folder))
