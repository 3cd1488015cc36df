"""The pipeline that evaluates a potential as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stable_plugin.evaluation import Evaluator, summary, system_reports, write_system_reports
from stable_plugin.integrations.recipes.run_folder import RunFolder, package_versions
from stable_plugin.models import load_potential


class EvaluatePipeline(RunFolder):
    """Evaluation of a potential in molecular dynamics, with a report.

    Args:
        model: Path of a MACE ``.model`` file or of a fairchem inference checkpoint, or the name of a foundation model.
        evaluation: How the potential is evaluated.
        title: Headline of the report.
        arguments: Further arguments of the family's loader, such as ``task_name`` for fairchem.

    Attributes:
        failed: Names of the systems that could not be evaluated, beside others that were.

    Raises:
        FileNotFoundError: If the model is neither a file nor a known name.
        ValueError: If the file is not a model, or the loader does not take one of the arguments.
    """

    def __init__(
        self, model: str, evaluation: Evaluator, title: str = "Stability in molecular dynamics", **arguments: Any
    ) -> None:
        self.evaluation, self.title = evaluation, title
        self.failed: list[str] = []
        try:
            self.model = load_potential(model, **arguments)
        except TypeError as error:
            given = ", ".join(f"runner.{name}={value!r}" for name, value in arguments.items())
            raise ValueError(
                f"{given or 'runner.model'}: {error}. Remove what is not an argument of the model's loader."
            ) from error

    def __repr__(self) -> str:
        return f"{type(self).__name__}(evaluation={self.evaluation!r}, title={self.title!r})"

    def validate(self) -> None:
        self.model.to(self.device)

    def run_stages(self) -> Path:
        """Simulate, measure and write the report of each system.

        Returns:
            Path of the report, which links to those of further systems.
        """
        evaluation = self.evaluation.evaluate(self.model.to(self.device), self.folder / "trajectories")
        self.failed = list(evaluation.failed)
        common = {"title": self.title, "settings": dict(self.job.settings), "versions": package_versions()}
        reports = system_reports(common, {"evaluation": evaluation})
        page = write_system_reports(self.folder, reports)
        print(f"\n{summary(reports[0].report)}\nReport: {page}", flush=True)
        return page
