"""fairchem as a LightningModule: fairchem's own networks, tasks, graphs and losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError

from stable_plugin.md.labels import ENERGY_KEY, FORCES_KEY
from stable_plugin.md.system import System
from stable_plugin.models.fairchem.files import (
    FairchemModel,
    as_container,
    check_new,
    load_fairchem,
    new_fairchem,
    save_fairchem,
)
from stable_plugin.models.fairchem.potential import FairchemPotential
from stable_plugin.models.isolated_atoms import E0s, check_mode, require_elements
from stable_plugin.models.lightning_module import PotentialModule
from stable_plugin.runtime import checks

# After stable_plugin.models.fairchem.potential, whose error says what to install if fairchem is missing.
from fairchem.core.datasets.atomic_data import AtomicData  # isort: skip
from fairchem.core.units.mlip_unit.mlip_unit import Task, compute_loss, mt_collater_adapter  # isort: skip

ARCHITECTURE = ("backbone", "heads", "energy_weight", "forces_weight", "seed")
"""Arguments of a new model."""

TRAINED = ("energy", "forces")
"""Properties that enter the loss."""


class FairchemModule(PotentialModule):
    """A LightningModule that trains a fairchem model on energies and forces.

    A pretrained model is fine-tuned with the tasks, scales and element references of its checkpoint. For a new model they
    are fitted to the training frames.

    Args:
        checkpoint: Path of a fairchem inference checkpoint, or the name of a pretrained model; a new one if not given.
        backbone: Configuration of the backbone of a new model; ``model`` is its name in fairchem.
        heads: Configurations of the heads of a new model; ``module`` is the name in fairchem.
        task_name: Name of the data set that the frames belong to, such as ``omol``; optional for a checkpoint that knows
            only one.
        charge: Total charge of structures that state none, in units of e.
        spin: Spin multiplicity of structures that state none.
        conservative: Train and simulate with the gradient of the energy even if the model predicts forces directly.
        E0s: Energies of isolated atoms (fairchem's element references): in eV by atomic number; ``isolated``, those of the
            isolated atoms in the data; ``average``, fitted to the training frames; or ``model``, those of the checkpoint. If
            None: a new model takes those of the data, or their average if some are missing; a checkpoint keeps its own,
            unless the labels are evidently those of another code, and then they are fitted, with a warning.
        energy_weight: Weight of the energy loss per atom of a new model; a checkpoint contains its own.
        forces_weight: Weight of the force loss of a new model.
        lr: Learning rate of the default optimizer, AdamW.
        weight_decay: Weight decay of that optimizer.
        optimizer: Maps parameters to an optimizer; replaces the default.
        scheduler: Maps the optimizer to a learning-rate scheduler, stepped once an epoch.
        trainable: Names of the parameters to train, as patterns like ``"readouts.*"``; the others are frozen. All are trained if None.
        lora_rank: Rank of the changes of weight matrices, a few for a pretrained model (LoRA); other weights are frozen then. Weights
            change as a whole if None.
        seed: Seed of the weights of a new model.

    Raises:
        ValueError: If the arguments do not define a model, one is out of range, or the checkpoint lacks the task.
    """

    potential_suffix = ".pt"
    model_argument = "checkpoint"

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        backbone: Mapping[str, Any] | None = None,
        heads: Mapping[str, Any] | None = None,
        task_name: str | None = None,
        charge: int | None = None,
        spin: int | None = None,
        conservative: bool = False,
        E0s: E0s = None,
        energy_weight: float = 10.0,
        forces_weight: float = 30.0,
        lr: float = 4e-4,
        weight_decay: float = 1e-3,
        optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
        scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
        trainable: str | Sequence[str] | None = None,
        lora_rank: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        # Plain containers, which a checkpoint that is read without running code can store.
        backbone, heads = (None if config is None else as_container(config) for config in (backbone, heads))
        self.save_hyperparameters(ignore=["optimizer", "scheduler"])
        check_mode(E0s)
        checks.number("lr", lr, above=0)
        for name, number in (
            ("energy_weight", energy_weight), ("forces_weight", forces_weight), ("weight_decay", weight_decay)
        ):  # fmt: skip
            checks.number(name, number, at_least=0)
        checks.seed(seed)
        if checkpoint is None and (backbone is None or heads is None):
            raise ValueError(
                f"checkpoint={checkpoint!r}, backbone={backbone!r} and heads={heads!r} do not define a model: pass "
                "checkpoint=, or backbone= and heads= of a new one."
            )
        self.optimizer, self.scheduler = optimizer, scheduler
        self.check_optimizer()
        self.model: Any = None
        if checkpoint is not None:
            self.load_potential(checkpoint)
            self.warn_unused(ARCHITECTURE)
        elif task_name is None:
            raise ValueError(
                f"task_name={task_name!r}: a new model needs a name for its data set. Pass task_name=, for instance 'omol'."
            )
        else:
            assert backbone is not None and heads is not None
            check_new(backbone, heads)
        self.metrics = nn.ModuleDict({name: MeanAbsoluteError() for name in TRAINED})

    @property
    def tasks(self) -> list[Task]:
        """Tasks for energy and forces of the data set that is trained on."""
        assert self.model is not None
        return [task for task in self.model.tasks if task.property in TRAINED and self.model.dataset in task.datasets]

    def load_potential(self, path: str | Path) -> None:
        """Load weights and tasks from a fairchem inference checkpoint."""
        self.model = load_fairchem(path, task_name=self.options.task_name, **self._model_arguments())

    def save_potential(self, path: Path) -> None:
        """Write a fairchem inference checkpoint."""
        assert self.model is not None
        with self.unfrozen():
            save_fairchem(self.model, path)

    def shift_energies(self, per_atom_eV: float) -> None:
        """Add a constant in eV to the reference energy of every element, which changes no force."""
        assert self.model is not None
        self.model.shift_energies(per_atom_eV)

    def isolated_atoms(self) -> dict[int, float]:
        assert self.model is not None
        return dict(enumerate(self.model.element_references().tolist()))

    def shift_isolated_atoms(self, shifts: Mapping[int, float]) -> None:
        assert self.model is not None
        self.model.shift_energies(shifts)

    def stable_potential(self, system: System) -> FairchemPotential:
        """Return the potential that simulates ``system``."""
        assert self.model is not None
        potential: FairchemPotential = self.model.stable_potential(system)
        return potential

    def build(self, frames: Sequence[Atoms]) -> None:
        self.model = new_fairchem(
            self.options.backbone,
            self.options.heads,
            frames,
            task_name=self.options.task_name,
            energy_weight=self.options.energy_weight,
            forces_weight=self.options.forces_weight,
            seed=self.options.seed,
            isolated_energies=self._new_references(frames),
            **self._model_arguments(),
        )

    def dataloader(self, frames: Sequence[Atoms], batch_size: int, shuffle: bool) -> Any:
        """Return a dataloader over fairchem graphs.

        Args:
            frames: Labeled structures.
            batch_size: Structures per batch.
            shuffle: Whether to draw them in random order.
        """
        return torch.utils.data.DataLoader(
            [self._graph(frame) for frame in frames],  # type: ignore[arg-type]  # a list serves as a dataset
            batch_size=batch_size,
            shuffle=shuffle,
            collate_fn=mt_collater_adapter(self.tasks),
        )

    def forward(self, batch: Any) -> Any:
        """Return the predictions of the network for one of fairchem's batches."""
        return self.model(batch)

    def training_loss(self, batch: Any) -> Tensor:
        return torch.stack(list(compute_loss(self.tasks, self(batch), batch).values())).sum()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.training_loss(batch)
        self.log("train/loss", loss, batch_size=batch.num_graphs, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        # Forces are a gradient, which Lightning's inference mode forbids; tensors made in it must be copied first.
        with torch.inference_mode(False), torch.enable_grad():
            batch = batch.clone()
            output = self(batch)
        losses = compute_loss(self.tasks, output, batch)
        loss = torch.stack(list(losses.values())).sum().detach()
        for task in self.tasks:
            metric: Any = self.metrics[task.property]
            predicted = task.normalizer.denorm(output[task.name][task.property].detach())
            if task.element_references is not None:
                predicted = task.element_references.undo_refs(batch, predicted)
            per = batch.natoms if task.property == "energy" else 1
            metric.update((predicted / per).reshape(-1), (batch[task.name] / per).reshape(-1))
            self.log(f"valid/{task.property}_mae", metric, batch_size=batch.num_graphs)
        self.log("valid/loss", loss, batch_size=batch.num_graphs, prog_bar=True)

    def default_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=self.options.lr, weight_decay=self.options.weight_decay)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert self.model is not None
        checkpoint["fairchem"] = {
            "model_config": as_container(self.model.model_config),
            "tasks_config": [as_container(config) for config in self.model.tasks_config],
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.model is None:
            self.model = FairchemModel.from_configs(
                **checkpoint["fairchem"], task_name=self.options.task_name, **self._model_arguments()
            )
        else:
            self.model.set_tasks(checkpoint["fairchem"]["tasks_config"])

    def _new_references(self, frames: Sequence[Atoms]) -> dict[int, float] | None:
        """Return the isolated-atom energies of a new model; None if they are to be fitted."""
        mode: Any = self.options.E0s
        if mode == "model":
            raise ValueError("E0s='model' is for an existing model: pass checkpoint=, or another value of E0s.")
        numbers = {int(number) for frame in frames for number in frame.numbers}
        if mode == "average" or (mode is None and not numbers <= set(self.isolated_energies)):
            return None
        return require_elements(
            mode if isinstance(mode, Mapping) else self.isolated_energies,
            frames,
            "add their energies in eV or frames of isolated atoms, or use 'average'.",
        )

    def _model_arguments(self) -> dict[str, Any]:
        return {name: self.options[name] for name in ("conservative", "charge", "spin")}

    def _graph(self, frame: Atoms) -> AtomicData:
        assert self.model is not None
        frame = self.model.with_charge_and_spin(frame)
        frame.calc = SinglePointCalculator(
            frame, energy=frame.info.pop(ENERGY_KEY), forces=frame.arrays.pop(FORCES_KEY)
        )
        graph = AtomicData.from_ase(frame, r_data_keys=["charge", "spin"], task_name=self.model.dataset)
        graph.dataset = graph.dataset_name = self.model.dataset
        for task in self.tasks:
            graph[task.name] = graph[task.property]
        return graph
