"""Fine-tuning of a potential of any family as a LightningModule, with the family's own potential in the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols
from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError

from stable_plugin.md.cells import optional, stack_cells
from stable_plugin.md.compositions import group_by_system
from stable_plugin.md.labels import ENERGY_KEY, FORCES_KEY, STRESS_KEY
from stable_plugin.md.strain import strained, symmetric
from stable_plugin.md.system import System, stack_positions
from stable_plugin.models.base import Potential, save_new
from stable_plugin.models.isolated_atoms import E0s, check_mode
from stable_plugin.models.lightning_module import PotentialModule
from stable_plugin.models.pair_correction import PairCorrected
from stable_plugin.models.registry import PotentialMaker, family_of, find_potential, load_potential
from stable_plugin.runtime import checks

FAR_APART = 1000.0
"""Distance in Å of atoms that do not interact."""


class FineTuningModule(PotentialModule):
    r"""A LightningModule that fine-tunes a potential of any family on energies, forces and stresses.

    The loss is that of frames :math:`i` with :math:`N_i` atoms,

    .. math:: L = w_E \langle (\Delta E_i / N_i)^2 \rangle_i + w_F \langle \Delta F_{ia}^2 \rangle_{ia}
        + w_S \langle \Delta \sigma_i^2 \rangle_i,

    with energies of the potential that simulations use and forces as their gradient. Frames of a batch may differ in
    composition, cell, charge, spin and head; those of one system are computed together. MACE and fairchem have modules with
    their own losses: :class:`~stable_plugin.models.mace.MACEModule`,
    :class:`~stable_plugin.models.fairchem.FairchemModule`.

    Args:
        model: A model, the path of its file, or the name of a pretrained one.
        family: Name of the family, for a file that is not recognized.
        arguments: Further arguments of the family's loader, such as ``modal`` for SevenNet.
        potential: What makes the potential of a model of no known family: a function of module and system, or its full
            name, see :func:`~stable_plugin.models.potential_maker`.
        E0s: Energies of isolated atoms: in eV by atomic number; ``isolated``, those of the isolated atoms in the data;
            ``average``, fitted to the training frames; or ``model``, those of the model. If None, the model keeps its own,
            unless the labels are evidently those of another code, and then they are fitted, with a warning.
        energy_weight: Weight of the energies.
        forces_weight: Weight of the forces.
        stress_weight: Weight of the stresses, of the frames that have them.
        lr: Learning rate of the default optimizer, AdamW.
        weight_decay: Weight decay of that optimizer.
        optimizer: Maps parameters to an optimizer; replaces the default.
        scheduler: Maps the optimizer to a learning-rate scheduler, stepped once an epoch.
        trainable: Names of the parameters to train, as patterns like ``"readouts.*"``; the others are frozen. All are trained if None.
        lora_rank: Rank of the changes of weight matrices, a few for a pretrained model (LoRA); other weights are frozen then. Weights
            change as a whole if None.

    Raises:
        TypeError: If the model is not a torch module.
        ValueError: If an argument is out of range or does not apply, or the model has no weights to train.

    Example:
        >>> import torch
        >>> from stable_plugin.models import FineTuningModule, ModulePotential
        >>> class Spring(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.k = torch.nn.Parameter(torch.tensor(2.0))
        ...     def forward(self, positions):
        ...         return 0.5 * self.k * (positions[:, 0] - positions[:, 1]).square().sum(-1)
        >>> FineTuningModule(Spring(), potential=ModulePotential, lr=0.01).potential_suffix
        '.pt'
    """

    model_argument = "model"

    def __init__(
        self,
        model: nn.Module | str | Path,
        family: str | None = None,
        arguments: Mapping[str, Any] | None = None,
        potential: str | PotentialMaker | None = None,
        E0s: E0s = None,
        energy_weight: float = 1.0,
        forces_weight: float = 100.0,
        stress_weight: float = 0.0,
        lr: float = 1e-4,
        weight_decay: float = 0.0,
        optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
        scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
        trainable: str | Sequence[str] | None = None,
        lora_rank: int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["model", "family", "arguments", "potential", "optimizer", "scheduler"])
        check_mode(E0s)
        checks.number("lr", lr, above=0)
        for name, number in (
            ("energy_weight", energy_weight), ("forces_weight", forces_weight), ("stress_weight", stress_weight),
            ("weight_decay", weight_decay),
        ):  # fmt: skip
            checks.number(name, number, at_least=0)
        self.optimizer, self.scheduler = optimizer, scheduler
        self.check_optimizer()
        self._source = {"family": family, **(arguments or {})}
        self._potential = potential
        self.model = self._checked(model)
        # A file of the family would not hold a correction.
        self._family = None if isinstance(self.model, PairCorrected) else family_of(self.model)
        suffix = None if self._family is None else self._family.file_suffix(self.model)
        self._is_family_file = suffix is not None
        self.potential_suffix = suffix or ".pt"
        self._numbers: list[int] = []
        self.metrics = nn.ModuleDict(
            {
                stage: nn.ModuleDict({name: MeanAbsoluteError() for name in ("energy", "forces", "stress")})
                for stage in ("valid", "test")
            }
        )

    def load_potential(self, path: str | Path) -> None:
        """Replace the model by that of a file, or its weights if the family writes no files."""
        if self._is_family_file:
            self.model = load_potential(path, **self._source)
        else:
            self.model.load_state_dict(torch.load(path, weights_only=True))

    def save_potential(self, path: Path) -> None:
        """Write a file of the family, or the weights (``state_dict``) of the model if it writes none."""
        if self._is_family_file:
            assert self._family is not None
            with self.unfrozen():
                self._family.save(self.model, path)
        else:
            save_new({name: tensor.detach().cpu() for name, tensor in self.model.state_dict().items()}, path)

    def stable_potential(self, system: System) -> Potential:
        """Return the potential that simulates ``system``."""
        return find_potential(self.model, system, self._potential)

    def prepare(self, frames: Sequence[Atoms], isolated_energies: Mapping[int, float] | None = None) -> None:
        self._numbers = sorted({int(number) for frame in frames for number in frame.numbers})
        super().prepare([_supercell(frame) for frame in frames], isolated_energies)

    def shift_energies(self, per_atom_eV: float) -> None:
        """Add a constant in eV to the energy of every atom, which changes no force, where the model keeps one."""
        self._of_lone_atoms(self._numbers).shift_energies(per_atom_eV)

    def isolated_atoms(self) -> dict[int, float]:
        return {number: self._of_lone_atoms([number]).constant_energy / 2.0 for number in self._numbers}

    def shift_isolated_atoms(self, shifts: Mapping[int, float]) -> None:
        if self._of_lone_atoms(list(shifts)).shift_isolated_atoms(shifts):
            return
        named = ", ".join(f"{chemical_symbols[number]} {shift:+.3f}" for number, shift in shifts.items())
        raise ValueError(
            f"E0s={self.options.E0s!r}: the labels differ from the model by isolated atoms of {named} eV, and "
            f"{type(self.model).__name__} keeps no such energies: subtract them from the labels, or pass E0s='model' to "
            "train on the labels as they are."
        )

    def build(self, frames: Sequence[Atoms]) -> None:
        raise NotImplementedError(f"{type(self).__name__} fine-tunes an existing model: pass model=.")

    def dataloader(self, frames: Sequence[Atoms], batch_size: int, shuffle: bool) -> Any:
        """Return a dataloader over lists of structures.

        Args:
            frames: Labeled structures.
            batch_size: Structures per batch.
            shuffle: Whether to draw them in random order.
        """
        structures: Any = [_supercell(frame) for frame in frames]
        return torch.utils.data.DataLoader(structures, batch_size=batch_size, shuffle=shuffle, collate_fn=list)

    def training_loss(self, batch: Sequence[Atoms]) -> Tensor:
        return self._loss(*self._errors(batch, create_graph=True))

    def training_step(self, batch: Sequence[Atoms], batch_idx: int) -> Tensor:
        loss = self.training_loss(batch)
        self.log("train/loss", loss, batch_size=len(batch), prog_bar=True)
        return loss

    def validation_step(self, batch: Sequence[Atoms], batch_idx: int) -> None:
        self._evaluate(batch, "valid")

    def test_step(self, batch: Sequence[Atoms], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.refuse_mixed_precision("forces that are gradients: use precision='32-true' or '64-true'.")

    def default_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=self.options.lr, weight_decay=self.options.weight_decay)

    def _checked(self, model: nn.Module | str | Path) -> nn.Module:
        """Return the model, loaded if it is a file or a name."""
        if isinstance(model, str | Path):
            model = load_potential(model, **self._source)
        elif given := {name: value for name, value in self._source.items() if value is not None}:
            raise ValueError(
                f"{', '.join(f'{name}={value!r}' for name, value in given.items())}: for a file, but a model was passed "
                "(model=): remove them."
            )
        if not isinstance(model, nn.Module):
            raise TypeError(f"model={model!r} is not a torch module: pass a model, the path of its file, or a name.")
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(
                f"model={type(model).__name__} has no weights that require a gradient: set requires_grad_(True) on those to "
                "train."
            )
        return model

    def _of_lone_atoms(self, numbers: Sequence[int]) -> Potential:
        """Return the potential of two atoms of each element, too far apart to interact."""
        pairs = [number for number in numbers for _ in range(2)]
        positions = FAR_APART * np.arange(len(pairs))[:, None] * [1.0, 0.0, 0.0]
        # Periodic, as some models are of crystals only.
        cell = FAR_APART * np.array([len(pairs), 1.0, 1.0])
        return self.stable_potential(System.from_atoms(Atoms(pairs, positions, cell=cell, pbc=True), bonds=[]))

    def _errors(self, frames: Sequence[Atoms], create_graph: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return the errors of energies per atom in eV, of forces in eV/Å, and of stresses in eV/Å³, each in one dimension."""
        groups = [self._errors_of_system(group, create_graph) for group in group_by_system(frames)]
        energies, forces, stresses = (
            torch.cat([each.flatten() for each in kind]) for kind in zip(*groups, strict=True)
        )
        return energies, forces, stresses

    def _errors_of_system(self, frames: Sequence[Atoms], create_graph: bool) -> tuple[Tensor, Tensor, Tensor]:
        potential = self.stable_potential(System.from_atoms(frames[0], bonds=[]))
        positions = stack_positions(frames, potential.system, "frames").to(potential.device, potential.dtype)
        cell = stack_cells(frames, potential.system)
        cell = None if cell is None else cell.to(positions)
        labeled = [
            index for index, frame in enumerate(frames) if STRESS_KEY in frame.info and self.options.stress_weight
        ]
        edges = potential.edges_to_strain(positions, cell) if labeled else potential.edges(positions, *optional(cell))
        positions.requires_grad_(True)
        strain, at, edges = strained(positions, edges) if labeled else (None, positions, edges)
        energies = potential.energies(at, edges)
        inputs = [positions] if strain is None else [positions, strain]
        gradient, *by_strain = torch.autograd.grad(energies.sum(), inputs, create_graph=create_graph)
        labels = torch.tensor([frame.info[ENERGY_KEY] for frame in frames], dtype=torch.float64)
        interaction = (labels - potential.constant_energy).to(energies)
        forces = torch.tensor(np.stack([frame.arrays[FORCES_KEY] for frame in frames])).to(gradient)
        stresses = positions.new_empty(0)
        if by_strain:
            volume = potential.system.volume(cell).to(gradient).reshape(-1, 1, 1)
            known = torch.tensor(np.stack([frames[index].info[STRESS_KEY] for index in labeled])).to(gradient)
            stresses = (symmetric(by_strain[0]) / volume)[labeled] - known
        return (energies - interaction) / len(frames[0]), -gradient - forces, stresses

    def _loss(self, energies: Tensor, forces: Tensor, stresses: Tensor) -> Tensor:
        parts = [
            (self.options.energy_weight, energies),
            (self.options.forces_weight, forces),
            (self.options.stress_weight, stresses),
        ]
        return torch.stack([w * e.square().mean().double() for w, e in parts if e.numel()]).sum()

    def _evaluate(self, batch: Sequence[Atoms], stage: str) -> None:
        # Forces are a gradient, which Lightning's inference mode forbids.
        with torch.inference_mode(False), torch.enable_grad():
            energies, forces, stresses = (errors.detach() for errors in self._errors(batch, create_graph=False))
        metrics: Any = self.metrics[stage]
        for name, errors in (("energy", energies), ("forces", forces), ("stress", stresses)):
            if errors.numel():
                metrics[name].update(errors, torch.zeros_like(errors))
                self.log(f"{stage}/{name}_mae", metrics[name], batch_size=len(batch))
        self.log(f"{stage}/loss", self._loss(energies, forces, stresses), batch_size=len(batch), prog_bar=True)


def _supercell(frame: Atoms) -> Atoms:
    """Return a frame, doubled if it is a cell of one atom, which is no system of its own."""
    if len(frame) > 1 or not frame.pbc.any():
        return frame
    doubled: Atoms = frame.repeat([2 if axis == int(np.argmax(frame.pbc)) else 1 for axis in range(3)])
    for key in (ENERGY_KEY, "charge"):
        if key in frame.info:
            doubled.info[key] = 2 * frame.info[key]
    return doubled
