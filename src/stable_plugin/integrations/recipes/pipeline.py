"""The pipeline that trains, evaluates, repairs and evaluates a potential."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from stable_plugin.evaluation import (
    Evaluation,
    Evaluator,
    mean_energy_error,
    summary,
    system_reports,
    write_system_reports,
)
from stable_plugin.evaluation.system_reports import FOLDER as SYSTEMS_FOLDER
from stable_plugin.integrations.lightning.callback import StABlECallback
from stable_plugin.integrations.lightning.checkpoint_io import use_atomic_checkpoints
from stable_plugin.integrations.lightning.data import ExtxyzDataModule
from stable_plugin.integrations.recipes.control import ReplayLearningRates
from stable_plugin.integrations.recipes.correction import PairCorrection
from stable_plugin.integrations.recipes.run_folder import RunFolder, package_versions, write_json
from stable_plugin.md.system import System
from stable_plugin.models import Potential
from stable_plugin.runtime import checks
from stable_plugin.runtime.atomic_files import atomic_write

log = logging.getLogger(__name__)

MODULE_INTERFACE = ("load_weights", "save_weights", "save_potential", "potential_suffix", "shift_energies")

TRAINER_MINIMA = {"check_val_every_n_epoch": 1, "accumulate_grad_batches": 1, "log_every_n_steps": 0, "max_epochs": -1}
"""Smallest valid values of arguments of a Trainer; ``max_epochs=-1`` means no limit."""


class StABlEPipeline(RunFolder):
    """Supervised training, evaluation, StABlE training, evaluation, and a report of both.

    Args:
        model: LightningModule to train, with ``save_weights``, ``load_weights``, ``save_potential``,
            ``potential_suffix`` and ``shift_energies``.
        data: Labeled frames.
        supervised: Returns the Trainer of the supervised phase, from further keyword arguments.
        stable: The StABlE phase.
        stable_trainer: Returns its Trainer.
        evaluation: How the potential is evaluated, before and after.
        control: Whether to train also with the energy/force loss alone, for the same number of optimizer steps and at
            the same learning rate, and to evaluate that too.
        title: Headline of the report.
        correction: Pair potentials that the StABlE phase trains in the place of the model, which then learns the result;
            ``control`` does not apply.
        output: File to write the repaired potential to, with the family's suffix; only the run folder has it if None.

    Raises:
        ValueError: If the model lacks one of these methods, the output has another suffix, or a correction comes with a control or
            another objective than ``boltzmann``.
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
        correction: PairCorrection | None = None,
        output: str | Path | None = None,
    ) -> None:
        missing = [name for name in MODULE_INTERFACE if not hasattr(model, name)]
        if missing:
            raise ValueError(
                f"runner.model={model!r} has no {', '.join(missing)}: pass stable_plugin.models.mace.MACEModule, "
                "stable_plugin.models.fairchem.FairchemModule, stable_plugin.models.FineTuningModule for any other family, or a "
                "module of your own with these methods."
            )
        self.model, self.data, self.evaluation = model, data, evaluation
        self.supervised, self.stable, self.stable_trainer = supervised, stable, stable_trainer
        self.control, self.title, self.correction = control, title, correction
        if correction is not None:
            _check_with_correction(control, stable)
        self.output = None if output is None else Path(output)
        if self.output is not None:
            require_suffix("runner.output", self.output, model.potential_suffix)

    def __repr__(self) -> str:
        arguments = (
            "model",
            "data",
            "supervised",
            "stable",
            "stable_trainer",
            "evaluation",
            "control",
            "title",
            "correction",
            "output",
        )
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in arguments)})"

    def validate(self) -> None:
        """Set up the later stages once, and discard them.

        Raises:
            ValueError: If settings, data and model do not fit together.
            FileExistsError: If the output exists.
        """
        if self.output is not None:
            require_new("runner.output", self.output)
        device = self.device
        for name in ("supervised", "stable_trainer"):
            _validate_trainer(f"runner.{name}", getattr(self, name), self._accelerator)
        if hasattr(self.model, "prepare"):
            try:
                self.model.prepare(self.data.train_frames, self.data.isolated_energies)
            except ValueError as error:
                raise ValueError(f"runner.model: {error}") from error
        try:
            self.stable.validate(device)
        except (TypeError, ValueError) as error:
            raise ValueError(f"runner.stable: {error}") from error
        if self.correction is not None:
            _validate_trainer("runner.correction.copy_trainer", self.correction.copy_trainer, self._accelerator)
            try:
                self.correction.validate(self.model.model, self.data.train_frames[0], device)
            except (TypeError, ValueError) as error:
                raise ValueError(f"runner.correction: {error}") from error

    def run_stages(self) -> Path:
        """Train, evaluate, repair, evaluate and write the report, leaving out what the run folder holds already.

        Returns:
            Path of the report.
        """
        module = self._trained("before", self.model, lambda: self._fit(self.supervised, "supervised", self.model))
        before = self._evaluated("before", module)
        module = self._trained("after", module, lambda: self._repair(module))
        after = self._evaluated("after", module)
        phase = self._phase()
        control = self._run_control() if self.control else None
        report = self._report(phase, before, after, control)
        if self.output is not None:
            self._write_output(self.output)
        return report

    def _write_output(self, output: Path) -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(output, "repaired potential") as unfinished:
            shutil.copyfile(self.folder / f"after{self.model.potential_suffix}", unfinished)
        print(f"Repaired potential: {output}", flush=True)

    @property
    def _accelerator(self) -> str:
        return "cpu" if self.job.device == "cpu" else "gpu"

    def _fit(
        self,
        make_trainer: Callable[..., Trainer],
        stage: str,
        module: Any,
        callbacks: Sequence[Callback] = (),
        data: ExtxyzDataModule | None = None,
        after: str | None = None,
    ) -> None:
        """Train in a stage, which resumes if it was interrupted, or goes on from the optimizer of the stage ``after``."""
        folder = self.folder / stage
        # An interrupted run resumes from the last epoch that was written as a whole.
        last = ModelCheckpoint(folder, filename="last", enable_version_counter=False, save_on_train_epoch_end=True)
        trainer = make_trainer(
            accelerator=self._accelerator,
            devices=1,
            default_root_dir=folder,
            logger=[
                # A new version per start: Lightning deletes the files in the folder of an existing version.
                CSVLogger(folder, name="csv", flush_logs_every_n_steps=1),
                TensorBoardLogger(folder, name="tensorboard", version=""),
            ],
            callbacks=[*callbacks, last],
        )
        use_atomic_checkpoints(trainer)
        self._trainer = trainer
        self.raise_if_stopped()
        checkpoint = _newest_checkpoint(folder)
        if checkpoint is None and after is not None:
            # The optimizer of the supervised stage knows the curvature of the energy/force loss, and so moves the weights that
            # the fit does not depend on.
            checkpoint = _newest_checkpoint(self.folder / after)
        # weights_only: a checkpoint that somebody else has put here must not run code.
        trainer.fit(module, data or self.data, ckpt_path=checkpoint, weights_only=True)
        module.to(self.device)  # Lightning leaves it on the CPU

    def _repair(self, module: Any) -> None:
        if self.correction is None:
            self._run_stable_phase(module, after="supervised")
            self._remove_energy_offset(module, self.stable.loop.potential)
        else:
            self._correct(module, self.correction)

    def _correct(self, module: Any, correction: PairCorrection) -> None:
        """Train pair potentials beside the model, and the model on the result."""
        repair = correction.repair
        if repair is not None:
            endless = partial(self.supervised, max_epochs=-1)  # the callback ends it
            phase = partial(self._run_phase, "repair", endless, module, deepcopy(repair), self.data, after="supervised")
            self._trained("repaired", module, phase)
        corrected = correction.module(module.model, self.data.train_frames)
        self._trained("corrected", corrected, lambda: self._run_stable_phase(corrected))
        copy, data = correction.copy(model=module.model), correction.copy_data(model=corrected.model)
        self._trained("copy", copy, lambda: self._fit(correction.copy_trainer, "copy", copy, data=data))
        if repair is not None:
            endless = partial(correction.copy_trainer, max_epochs=-1)
            self._run_phase("copy_repair", endless, copy, deepcopy(repair), data, after="copy")
        module.model = copy.model
        system = System.from_atoms(self.data.train_frames[0], bonds=[])
        self._remove_energy_offset(module, module.stable_potential(system))

    def _run_stable_phase(self, module: LightningModule, after: str | None = None) -> None:
        self._run_phase("stable", self.stable_trainer, module, self.stable, self.data, after)
        write_json(self.folder / "learning_rates.json", self.stable.loop.learning_rates)

    def _run_phase(
        self,
        name: str,
        make_trainer: Callable[..., Trainer],
        module: LightningModule,
        callback: StABlECallback,
        data: ExtxyzDataModule,
        after: str | None = None,
    ) -> None:
        """Train with a callback, and write what its windows have found."""
        began = time.perf_counter()
        self._fit(make_trainer, name, module, [callback], data, after)
        loop = callback.loop
        phase = {
            "windows": [vars(entry) for entry in loop.windows],
            "verifications": [vars(entry) for entry in loop.verifications()],
            "wall_s": time.perf_counter() - began,
            "md_steps": loop.md_steps,
            "optimizer_steps": len(loop.learning_rates),
        }
        write_json(self.folder / f"{name}_phase.json", phase)

    def _phase(self) -> dict[str, Any]:
        """Return what the windows of all phases have found; verified is what the last one has."""
        names = [name for name in ("repair", "stable", "copy_repair") if (self.folder / f"{name}_phase.json").is_file()]
        phases = [json.loads((self.folder / f"{name}_phase.json").read_text()) for name in names]
        both = {key: sum(phase[key] for phase in phases) for key in ("wall_s", "md_steps", "optimizer_steps")}
        windows = [window for phase in phases for window in phase["windows"]]
        return {"windows": windows, "verifications": phases[-1]["verifications"], **both}

    def _remove_energy_offset(self, module: Any, potential: Potential) -> None:
        """Shift the energies back: observables do not depend on a constant, and adaptive optimizers let it drift."""
        symbols = list(potential.system.symbols)
        frames = [frame for frame in self.data.train_frames if frame.get_chemical_symbols() == symbols]
        if frames:
            module.shift_energies(-mean_energy_error(potential, frames))

    def _run_control(self) -> Evaluation | None:
        module = self.model  # its repaired weights are in their file
        module.load_weights(self._weights("before"))
        rates = json.loads((self.folder / "learning_rates.json").read_text())
        if not rates:
            return None
        replay = ReplayLearningRates(rates)
        self._trained(
            "control", module, lambda: self._fit(self.stable_trainer, "control", module, [replay], after="supervised")
        )
        return self._evaluated("control", module)

    def _trained(self, name: str, module: Any, train: Callable[[], None]) -> Any:
        """Return the module as trained now, or with the weights of an earlier start of this run."""
        weights = self._weights(name)
        if weights.is_file():
            module.load_weights(weights)
        else:
            train()
            module.save_weights(weights)
        # For other programs: a pickle, which is written here and never read.
        potential = self.folder / f"{name}{module.potential_suffix}"
        if not potential.is_file():
            module.save_potential(potential)
        return module

    def _weights(self, name: str) -> Path:
        return self.folder / f"{name}.ckpt"

    def _evaluated(self, name: str, module: LightningModule) -> Evaluation:
        path = self.folder / f"{name}.json"
        self.raise_if_stopped()
        if not path.is_file():
            log.info("evaluating the potential %s", name)
            evaluation = self.evaluation.evaluate(module.to(self.device), self.folder / "trajectories" / name)
            write_json(path, evaluation.to_json())
        return Evaluation.from_json(json.loads(path.read_text()))

    def _report(self, phase: dict[str, Any], before: Evaluation, after: Evaluation, control: Evaluation | None) -> Path:
        common = {"title": self.title, "settings": dict(self.job.settings), **phase, "versions": package_versions()}
        reports = system_reports(common, {"before": before, "after": after, "control": control})
        page = self.folder / "report.html"
        if not page.is_file():
            self._remove_partial_report()
            page = write_system_reports(self.folder, reports)
        print(f"\n{summary(reports[0].report)}\nReport: {page}", flush=True)
        return page

    def _remove_partial_report(self) -> None:
        """Remove the files of a run that ended while it wrote its report; the page is written last."""
        for name in ("report.json", "curves.json"):
            (self.folder / name).unlink(missing_ok=True)
        for name in ("figures", SYSTEMS_FOLDER):
            shutil.rmtree(self.folder / name, ignore_errors=True)


