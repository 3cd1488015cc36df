"""Runners for ``fairchem -c recipe.yaml``."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from stable_plugin.algorithm.gradients import TemporaryLearningRate
from stable_plugin.evaluation import Evaluation, Evaluator, mean_energy_error, summary, write_report
from stable_plugin.integrations.lightning.callback import StABlECallback
from stable_plugin.integrations.lightning.checkpoint_io import use_atomic_checkpoints
from stable_plugin.integrations.lightning.data import ExtxyzDataModule
from stable_plugin.models import load_potential
from stable_plugin.runtime import checks
from stable_plugin.runtime.atomic_files import atomic_write, explain_write_errors, is_explained

try:
    from fairchem.core.components.runner import Runner
    from omegaconf import OmegaConf

    from stable_plugin.integrations.recipes.instantiate import made
except ImportError as error:
    raise ImportError(
        "recipes run through the fairchem command line, but fairchem-core is not installed: "
        "pip install 'stable-plugin[fairchem]'."
    ) from error

log = logging.getLogger(__name__)

TRAINER_COUNTS = {"check_val_every_n_epoch": 1, "accumulate_grad_batches": 1, "log_every_n_steps": 0, "max_epochs": -1}
"""Smallest values of arguments of a Trainer; -1 epochs are as many as it takes."""

PACKAGES = ("stable-plugin", "torch", "pytorch-lightning", "mace-torch", "fairchem-core", "e3nn", "ase")


def _going_on(run: Callable[[Any], Path]) -> Callable[[Any], Path]:
    """Have errors of writing name the run folder, the way out, and the command that goes on with what is finished."""

    @wraps(run)
    def explaining(runner: RunFolder) -> Path:
        try:
            with explain_write_errors(runner.folder, "run folder"):
                return run(runner)
        except OSError as error:
            if is_explained(error):
                error.add_note(
                    f"What is finished stays. Go on with: fairchem -c {runner.job_config.metadata.config_path}"
                )
            raise

    return explaining


class RunFolder(Runner):
    """A runner whose state is its run folder: what is finished is found there, and not done again.

    Run it again with the configuration that an interrupted run leaves behind, and it goes on from the last epoch.
    """

    _stop_signaled = False
    _trainer: Trainer | None = None

    @property
    def folder(self) -> Path:
        """The run folder, ``<job.run_dir>/<job.timestamp_id>``."""
        return Path(self.job_config.metadata.results_dir).parent

    @property
    def accelerator(self) -> str:
        """Lightning's name for ``job.device_type``."""
        return (
            "cpu" if str(getattr(self.job_config.device_type, "value", self.job_config.device_type)) == "cpu" else "gpu"
        )

    @property
    def device(self) -> torch.device:
        """Where the model is.

        Raises:
            ValueError: If there is no such device.
        """
        if self.accelerator != "cpu" and not torch.cuda.is_available():
            raise ValueError(
                f"job.device_type={str(self.job_config.device_type)!r}, but torch finds no CUDA device: set "
                "job.device_type=CPU, or install a torch that is built for CUDA."
            )
        return torch.device("cpu" if self.accelerator == "cpu" else "cuda")

    def save_state(self, checkpoint_location: str, is_preemption: bool = False) -> bool:
        """Say how to go on; the run folder holds everything else.

        fairchem calls this where a signal comes, and ends the process with an exception there. It can be lost: compilers
        and finalizers of foreign code catch what they do not know. So the run also ends at the next place that looks.
        """
        self._stop_signaled = True
        if self._trainer is not None:
            # As Lightning's own handler of SIGTERM does; it has none for SIGINT.
            self._trainer._signal_connector.received_sigterm = True
        log.warning("Interrupted. Go on with: fairchem -c %s", Path(checkpoint_location) / "resume_config.yaml")
        return True

    def load_state(self, checkpoint_location: str | None) -> None:
        """Nothing to load: the run folder is found through the configuration."""

    def raise_if_signaled(self) -> None:
        """End the run here, if it was told to stop.

        Raises:
            SystemExit: As fairchem does.
        """
        if self._stop_signaled:
            raise SystemExit(0)

    def settings(self) -> dict[str, Any]:
        """The recipe as it was run."""
        path = Path(self.job_config.metadata.config_path)
        settings: Any = OmegaConf.to_container(OmegaConf.load(path)) if path.is_file() else {}
        return dict(settings.get("runner", {}))


