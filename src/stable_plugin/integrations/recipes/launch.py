"""What ``stable-plugin train`` does: load a recipe, set up its job, and run its pipeline."""

from __future__ import annotations

import datetime
import logging
import os
import random
import shlex
import signal
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from stable_plugin.integrations.recipes.evaluate import EvaluatePipeline
from stable_plugin.integrations.recipes.instantiate import instantiate_arguments
from stable_plugin.integrations.recipes.load import CONFIG_FILE, load_recipe
from stable_plugin.integrations.recipes.pipeline import StABlEPipeline
from stable_plugin.integrations.recipes.run_folder import Job, RunFolder
from stable_plugin.integrations.recipes.targets import resolve_target
from stable_plugin.integrations.recipes.validation import validate_arguments
from stable_plugin.runtime import checks
from stable_plugin.runtime.atomic_files import atomic_write, explain_write_errors

log = logging.getLogger(__name__)

RUNNERS: dict[str, type[RunFolder]] = {
    f"{package}.{name}": pipeline
    for name, pipeline in (("StABlERunner", StABlEPipeline), ("EvaluateRunner", EvaluatePipeline))
    for package in ("stable_plugin", "stable_plugin.integrations.fairchem")
}
"""Pipelines by the name of their runner, so that a recipe runs without fairchem."""

SIGNALS = (signal.SIGINT, signal.SIGTERM)

# NumPy's generator takes no larger seed.
MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class JobSection:
    """The ``job`` section of a recipe, as far as a run without fairchem uses it.

    Args:
        run_dir: Folder of run folders.
        device_type: ``CPU`` or ``CUDA``; CUDA where torch finds a device if not given.
        seed: Seeds the global random generators of Python, NumPy and torch.
        deterministic: Whether torch may use deterministic algorithms only.
        timestamp_id: Name of the run folder; from date and time if not given.
        scheduler: ``mode: LOCAL`` with one process; others need fairchem.
        logger: Only for fairchem, as all that follow.
        run_name: Ignored.
        debug: Ignored.
        metadata: Ignored.
        runner_state_path: Ignored.
        graph_parallel: Ignored.
        graph_parallel_group_size: Ignored.
        recursive_instantiate_runner: Ignored.

    Raises:
        ValueError: If a value is invalid, or needs fairchem.
    """

    run_dir: str = "runs"
    device_type: str | None = None
    seed: int = 0
    deterministic: bool = False
    timestamp_id: str | None = None
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    logger: Mapping[str, Any] | None = None
    run_name: str = ""
    debug: bool = False
    metadata: Any = None
    runner_state_path: Any = None
    graph_parallel: Any = None
    graph_parallel_group_size: Any = None
    recursive_instantiate_runner: Any = None

    def __post_init__(self) -> None:
        if self.device_type is not None and self.device_type.upper() not in ("CPU", "CUDA"):
            raise ValueError(f"job.device_type={self.device_type!r} is not a device type: pass CPU or CUDA.")
        checks.count("job.seed", self.seed, at_least=0, at_most=MAX_SEED)
        if self.timestamp_id is not None and Path(self.timestamp_id).name != self.timestamp_id:
            raise ValueError(f"job.timestamp_id={self.timestamp_id!r} is not a folder name: pass a name without '/'.")
        for key, only in (("mode", "LOCAL"), ("ranks_per_node", 1), ("num_nodes", 1), ("use_ray", False)):
            value = self.scheduler.get(key, only)
            if (value.upper() if isinstance(value, str) else value) != only:
                raise ValueError(
                    f"job.scheduler.{key}={value!r} needs fairchem: start the recipe with fairchem -c, or set {only!r}."
                )
        if self.logger is not None:
            log.warning("job.logger is used by fairchem -c only: it is ignored here.")

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda``."""
        return (self.device_type or ("cuda" if torch.cuda.is_available() else "cpu")).lower()


def train(source: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Run a recipe in its run folder, ``<job.run_dir>/<job.timestamp_id>``.

    Args:
        source: Path of a recipe, or of the run folder of an interrupted run.
        overrides: Hydra overrides.

    Returns:
        Path of the report.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the recipe is invalid. The error names the key path, the value and the remedy.
    """
    return start(prepare(source, overrides))


