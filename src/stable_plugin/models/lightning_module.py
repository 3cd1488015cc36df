"""The part that the LightningModules of all families have in common."""

from __future__ import annotations

import inspect
import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from ase import Atoms
from ase.data import chemical_symbols
from pytorch_lightning import LightningModule
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchmetrics import Metric

from stable_plugin.md.labels import ENERGY_KEY, STRESS_KEY
from stable_plugin.md.system import System
from stable_plugin.models.base import Potential, save_new
from stable_plugin.models.isolated_atoms import MIN_OFFSET_EV, evenly_chosen, fit_offset, require_elements
from stable_plugin.models.low_rank import LowRankOptimizer, matrices
from stable_plugin.models.training_threads import TrainingThreads
from stable_plugin.runtime import checks
from stable_plugin.runtime.serialization import load_tensors

log = logging.getLogger(__name__)


class PotentialModule(LightningModule):
    """A LightningModule that trains a potential, which is passed to it or built from the training frames.

    Attributes:
        model: The model; None until it is built.
        model_argument: Name of the constructor's argument that takes an existing model.
        potential_suffix: Suffix of the family's own files.
        optimizer: Maps parameters to an optimizer; None for the default of the family.
        scheduler: Maps the optimizer to a learning-rate scheduler, stepped once an epoch; None for a constant rate.
    """

    model: Any
    model_argument: str
    potential_suffix: str
    _is_prepared = False
    _frozen: Sequence[nn.Parameter] = ()
    optimizer: Callable[[Any], torch.optim.Optimizer] | None
    scheduler: Callable[[torch.optim.Optimizer], Any] | None

    @property
    def options(self) -> Any:
        """Arguments of the constructor."""
        return self.hparams

    isolated_energies: Mapping[int, float] = MappingProxyType({})
    """Energies of isolated atoms in the training data, in eV by atomic number."""

    @abstractmethod
    def isolated_atoms(self) -> dict[int, float]:
        """Return the isolated-atom energies of the model, in eV by atomic number."""

    @abstractmethod
    def shift_isolated_atoms(self, shifts: Mapping[int, float]) -> None:
        """Add constants in eV to the isolated-atom energies, by atomic number, which changes no force."""

    @abstractmethod
    def stable_potential(self, system: System) -> Potential:
        """Return the potential that simulates ``system``."""

    @abstractmethod
    def build(self, frames: Sequence[Atoms]) -> None:
        """Build a new model, with scales measured on labeled structures."""

    @abstractmethod
    def dataloader(self, frames: Sequence[Atoms], batch_size: int, shuffle: bool) -> Any:
        """Return a dataloader over graphs of the family, made from labeled structures."""

    @abstractmethod
    def training_loss(self, batch: Any) -> Tensor:
        """Return the loss that is minimized, for one of these batches."""

    @abstractmethod
    def default_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimizer of parameters, where the user has passed none."""

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer of the model's parameters, or of low-rank changes of its matrices."""
        make = self.optimizer or self.default_optimizer
        if self.options.lora_rank is None:
            return make(self.model.parameters())
        weights = [(weight, blocks) for _, weight, blocks in matrices(self.model) if weight.requires_grad]
        return LowRankOptimizer(weights, self.options.lora_rank, make)

    def configure_callbacks(self) -> list[Any]:
        """Build the model, and return the callback that chooses the number of threads.

        Lightning calls this hook first. Its weight averaging copies the module before ``setup``, so the model has to exist
        by then.
        """
        self.setup("fit")
        return [TrainingThreads()]

    def setup(self, stage: str) -> None:
        """Build a new model from the training frames, or align the isolated atoms of an existing one with their labels.

        Args:
            stage: As Lightning passes it.

        Raises:
            ValueError: If the data module has no training frames.
        """
        data = getattr(self.trainer, "datamodule", None)
        frames = getattr(data, "train_frames", None)
        if self.model is not None and (frames is None or stage != "fit"):
            return
        if frames is None:
            raise ValueError(
                f"{type(self).__name__} needs the training frames to build a new model: fit with a data module that has "
                f"train_frames, such as ExtxyzDataModule, or pass {self.model_argument}=."
            )
        self.prepare(frames, getattr(data, "isolated_energies", None))

    def prepare(self, frames: Sequence[Atoms], isolated_energies: Mapping[int, float] | None = None) -> None:
        """Build a new model and validate it on the first frame; align the isolated atoms of a model that was passed.

        Args:
            frames: Labeled structures.
            isolated_energies: Energies of isolated atoms in the data, in eV by atomic number.

        Raises:
            ValueError: If the arguments do not define a model, it fails on the first frame, or energies of isolated atoms
                are missing.
        """
        if self._is_prepared:
            return
        self._is_prepared = True
        self._tell_unused_stress(frames)
        self.isolated_energies = dict(isolated_energies or {})
        if self.model is not None:
            self._align_isolated_atoms(frames)
        else:
            self._build_checked(frames)
        self._freeze_others(self.options.trainable)
        if self.options.lora_rank is not None:
            self._freeze_all_but([name for name, _, _ in matrices(self.model)])

    def _tell_unused_stress(self, frames: Sequence[Atoms]) -> None:
        if any(STRESS_KEY in frame.info for frame in frames) and not self.options.get("stress_weight"):
            log.warning(
                "the stresses in the training frames are not used%s.",
                ": set stress_weight to train on them"
                if "stress_weight" in self.options
                else f" by {type(self).__name__}",
            )

    def _build_checked(self, frames: Sequence[Atoms]) -> None:
        try:
            self.build(frames)
            # A loader draws random numbers even if it does not shuffle.
            with torch.enable_grad(), torch.random.fork_rng(devices=[]):
                self.training_loss(next(iter(self.dataloader(frames[:1], 1, shuffle=False)))).backward()
        except Exception as error:  # arguments of a foreign model can fail anywhere inside it, with any error
            self.model = None
            raise ValueError(
                f"{type(self).__name__} cannot build a model that works on the first training frame "
                f"({type(error).__name__}: {error}). Its arguments: "
                f"{', '.join(f'{name}={value!r}' for name, value in self.options.items())}."
            ) from error
        self.zero_grad()

    def _freeze_others(self, trainable: str | Sequence[str] | None) -> None:
        """Freeze the parameters whose names match none of the patterns."""
        if trainable is None:
            return
        trainable = [trainable] if isinstance(trainable, str) else trainable
        names = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        for pattern in trainable:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"trainable={pattern!r} matches no parameter of {type(self.model).__name__}: those that can be trained "
                    f"are {', '.join(names)}."
                )
        self._freeze_all_but([name for name in names if any(fnmatchcase(name, pattern) for pattern in trainable)])

    def _freeze_all_but(self, trained: Sequence[str]) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and name not in trained:
                self._frozen = [*self._frozen, parameter.requires_grad_(False)]

    @contextmanager
    def unfrozen(self) -> Iterator[None]:
        """Release the parameters that are not trained, so that a file that is written can be trained as a whole."""
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter in self._frozen:
                parameter.requires_grad_(False)

    def _align_isolated_atoms(self, frames: Sequence[Atoms]) -> None:
        """Move the isolated-atom energies of an existing model to those of the labels, as ``E0s`` demands."""
        mode = self.options.E0s
        if mode == "model":
            return
        if isinstance(mode, Mapping) or mode == "isolated":
            given = mode if isinstance(mode, Mapping) else self.isolated_energies
            wanted = require_elements(
                given, frames, "add their energies in eV or frames of isolated atoms, or use E0s='average' or 'model'."
            )
            own = self.isolated_atoms()
            self.shift_isolated_atoms({number: energy - own[number] for number, energy in wanted.items()})
            return
        chosen = evenly_chosen(frames)
        offset = fit_offset(chosen, self.total_energies(chosen), [frame.info[ENERGY_KEY] for frame in chosen])
        if mode == "average" or offset.is_of_another_code:
            self.shift_isolated_atoms(offset.shifts)
            log.warning(
                "the energies of the model and of the labels differ by %.0f meV/atom on average, as those of two codes do: "
                "the isolated-atom energies are moved by %s eV, after which the errors are %.0f instead of %.0f meV/atom "
                "(RMS). Forces do not change. Pass E0s='model' to keep them, or 'isolated' to take those of the data.",
                1000.0 * offset.mean,
                ", ".join(f"{chemical_symbols[number]} {shift:+.3f}" for number, shift in offset.shifts.items()),
                1000.0 * offset.rms_after,
                1000.0 * offset.rms,
            )
        elif offset.rms > MIN_OFFSET_EV:
            log.warning(
                "the energies of the model differ from the labels by %.0f meV/atom (RMS), which other isolated-atom energies "
                "do not explain: check units and level of theory of the labels.",
                1000.0 * offset.rms,
            )

    def on_validation_epoch_start(self) -> None:
        """Reset the metrics: those of an earlier ``Trainer.validate`` hold tensors of inference mode, which fitting cannot add to."""
        for module in self.modules():
            if isinstance(module, Metric):
                module.reset()

    def total_energies(self, frames: Sequence[Atoms]) -> list[float]:
        """Return the total energies of structures under the present weights, in eV.

        Args:
            frames: ASE structures.
        """
        return [self._total_energy(frame) for frame in frames]

    def _total_energy(self, frame: Atoms) -> float:
        potential = self.stable_potential(System.from_atoms(frame, bonds=[]))
        positions = torch.as_tensor(frame.positions[None]).to(potential.device, potential.dtype)
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]), potential.frozen(), torch.no_grad():
            energy = potential.energies(positions, potential.edges(positions)).double().item()
        return energy + potential.constant_energy

    def save_weights(self, path: str | Path) -> None:
        """Write a file for :meth:`load_weights`: tensors and plain values, which can be read without running code.

        Args:
            path: A path that does not exist yet.

        Raises:
            FileExistsError: If there is a file already.
        """
        checkpoint: dict[str, Any] = {"state_dict": {name: each.cpu() for name, each in self.state_dict().items()}}
        self.on_save_checkpoint(checkpoint)
        save_new(checkpoint, path)

    def load_weights(self, path: str | Path) -> None:
        """Restore the weights that :meth:`save_weights` wrote.

        Args:
            path: The file.

        Raises:
            ValueError: If the file is damaged, contains more than tensors and plain values, or is of another model.
        """
        checkpoint = load_tensors(path, "weights")
        try:
            self.on_load_checkpoint(checkpoint)
            self.load_state_dict(checkpoint["state_dict"])
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"weights {str(path)!r} are of another model ({type(error).__name__}: {error})."
            ) from error

    def warn_unused(self, names: Sequence[str]) -> None:
        """Warn of arguments that only a new model uses, where an existing one was passed.

        Args:
            names: Names of these arguments.
        """
        defaults = inspect.signature(type(self).__init__).parameters
        unused = [name for name in names if name in defaults and self.options[name] != defaults[name].default]
        if unused:
            log.warning(
                "%s: not used, because an existing model was passed (%s=), which has its own: remove them.",
                ", ".join(f"{name}={self.options[name]!r}" for name in unused),
                self.model_argument,
            )

    def check_optimizer(self) -> None:
        """Validate the rank of changes, and the user's optimizer and scheduler by two steps on a parameter of their own.

        Raises:
            ValueError: If one of them is out of range or fails.
        """
        if self.options.lora_rank is not None:
            checks.count("lora_rank", self.options.lora_rank)
        weight = nn.Parameter(torch.zeros(2))
        name, value = "optimizer", self.optimizer
        try:
            optimizer = torch.optim.SGD([weight], lr=1.0) if self.optimizer is None else self.optimizer([weight])
            name, value = "scheduler", self.scheduler
            scheduler = None if self.scheduler is None else self.scheduler(optimizer)
            for _ in range(2):
                weight.grad = torch.zeros_like(weight)
                optimizer.step(lambda: 0.0)
                if scheduler is not None:
                    plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                    scheduler.step(*[0.0] * plateau)
        except Exception as error:  # raised by torch or by the user's own class
            raise ValueError(
                f"{name}={value} does not work ({type(error).__name__}: {error}): pass one that takes "
                f"{'parameters' if name == 'optimizer' else 'an optimizer'} and can be stepped."
            ) from error

    def refuse_mixed_precision(self, reason: str) -> None:
        """Raise an error if the Trainer mixes precisions.

        Args:
            reason: Why this is not possible, and the remedy.

        Raises:
            MisconfigurationException: If it does.
        """
        precision = str(self.trainer.precision)
        if precision.endswith("-mixed"):
            raise MisconfigurationException(f"Trainer(precision={precision!r}) is not possible with {reason}")

    def configure_optimizers(self) -> Any:
        """Return the optimizer, with its scheduler if there is one."""
        optimizer = self.make_optimizer()
        if self.scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.scheduler(optimizer), "monitor": "valid/loss"},
        }
