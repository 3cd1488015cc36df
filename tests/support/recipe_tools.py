"""Recipes run in this process as ``stable-plugin train`` and ``fairchem -c`` run them, made small enough to run often."""

from __future__ import annotations

import io
import os
import pickle
import signal
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import ase.io
import hydra
import numpy as np
import yaml
from omegaconf import OmegaConf

from stable_plugin.integrations.recipes import launch
from stable_plugin.integrations.recipes.load import load_recipe

try:
    from fairchem.core._cli import get_hydra_config_from_yaml
    from fairchem.core.launchers.slurm_launch import _set_seeds
except ImportError:
    FRONTS = ["stable-plugin"]
else:
    FRONTS = ["stable-plugin", "fairchem"]

ROOT = Path(__file__).parents[2]

FRAMES = {"train": 2, "valid": 1, "target": 3, "reference": 4, "heldout": 2}
"""Frames to keep of each file of a recipe."""

MEASURED = "measured.txt"
"""Name of the file that stands for measured g(r) of O-O, O-H and H-H."""

SIZE = {
    "epochs": 1, "replicas": 2, "window_ps": 0.005, "steps": 3, "windows": 1, "max_failures_per_ns": 4e5, "judged": 2,
    "horizons_ps": [0.01],
}  # fmt: skip

STEPS = {
    "runner.stable.record_every_fs": 2.5,
    "runner.stable.check_every_fs": 2.5,
    "runner.evaluation.record_every_fs": 5.0,
}

TINY = {
    "aspirin_mace": {
        **STEPS,
        "runner.supervised.max_epochs": 1,
        "runner.model.scheduler.T_max": 2,
        "runner.stable.n_replicas": 2,
        "runner.stable.window_ps": 0.01,
        "runner.stable.schedule.max_failures_per_ns": 30_000.0,
        "runner.stable.schedule.max_windows": 1,
        "runner.stable.steps_per_window": 3,
        "runner.evaluation.n_replicas": 2,
        "runner.evaluation.horizons_ps": [0.01],
    },
    "peptide_esen": {**STEPS, "size": "quick", "sizes.quick": SIZE},
    "water_mace": {
        "size": "quick",
        "sizes.quick": SIZE,
        "runner.stable.record_every_fs": 5.0,
        "runner.evaluation.record_every_fs": 5.0,
        **{f"runner.evaluation.dynamics.{index}.interval_fs": 5.0 for index in range(4)},
        **{f"runner.evaluation.dynamics.{index}.max_lag_ps": 0.01 for index in range(4)},
        "runner.evaluation.dynamics.3.fit_from_ps": 0.0,
        # Replicas that stop early leave trajectories that are too short.
        "runner.evaluation.detector.detectors.0.threshold": 50.0,
        "runner.evaluation.detector.detectors.0.discard": 50.0,
        "runner.evaluation.detector.detectors.1.distance": 0.01,
        "runner.evaluation.detector.detectors.1.discard_distance": 0.01,
    },
    "water_experiment": {
        "size": "quick",
        "sizes.quick": {**SIZE, "window_ps": 0.01, "copy_epochs": 1, "repair_ps": 0.005, "repairs": 1},
        "runner.correction.repair.record_every_fs": 5.0,
        "runner.correction.repair.steps_per_window": 3,
        "runner.correction.repair.schedule.max_failures_per_ns": 4e5,
        "runner.stable.record_every_fs": 5.0,
        "runner.evaluation.record_every_fs": 5.0,
    },
    "evaluate": {
        "runner.evaluation.n_replicas": 2,
        "runner.evaluation.horizons_ps": [0.01],
        "runner.evaluation.record_every_fs": 5.0,
    },
}
"""Changes that make each recipe small, by key path."""