class StABlERunner(RunFolder):
    """Supervised training, evaluation, StABlE training, evaluation, and a report of both.

    Args:
        model: LightningModule to train, with ``save_weights``, ``load_weights``, ``save_potential``,
            ``potential_suffix`` and ``shift_energies``.
        data: Labelled frames.
        supervised: Gives the Trainer of the supervised phase, from further keyword arguments.
        stable: The StABlE phase.
        stable_trainer: Gives its Trainer.
        evaluation: How the potential is judged, before and after.
        control: Whether to train also with the energy/force loss alone, for the same number of optimizer steps and at
            the same learning rate, and to judge that too.
        title: Headline of the report.
    """

    def __init__(
        self,
        model: Any,
        data: ExtxyzDataModule,
        supervised: Callable[..., Trainer],
        stable: StABlECallback,
        stable_trainer: Callable[..., Trainer],
        evaluation: Evaluator,
        control: bool = False,
        title: str = "StABlE training",
    ) -> None:
        parts = made(
            type(self),
            {
                "model": model,
                "data": data,
                "supervised": supervised,
                "stable": stable,
                "stable_trainer": stable_trainer,
                "evaluation": evaluation,
                "control": control,
                "title": title,
            },
        )
        self.model = _family_module(parts["model"])
        self.data = parts["data"]
        self.supervised = parts["supervised"]
        self.stable = parts["stable"]
        self.stable_trainer = parts["stable_trainer"]
        self.evaluation = parts["evaluation"]
        self.control = parts["control"]
        self.title = parts["title"]

    @_going_on
    def run(self) -> Path:
        """Run what is not done yet.

        Returns:
            Path of the report.
        """
        self._validate()
        self.folder.mkdir(parents=True, exist_ok=True)
        module = self._trained("before", self.model, lambda: self._fit(self.supervised, "supervised", self.model, []))
        before = self._judged("before", module)
        module = self._trained("after", module, lambda: self._stabilise(module))
        after = self._judged("after", module)
        phase = json.loads((self.folder / "stable_phase.json").read_text())
        control = self._controlled(phase) if self.control else None
        return self._report(phase, before, after, control)

    def _validate(self) -> None:
        """Bring out now what would otherwise end the run after hours: later stages are set up once, and thrown away."""
        device = self.device
        for name in ("supervised", "stable_trainer"):
            _validate_trainer(f"runner.{name}", getattr(self, name), self.accelerator)
        if hasattr(self.model, "prepare"):
            try:
                self.model.prepare(self.data.train_frames)
            except ValueError as error:
                raise ValueError(f"runner.model: {error}") from error
        try:
            self.stable.validate(device)
        except (TypeError, ValueError) as error:
            raise ValueError(f"runner.stable: {error}") from error

    def _fit(self, make_trainer: Callable[..., Trainer], stage: str, module: Any, callbacks: list[Callback]) -> None:
        folder = self.folder / stage
        # Written at the end of every epoch, whole or not at all: what an interrupted run goes on from.
        last = ModelCheckpoint(folder, filename="last", enable_version_counter=False, save_on_train_epoch_end=True)
        trainer = make_trainer(
            accelerator=self.accelerator,
            devices=1,
            default_root_dir=folder,
            logger=[
                # A version of its own for each start: Lightning deletes what it finds in the folder of a version.
                CSVLogger(folder, name="csv", flush_logs_every_n_steps=1),
                TensorBoardLogger(folder, name="tensorboard", version=""),
            ],
            callbacks=[*callbacks, last],
        )
        use_atomic_checkpoints(trainer)
        self._trainer = trainer
        self.raise_if_signaled()
        # Later stages go on from the supervised one: an optimizer that knows the curvature of the energy/force loss
        # moves the weights that the fit does not depend on.
        checkpoint = _newest_checkpoint(folder) or _newest_checkpoint(self.folder / "supervised")
        # Read with weights_only: a checkpoint that somebody else has put here does not get to run code.
        trainer.fit(module, self.data, ckpt_path=checkpoint, weights_only=True)

    def _stabilise(self, module: LightningModule) -> None:
        began = time.perf_counter()
        self._fit(self.stable_trainer, "stable", module, [self.stable])
        self._undo_drift(module)
        loop = self.stable.loop
        phase = {
            "windows": [vars(entry) for entry in loop.windows],
            "wall_s": time.perf_counter() - began,
            "md_steps": loop.md_steps,
            "optimizer_steps": sum(entry.steps for entry in loop.windows),
        }
        _write_json(self.folder / "stable_phase.json", phase)

    def _undo_drift(self, module: Any) -> None:
        """Shift the energies back: the observables do not see a constant, and adaptive optimizers let it drift."""
        potential = self.stable.loop.potential
        symbols = list(potential.system.symbols)
        frames = [frame for frame in self.data.train_frames if frame.get_chemical_symbols() == symbols]
        if frames:
            module.shift_energies(-mean_energy_error(potential, frames))

    def _controlled(self, phase: dict[str, Any]) -> Evaluation | None:
        module = self.model  # what it held is in its file
        module.load_weights(self._weights("before"))
        rates = [entry["learning_rate"] for entry in phase["windows"] for _ in range(entry["steps"])]
        if not rates:
            return None

        return self._judged(
            "control",
            self._trained(
                "control", module, lambda: self._fit(self.stable_trainer, "control", module, [_Rates(rates)])
            ),
        )

    def _trained(self, name: str, module: Any, train: Callable[[], None]) -> Any:
        """The module as trained now, or as trained when this run was first started."""
        weights = self._weights(name)
        if weights.is_file():
            module.load_weights(weights)
        else:
            train()
            module.save_weights(weights)
        # For others: a pickle, which is written here and never read.
        potential = self.folder / f"{name}{self.model.potential_suffix}"
        if not potential.is_file():
            module.save_potential(potential)
        return module

    def _weights(self, name: str) -> Path:
        return self.folder / f"{name}.ckpt"

    def _judged(self, name: str, module: LightningModule) -> Evaluation:
        path = self.folder / f"{name}.json"
        self.raise_if_signaled()
        if not path.is_file():
            log.info("evaluating the potential %s", name)
            evaluation = self.evaluation.evaluate(module.to(self.device), self.folder / "trajectories" / name)
            _write_json(path, evaluation.to_json())
        return Evaluation(**json.loads(path.read_text()))

    def _report(self, phase: dict[str, Any], before: Evaluation, after: Evaluation, control: Evaluation | None) -> Path:
        stages = {"before": before, "after": after, "control": control}
        present = {name: stage for name, stage in stages.items() if stage is not None}
        report = {
            "title": self.title,
            "settings": self.settings(),
            **phase,
            **{name: stage and stage.summaries[0] for name, stage in stages.items()},
            "extended": None
            if len(before.summaries) == 1
            else {name: stage and stage.summaries[-1] for name, stage in stages.items()},
            "versions": _versions(),
        }
        curves = {**{name: stage.curves for name, stage in present.items()}, "axes": before.axes}
        page = self.folder / "report.html"
        if not page.is_file():
            self._remove_half_a_report()
            page = write_report(self.folder, report, curves)
        print(f"\n{summary(report)}\nReport: {page}", flush=True)
        return page

    def _remove_half_a_report(self) -> None:
        """What a run that was cut off while it wrote its report left behind; the page is written last."""
        for name in ("report.json", "curves.json"):
            (self.folder / name).unlink(missing_ok=True)
        shutil.rmtree(self.folder / "figures", ignore_errors=True)


