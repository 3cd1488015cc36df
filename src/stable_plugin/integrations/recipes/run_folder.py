"""What all runs of a recipe share: their folder, their device, and how they stop and resume."""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Trainer

from stable_plugin.integrations.lightning._lightning_internals import request_stop
from stable_plugin.runtime.atomic_files import atomic_write, explain_write_errors, is_explained

log = logging.getLogger(__name__)

PACKAGES = ("stable-plugin", "torch", "pytorch-lightning", "mace-torch", "fairchem-core", "e3nn", "ase")


@dataclass(frozen=True)
class Job:
    """Where and how a pipeline runs.

    Attributes:
        folder: The run folder.
        device: ``cpu`` or ``cuda``.
        resume: Command that resumes the run, for messages.
        settings: The recipe's ``runner`` section, for the report.
        config: The resolved recipe to write into the run folder, unless something else writes it.
    """

    folder: Path
    device: str = "cpu"
    resume: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None


class RunFolder(ABC):
    """A pipeline whose state is its run folder: stages that have finished are found there and not run again.

    Attributes:
        job: Where and how to run; set before :meth:`validate` and :meth:`run`.
    """

    job: Job
    _exit_code: int | None = None
    _trainer: Trainer | None = None

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.job.folder

    @property
    def device(self) -> torch.device:
        """The device of the model.

        Raises:
            ValueError: If torch does not find it.
        """
        if self.job.device != "cpu" and not torch.cuda.is_available():
            raise ValueError(
                f"job.device_type={self.job.device!r}, but torch finds no CUDA device: set job.device_type=CPU, or install "
                "a torch that is built for CUDA."
            )
        return torch.device(self.job.device)

    @abstractmethod
    def validate(self) -> None:
        """Raise the errors that would otherwise end the run after hours.

        Raises:
            ValueError: If settings, data and model do not fit together.
        """

    @abstractmethod
    def run_stages(self) -> Path:
        """Run the stages that have not finished, and return the path of the report."""

    def run(self) -> Path:
        """Run the stages that have not finished.

        Returns:
            Path of the report.

        Raises:
            OSError: If the run folder cannot be written to; names the remedy and the command that resumes the run.
        """
        try:
            with explain_write_errors(self.folder, "run folder"):
                self.folder.mkdir(parents=True, exist_ok=True)
                return self.run_stages()
        except OSError as error:
            if is_explained(error) and self.job.resume:
                error.add_note(f"Finished stages are kept. Resume with: {self.job.resume}")
            raise

    def stop(self, exit_code: int = 0) -> None:
        """End the run at the next place where it can.

        A signal handler raises SystemExit, but the exception can be lost: compilers and finalizers of other packages catch
        what they do not know. So the run also ends where :meth:`raise_if_stopped` is called.

        Args:
            exit_code: Exit code of the process.
        """
        self._exit_code = exit_code
        if self._trainer is not None:
            request_stop(self._trainer)

    def raise_if_stopped(self) -> None:
        """End the process if :meth:`stop` was called.

        Raises:
            SystemExit: With the exit code of :meth:`stop`.
        """
        if self._exit_code is not None:
            raise SystemExit(self._exit_code)


def package_versions() -> dict[str, str]:
    """Return the versions of the installed packages that results depend on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file that appears complete or not at all."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(content, indent=1))