def small_data(folder: Path) -> Path:
    """Write the recipes' data with a few frames each, and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (ROOT / "recipes" / "data").glob("*.extxyz"):
        n_frames = FRAMES[path.stem.rsplit("_", 1)[1]]
        ase.io.write(folder / path.name, ase.io.read(path, f":{n_frames}"))
    r = np.arange(0.05, 7.0, 0.1)
    g = 1.0 / (1.0 + np.exp(-5.0 * (r - 2.5)))
    np.savetxt(folder / MEASURED, np.column_stack([r, *[g, np.full_like(r, 0.01)] * 3]))
    return folder


def tiny(name: str, data: Path) -> dict:
    """Return a small form of a shipped recipe as plain data."""
    recipe = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
    for path, value in TINY[name].items():
        put(recipe, path, value)
    if recipe.get("measured") == "???":
        recipe["measured"] = str(data / MEASURED)
    for key in ("frames", "reference"):
        if isinstance(recipe.get(key), str):
            recipe[key] = recipe[key].replace("recipes/data", str(data))
    return recipe


def put(recipe: dict, path: str, value: object) -> None:
    """Set an entry of plain data by its key path."""
    *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))
    node = recipe
    for part in parents:
        node = node[part]
    node[last] = value


@dataclass
class Outcome:
    """How a recipe ended.

    Attributes:
        error: The exception; None if the recipe finished, or was still running when its time was over.
        stage: The stage it reached: config, seeds, runner, run, done.
        seconds: Time until the end.
        folder: The run folder, if there is one.
        left: Names in it, except those that are written before the run starts.
    """

    error: BaseException | None
    stage: str
    seconds: float
    folder: Path | None
    left: list[str]

    @property
    def kind(self) -> str:
        return getattr(self.error, "kind", type(self.error).__name__)

    @property
    def message(self) -> str:
        return "" if self.error is None else f"{self.kind}: {self.error}"


class EndedError(Exception):
    """An error of another process, which cannot always be pickled."""

    kind = ""


class TimeIsOverError(BaseException):
    """Not an Exception, so that the tested code does not handle it."""


def run(recipe: dict, folder: Path, seconds: float = 60.0, front: str = "stable-plugin") -> Outcome:
    """Run a recipe from a file in ``folder``, step by step as one of the commands does."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    if isinstance(recipe.get("job"), dict) and isinstance(recipe["job"].get("run_dir"), str):
        recipe["job"]["run_dir"] = str(folder / "runs")
    path.write_text(yaml.safe_dump(recipe, allow_unicode=True, sort_keys=False))
    outcome = Outcome(None, "config", 0.0, None, [])
    began, before = time.perf_counter(), Path.cwd()
    os.chdir(folder)
    try:
        with _limited(seconds), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            (_run_fairchem if front == "fairchem" else _run_plain)(path, outcome)
            outcome.stage = "done"
    except TimeIsOverError:
        pass
    except BaseException as caught:  # SystemExit too
        outcome.error = caught
    finally:
        os.chdir(before)
    if outcome.folder is not None and outcome.folder.is_dir():
        outcome.left = sorted({entry.name for entry in outcome.folder.iterdir()} - {"canonical_config.yaml", "logs"})
    outcome.seconds = time.perf_counter() - began
    return outcome


def _run_plain(path: Path, outcome: Outcome) -> None:
    recipe = load_recipe(path)
    section = launch.job_section(recipe)
    job = launch.make_job(section, recipe)
    outcome.folder, outcome.stage = job.folder, "seeds"
    launch.seed_everything(section)
    outcome.stage = "runner"
    pipeline = launch.make_pipeline(recipe)
    pipeline.job, outcome.stage = job, "run"
    launch.start(pipeline)


def _run_fairchem(path: Path, outcome: Outcome) -> None:
    config = get_hydra_config_from_yaml(str(path), [])
    outcome.folder = Path(config.job.metadata.config_path).parent
    os.makedirs(config.job.metadata.log_dir, exist_ok=True)
    OmegaConf.save(config, config.job.metadata.config_path)
    outcome.stage = "seeds"
    _set_seeds(config.job.seed)
    outcome.stage = "runner"
    runner = hydra.utils.instantiate(config.runner)
    runner.job_config = config.job
    runner.load_state(config.job.runner_state_path)
    outcome.stage = "run"
    runner.run()


def run_apart(recipe: dict, folder: Path, seconds: float, front: str = "stable-plugin") -> Outcome:
    """Run as :func:`run` does, in a forked process that has imported everything already.

    A run that the clock ends may hold locks, or have imported half a module, so its process must end too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    result, began = folder / "outcome.pickle", time.perf_counter()
    child = os.fork()
    if child == 0:
        try:
            outcome = run(recipe, folder, seconds, front)
            sent = (None if outcome.error is None else (outcome.kind, str(outcome.error)), outcome.stage, outcome.left)
            result.with_suffix(".partial").write_bytes(pickle.dumps((*sent, outcome.seconds, outcome.folder)))
            result.with_suffix(".partial").rename(result)
        finally:
            os._exit(0)
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.02)
        if time.perf_counter() - began > 2.0 * seconds:
            os.kill(child, signal.SIGKILL)
    if not result.is_file():
        return Outcome(None, "killed", time.perf_counter() - began, None, [])
    ended, stage, left, taken, run_folder = pickle.loads(result.read_bytes())
    error = None
    if ended is not None:
        error = EndedError(ended[1])
        error.kind = ended[0]
    return Outcome(error, stage, taken, run_folder, left)


@contextmanager
def _limited(seconds: float):
    def over(*_):
        raise TimeIsOverError

    previous = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, previous)