class EvaluateRunner(RunFolder):
    """Judges a potential as it is.

    Args:
        model: Path of a MACE ``.model`` file or of a fairchem inference checkpoint, or the name of a foundation model.
        evaluation: How it is judged.
        title: Headline of the report.
        arguments: Further arguments of the family's loader, such as ``task_name`` for fairchem.
    """

    def __init__(
        self,
        model: str,
        evaluation: Evaluator,
        title: str = "Stability in molecular dynamics",
        **arguments: Any,
    ) -> None:
        parts = made(type(self), {"model": model, "evaluation": evaluation, "title": title, **arguments})
        self.evaluation, self.title = parts.pop("evaluation"), parts.pop("title")
        try:
            self.model = load_potential(parts.pop("model"), **parts)
        except TypeError as error:  # an argument that the family's loader does not have
            given = ", ".join(f"runner.{name}={value!r}" for name, value in parts.items())
            raise ValueError(
                f"{given or 'runner.model'}: {error}. Leave out what is no argument of the loader."
            ) from error

    @_going_on
    def run(self) -> Path:
        """Simulate, measure and report.

        Returns:
            Path of the report.
        """
        model = self.model.to(self.device)
        self.folder.mkdir(parents=True, exist_ok=True)
        evaluation = self.evaluation.evaluate(model, self.folder / "trajectories")
        report = {
            "title": self.title,
            "settings": self.settings(),
            "evaluation": evaluation.summaries[0],
            "extended": {"evaluation": evaluation.summaries[-1]} if len(evaluation.summaries) > 1 else None,
            "versions": _versions(),
        }
        page = write_report(self.folder, report, {"evaluation": evaluation.curves, "axes": evaluation.axes})
        print(f"\n{summary(report)}\nReport: {page}", flush=True)
        return page


