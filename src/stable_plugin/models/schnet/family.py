"""SchNetPack as a family of models."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ase import Atoms
from torch import Tensor, nn

from stable_plugin.md.system import System
from stable_plugin.models.averages import WeightAverage
from stable_plugin.models.base import Potential
from stable_plugin.models.family import ModelFamily
from stable_plugin.runtime.atomic_files import atomic_write


class SchNetFamily(ModelFamily):
    """SchNetPack: SchNet, PaiNN and other representations in a ``NeuralNetworkPotential``; its model files."""

    name = "schnet"
    title = "SchNetPack"
    packages = ("schnetpack",)
    loader_arguments = ("device", "energy_unit", "length_unit")

    def is_model(self, module: nn.Module) -> bool:
        return _is_task(module) or hasattr(module, "representation")

    def make_potential(self, module: nn.Module, system: System) -> Potential:
        from stable_plugin.models.schnet.potential import SchNetPotential

        if not _is_task(module):
            raise ValueError(
                f"{type(module).__name__} does not say in which unit its energies are: wrap it in "
                "stable_plugin.models.schnet.SchNetModel(model, energy_unit=...)."
            )
        network: nn.Module = module.get_submodule("model")
        return SchNetPotential(network, system, *_units(module))

    def load(self, source: str | Path, **arguments: Any) -> nn.Module:
        from stable_plugin.models.schnet.files import load_schnet

        return load_schnet(source, **arguments)

    def structures(self, module: nn.Module, items: Sequence[Any]) -> list[Atoms] | None:
        if not all(isinstance(item, dict) and {"_positions", "_atomic_numbers"} <= item.keys() for item in items):
            return None
        from schnetpack.units import convert_units

        factor = convert_units(_units(module)[1], "Ang")
        return [_structure(item, factor) for item in items]

    def average(self, holder: Any) -> WeightAverage | None:
        """Return the average of SchNetPack's callback ``ExponentialMovingAverage``."""
        if type(holder).__module__.partition(".")[0] not in self.packages or not hasattr(holder, "ema"):
            return None
        return WeightAverage(type(holder).__name__, lambda: _copies(holder.ema))

    def export_again(self, callback: Any, module: Any, suffix: str) -> str | None:
        """Replace ``best_model`` of SchNetPack's callback ``ModelCheckpoint``, which ``spkdeploy`` and calculators read."""
        path = getattr(callback, "model_path", None)
        if type(callback).__module__.partition(".")[0] not in self.packages or path is None or not Path(path).is_file():
            return None
        os.replace(path, f"{path}{suffix}")
        with atomic_write(path, "model") as partial:
            module.save_model(str(partial), do_postprocessing=True)
        return str(path)


FAMILY = SchNetFamily()


def _is_task(module: Any) -> bool:
    """Return whether a module is an ``AtomisticTask``."""
    return hasattr(module, "outputs") and hasattr(getattr(module, "model", None), "representation")


def _units(task: Any) -> tuple[str, str]:
    """Return the units of energy and length of the data that a task is trained on.

    Args:
        task: An ``AtomisticTask``.

    Raises:
        ValueError: If the trainer has no SchNetPack data module.
    """
    # Lightning's property raises where there is no trainer.
    trainer = getattr(task, "_trainer", None)
    dataset: Any = getattr(getattr(trainer, "datamodule", None), "train_dataset", None)
    if dataset is None:
        raise ValueError(
            f"{type(task).__name__} is not trained on an AtomsDataModule, which says in which units energies and lengths are: "
            "pass potential=, a function that returns a SchNetPotential with energy_unit=."
        )
    from stable_plugin.models.schnet.potential import energy_key

    return dataset.units[energy_key(task.model)], dataset.distance_unit


def _structure(item: dict[str, Tensor], factor: float) -> Atoms:
    pbc = item["_pbc"].reshape(-1).tolist() if "_pbc" in item else False
    return Atoms(
        numbers=item["_atomic_numbers"].cpu().numpy(),
        positions=factor * item["_positions"].detach().double().cpu().numpy(),
        cell=factor * item["_cell"].reshape(3, 3).double().cpu().numpy() if "_cell" in item else None,
        pbc=pbc,
    )


def _copies(average: Any) -> list[tuple[Tensor, ...]]:
    """Return weights, averages, and the weights that are put aside while the averages are in their place."""
    # There is none before training begins.
    if average is None:
        return []
    kept = [average._get_parameters(None), average.shadow_params]
    if average.collected_params is not None:
        kept.append(average.collected_params)
    return list(zip(*kept, strict=True))