def prepare(source: str | Path, overrides: Sequence[str] = ()) -> RunFolder:
    """Return the pipeline of a recipe, with its job. Everything is validated before anything is made.

    Args:
        source: As for :func:`train`.
        overrides: Likewise.

    Raises:
        FileNotFoundError: As for :func:`train`.
        ValueError: Likewise.
    """
    recipe = load_recipe(source, overrides)
    section = job_section(recipe)
    seed_everything(section)
    pipeline = make_pipeline(recipe)
    pipeline.job = make_job(section, recipe)
    return pipeline


def start(pipeline: RunFolder) -> Path:
    """Validate a pipeline with its job, write its recipe into the run folder, and run it.

    SIGINT and SIGTERM end the run; the command that resumes it is logged.

    Args:
        pipeline: The pipeline.

    Returns:
        Path of the report.
    """
    with stop_on_signals(pipeline):
        pipeline.validate()
        log.info("run folder: %s", pipeline.folder)
        write_config(pipeline.job)
        return pipeline.run()


def job_section(recipe: Mapping[str, Any]) -> JobSection:
    """Return the validated ``job`` section of a recipe."""
    validate_arguments(JobSection, recipe["job"], "job", "a job")
    return JobSection(**recipe["job"])


def make_job(section: JobSection, recipe: Mapping[str, Any]) -> Job:
    """Return the description of a job, in a new run folder unless the section names one."""
    folder = Path(section.run_dir).absolute() / (section.timestamp_id or new_run_id())
    place = {"run_dir": str(folder.parent), "timestamp_id": folder.name, "device_type": section.device.upper()}
    return Job(
        folder=folder,
        device=section.device,
        resume=f"stable-plugin train {shlex.quote(str(folder))}",
        settings=recipe["runner"],
        config={"job": {**recipe["job"], **place}, "runner": recipe["runner"]},
    )


def make_pipeline(recipe: Mapping[str, Any]) -> RunFolder:
    """Return the pipeline of a recipe's ``runner`` section.

    Args:
        recipe: The recipe, as plain data.

    Raises:
        ValueError: If the section is invalid.
    """
    runner = dict(recipe["runner"])
    name = runner.pop("_target_", None)
    kind = RUNNERS.get(name) if isinstance(name, str) else None
    kind = kind or resolve_target(name, "runner._target_")  # type: ignore[assignment]
    if not (isinstance(kind, type) and issubclass(kind, RunFolder)):
        raise ValueError(
            f"runner._target_={name!r} is not a runner of stable_plugin: set stable_plugin.StABlERunner or "
            "stable_plugin.EvaluateRunner, or start the recipe with fairchem -c."
        )
    if not isinstance(runner.pop("_recursive_", False), bool):
        raise ValueError(f"runner._recursive_={recipe['runner']['_recursive_']!r} is not a boolean: set false.")
    return kind(**instantiate_arguments(kind, runner, name=name))


def write_config(job: Job) -> None:
    """Write the resolved recipe into the run folder, where a later start finds it."""
    if job.config is None:
        return
    with explain_write_errors(job.folder, "run folder"):
        job.folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(job.folder / CONFIG_FILE) as partial:
        OmegaConf.save(OmegaConf.create(dict(job.config)), partial)


def new_run_id() -> str:
    """Return a name for a run folder, which sorts by time."""
    return f"{datetime.datetime.now():%Y%m-%d%H-%M%S}-{uuid.uuid4().hex[:4]}"


def seed_everything(section: JobSection) -> None:
    """Seed the global random generators of Python, NumPy and torch."""
    random.seed(section.seed)
    np.random.seed(section.seed)
    torch.manual_seed(section.seed)
    torch.cuda.manual_seed_all(section.seed)
    if section.deterministic:
        # cuBLAS is deterministic with a workspace of this size only.
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True)


@contextmanager
def stop_on_signals(pipeline: RunFolder) -> Iterator[None]:
    """Let SIGINT and SIGTERM stop a pipeline and log how to resume it; a second signal has its usual effect."""

    def stop(number: int, frame: Any) -> None:
        restore()
        log.warning("Interrupted. Resume with: %s", pipeline.job.resume)
        pipeline.stop(128 + number)
        pipeline.raise_if_stopped()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before: dict[int, Any] = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        restore()
