"""Trainings in separate processes that are killed and resumed, and compared to the last bit."""

import csv
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

SCRIPT = Path(__file__).with_name("killed_run.py")
KILLS = 24


class Trainings:
    """A process that has imported what trainings need, and forks them."""

    def __init__(self, kind):
        command = [sys.executable, str(SCRIPT), kind]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=environment
        )
        while (line := self._line()) != "ready":
            assert line, "the process that forks trainings did not start"
        self.child = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.child is not None:
            os.kill(self.child, signal.SIGKILL)
        self.server.stdin.close()
        self.server.wait(120)

    def start(self, folder, *, die=None, **arguments):
        """Start a training in a folder from its last checkpoint; ``die`` says how it is killed while it writes."""
        folder.mkdir(exist_ok=True)
        request = {"folder": str(folder), "die": die, "arguments": arguments}
        (folder / "output.txt").touch()
        self.server.stdin.write(json.dumps(request).encode() + b"\n")
        self.child = int(self._line())

    def wait(self, timeout_s=None):
        """Return the exit status of the training; None if it is still running."""
        if not select.select([self.server.stdout], [], [], timeout_s)[0]:
            return None
        self.child = None
        return int(self._line())

    def signal(self, number):
        os.kill(self.child, number)

    def _line(self):
        return self.server.stdout.readline().decode().strip()


def trained(folder):
    """Return all of the last checkpoint of a Lightning run but wall times, and what was logged."""
    checkpoint = torch.load(folder / "last.ckpt", weights_only=False)
    names = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")
    kept = {name: checkpoint[name] for name in names}
    (kept["stable"],) = (state for state in checkpoint["callbacks"].values() if "processes" in state)
    return {**dict(flat("", kept)), "logged": _logged(folder)}


def _logged(folder):
    """Return the last log entry of each step: a resumed run logs the steps after its checkpoint again."""
    last = {}
    for path in sorted(folder.glob("csv/version_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1])):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                filled = {key: value for key, value in row.items() if value}
                last[row["step"], tuple(sorted(filled))] = filled
    return last


def flat(name, value):
    """Yield name and value of all items in nested dictionaries and lists, but wall times."""
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


def stamps(paths):
    return {(path, path.stat().st_mtime_ns) for path in paths}


def ended(trainings, folder, status=0, timeout_s=300):
    assert trainings.wait(timeout_s) == status, (folder / "output.txt").read_text()[-3000:]


class Whole:
    """An uninterrupted training: its duration, and its final state as a flat dictionary."""

    def __init__(self, trainings, folder, result):
        self.folder = folder
        began = time.monotonic()
        trainings.start(folder)
        ended(trainings, folder)
        self.duration = time.monotonic() - began
        self.result = result(folder)


def kill_and_compare(trainings, whole, make_folder, result, half_written, lengths):
    """Kill trainings many times, resume each until it is done, and compare it with an uninterrupted one.

    Args:
        trainings: Forks them.
        whole: The uninterrupted training.
        make_folder: Returns the folder of a training from its name.
        result: Returns the final state of a training from its folder.
        half_written: Returns the incomplete checkpoint files in the folder of a training.
        lengths: Returns file lengths that only checkpoints reach, from the folder of a training.

    Returns:
        Numbers of kills after a time, at a file length, at a rename, and of those of them during a write.
    """
    chance, generation = random.Random(0), 0
    counts = {"clock": 0, "bytes": 0, "rename": 0, "writing": 0}
    folder = make_folder("killed0")
    while counts["clock"] + counts["bytes"] + counts["rename"] < KILLS:
        where = chance.choice(["clock", "clock", "bytes", "rename"])
        # Long enough for some of them to reach the next checkpoint.
        delay = chance.uniform(0.0, 0.3 * whole.duration)
        number = chance.choice(lengths(whole.folder)) if where == "bytes" else chance.randrange(3)
        earlier = stamps(half_written(folder))
        trainings.start(folder, die=None if where == "clock" else (where, delay, number))
        status = trainings.wait(delay if where == "clock" else 300)
        if status is None:
            trainings.signal(signal.SIGKILL)
            status = trainings.wait(30)
        if status == 0:
            assert_same(whole.result, result(folder))
            generation += 1
            folder = make_folder(f"killed{generation}")
            continue
        assert status in (-signal.SIGKILL, -signal.SIGXFSZ), (folder / "output.txt").read_text()[-3000:]
        counts[where] += 1
        counts["writing"] += status == -signal.SIGXFSZ or bool(stamps(half_written(folder)) - earlier)
    trainings.start(folder)
    ended(trainings, folder)
    assert_same(whole.result, result(folder))
    print(f"{counts}, {whole.duration:.1f} s each, {generation + 1} runs")
    return counts


def stop_and_compare(trainings, whole, folder, result, number, stops, begun, **arguments):
    """Signal a training several times, each time later in it, then let it end, and compare it.

    Args:
        trainings: Forks the training.
        whole: The uninterrupted training.
        folder: Folder of the training.
        result: Returns the final state of a training from its folder.
        number: Number of the signal.
        stops: Number of signals.
        begun: Text that a training prints when it starts.
        arguments: Arguments of the training.
    """
    chance, output = random.Random(1), folder / "output.txt"
    for _ in range(stops):
        printed = output.read_text().count(begun) if output.is_file() else 0
        trainings.start(folder, **arguments)
        while output.read_text().count(begun) == printed and trainings.wait(0.05) is None:
            pass
        if trainings.child is None or trainings.wait(chance.uniform(0.0, whole.duration / stops)) is not None:
            break
        trainings.signal(number)
        # Before the handler is installed, the signal kills the process.
        assert trainings.wait(120) in (0, -number), output.read_text()[-3000:]
    trainings.start(folder, **arguments)
    ended(trainings, folder)
    assert_same(whole.result, result(folder))