class _Rates(Callback):
    """Takes one optimizer step at each of the given learning rates, then ends training."""

    def __init__(self, rates: list[float]) -> None:
        self.rates = rates
        self.taken = 0
        self._rate = TemporaryLearningRate()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._rate.set(optimizer, self.rates[self.taken], 1.0)
        self.taken += 1
        trainer.should_stop = self.taken == len(self.rates)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        for optimizer in trainer.optimizers:
            self._rate.restore(optimizer)

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.taken = state_dict["taken"]


def _family_module(module: Any) -> Any:
    lacking = [
        name
        for name in ("load_weights", "save_weights", "save_potential", "potential_suffix", "shift_energies")
        if not hasattr(module, name)
    ]
    if lacking:
        raise ValueError(
            f"runner.model={module!r} has no {', '.join(lacking)}: give a module of stable_plugin.integrations.lightning, or one of your "
            "own with these."
        )
    return module


def _validate_trainer(path: str, make_trainer: Callable[..., Trainer], accelerator: str) -> None:
    """Make a Trainer once, and refuse the numbers that Lightning itself takes and trips over later.

    Raises:
        ValueError: If it cannot be made, or would not train.
    """
    given = dict(getattr(make_trainer, "keywords", {}))
    try:
        for name, least in TRAINER_COUNTS.items():
            if given.get(name) is not None:
                checks.count(name, given[name], at_least=least)
        if given.get("gradient_clip_val") is not None:
            checks.number("gradient_clip_val", given["gradient_clip_val"], at_least=0)
        with _quiet(logging.getLogger("pytorch_lightning.utilities.rank_zero")):
            make_trainer(accelerator=accelerator, devices=1, logger=False, enable_checkpointing=False)
    except Exception as error:  # Lightning's errors are of many kinds
        raise ValueError(f"{path}: {error}") from error


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _newest_checkpoint(folder: Path) -> Path | None:
    return max(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime, default=None)


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _write_json(path: Path, content: Any) -> None:
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(content, indent=1))