def _check_with_correction(control: bool, stable: StABlECallback) -> None:
    """Raise an error if a setting has no meaning where pair potentials are trained."""
    if control:
        raise ValueError(
            "runner.control=True with runner.correction: the copy takes other optimizer steps than the pair potentials, so "
            "there is no control. Set control: false."
        )
    if stable.config.objective != "boltzmann":
        raise ValueError(
            f"runner.stable.objective={stable.config.objective!r} with runner.correction: pair potentials are trained on "
            "observables alone. Set objective: boltzmann."
        )


def _validate_trainer(path: str, make_trainer: Callable[..., Trainer], accelerator: str) -> None:
    """Make a Trainer once, and refuse the numbers that Lightning accepts and fails with later.

    Args:
        path: Key path in the recipe, for errors.
        make_trainer: Makes the Trainer from further keyword arguments.
        accelerator: Lightning's name of the device.

    Raises:
        ValueError: If the Trainer cannot be made, or would not train.
    """
    arguments = dict(getattr(make_trainer, "keywords", {}))
    try:
        for name, least in TRAINER_MINIMA.items():
            if arguments.get(name) is not None:
                checks.count(name, arguments[name], at_least=least)
        if arguments.get("gradient_clip_val") is not None:
            checks.number("gradient_clip_val", arguments["gradient_clip_val"], at_least=0)
        with _disabled(logging.getLogger("pytorch_lightning.utilities.rank_zero")):
            make_trainer(accelerator=accelerator, devices=1, logger=False, enable_checkpointing=False)
    except Exception as error:  # Lightning raises many types
        raise ValueError(f"{path}: {error}") from error


@contextmanager
def _disabled(logger: logging.Logger) -> Iterator[None]:
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _newest_checkpoint(folder: Path) -> Path | None:
    return max(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime, default=None)


def require_suffix(name: str, path: str | Path, suffix: str) -> None:
    """Raise an error unless a file to write has the suffix of the model's family.

    Args:
        name: Name of the argument.
        path: The file.
        suffix: Suffix of the family's files.

    Raises:
        ValueError: If it has another one.
    """
    if not str(path).endswith(suffix):
        raise ValueError(
            f"{name}={str(path)!r} is not a {suffix} file: pass a path with that suffix, which files of this family have."
        )


def require_new(name: str, path: str | Path) -> None:
    """Raise an error if a file to write exists.

    Args:
        name: Name of the argument.
        path: The file.

    Raises:
        FileExistsError: If it exists.
    """
    if Path(path).exists():
        raise FileExistsError(f"{name}={str(path)!r} exists and is not overwritten: pass another path.")
