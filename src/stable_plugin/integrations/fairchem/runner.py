"""Runners for ``fairchem -c recipe.yaml``: the pipelines of recipes behind fairchem's Runner protocol."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

try:
    from fairchem.core.components.runner import Runner
except ImportError as error:
    raise ImportError(
        "fairchem -c needs fairchem-core, which is not installed: pip install 'stable-plugin[fairchem]', or run the recipe "
        "with stable-plugin train."
    ) from error

from omegaconf import OmegaConf

from stable_plugin.integrations.recipes.evaluate import EvaluatePipeline
from stable_plugin.integrations.recipes.instantiate import instantiate_arguments
from stable_plugin.integrations.recipes.pipeline import StABlEPipeline
from stable_plugin.integrations.recipes.run_folder import Job, RunFolder

log = logging.getLogger(__name__)


class _FairchemRunFolder(RunFolder, Runner):
    """A pipeline as fairchem runs it: it sets ``job_config``, and calls ``save_state`` when a signal arrives."""

    def run(self) -> Path:
        """Validate, and run the stages that have not finished.

        Returns:
            Path of the report.
        """
        self.job = job_of(self.job_config)
        self.validate()
        return super().run()

    def save_state(self, checkpoint_location: str, is_preemption: bool = False) -> bool:
        """Log how to resume, and stop the run; the run folder holds everything else.

        fairchem calls this in its signal handler, writes ``resume_config.yaml``, and raises SystemExit.
        """
        self.stop()
        log.warning("Interrupted. Resume with: fairchem -c %s", Path(checkpoint_location) / "resume_config.yaml")
        return True

    def load_state(self, checkpoint_location: str | None) -> None:
        """Load nothing: the run folder is found through the configuration."""


class StABlERunner(_FairchemRunFolder, StABlEPipeline):
    """Runner of :class:`~stable_plugin.integrations.recipes.pipeline.StABlEPipeline`.

    Args:
        arguments: Its arguments, as objects or as parts of a recipe.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**instantiate_arguments(StABlEPipeline, arguments, name="stable_plugin.StABlERunner"))


class EvaluateRunner(_FairchemRunFolder, EvaluatePipeline):
    """Runner of :class:`~stable_plugin.integrations.recipes.evaluate.EvaluatePipeline`.

    Args:
        arguments: Its arguments, as objects or as parts of a recipe.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**instantiate_arguments(EvaluatePipeline, arguments, name="stable_plugin.EvaluateRunner"))


def job_of(config: Any) -> Job:
    """Return the job description of a fairchem job.

    Args:
        config: The ``job`` section of fairchem's configuration, with its metadata.
    """
    path = Path(config.metadata.config_path)
    recipe: Any = OmegaConf.to_container(OmegaConf.load(path)) if path.is_file() else {}
    return Job(
        folder=Path(config.metadata.results_dir).parent,
        device="cpu" if str(getattr(config.device_type, "value", config.device_type)).lower() == "cpu" else "cuda",
        resume=f"fairchem -c {path}",
        settings=dict(recipe.get("runner", {})),
    )
