"""Runs that are killed at random moments go on from their last checkpoint as if nothing had happened."""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("killed_run.py")
EPOCHS = 30
KILLS = 20

pytestmark = pytest.mark.slow


def start(folder):
    folder.mkdir(exist_ok=True)
    with (folder / "output.txt").open("a") as output:
        return subprocess.Popen([sys.executable, SCRIPT, folder, str(EPOCHS)], stdout=output, stderr=output)


def begun(folder, process):
    """Wait until training begins, or has ended."""
    while not (folder / f"begun-{process.pid}").exists() and process.poll() is None:
        time.sleep(0.02)


def finished(process, folder):
    assert process.wait(timeout=300) == 0, (folder / "output.txt").read_text()[-3000:]


def result(folder):
    """Everything in the last checkpoint but wall times, flat: name to tensor or value."""
    checkpoint = torch.load(folder / "last.ckpt", weights_only=False)
    kept = {name: checkpoint[name] for name in ("state_dict", "optimizer_states", "lr_schedulers", "global_step")}
    (kept["stable"],) = (state for name, state in checkpoint["callbacks"].items() if name.startswith("StABlE"))
    return dict(flat("", kept))


def flat(name, value):
    if isinstance(value, dict):
        for key, each in value.items():
            yield from flat(f"{name}.{key}", each)
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from flat(f"{name}.{index}", each)
    elif not name.endswith("wall_s"):
        yield name, value


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        same = torch.equal(value, other[name]) if torch.is_tensor(value) else value == other[name]
        assert same, f"{name}: {value} and {other[name]}"


def logged(folder):
    """What was logged last of each step: a run that goes on logs the steps after its checkpoint again."""
    last = {}
    for path in sorted(folder.glob("csv/version_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1])):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                filled = {key: value for key, value in row.items() if value}
                last[row["step"], tuple(sorted(filled))] = filled
    return last


@pytest.mark.timeout(3600)
def test_a_lightning_run_killed_twenty_times_equals_the_uninterrupted_one_to_the_last_bit(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    process = start(whole)
    begun(whole, process)
    began = time.monotonic()
    finished(process, whole)
    duration = time.monotonic() - began
    expected = result(whole)
    assert any(name.startswith(".stable.loop.rounds") for name in expected)

    chance, kills, generation = random.Random(0), 0, 0
    while kills < KILLS:
        folder = cut if generation == 0 else tmp_path / f"cut{generation}"
        process = start(folder)
        begun(folder, process)
        # Far enough to get somewhere before the next, for some of them.
        time.sleep(chance.uniform(0.0, 0.5 * duration))
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        if process.wait() == 0:
            assert_same(expected, result(folder))
            generation += 1
    finished(start(folder), folder)
    assert_same(expected, result(folder))
    assert logged(folder) == logged(whole)
    assert not list(folder.glob("*.partial")) or (folder / "last.ckpt").is_file()
