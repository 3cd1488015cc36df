"""fairchem's inference checkpoints, which ``FAIRChemCalculator`` and ``load_predict_unit`` open: load and save."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from torch import nn

from stable_plugin.md.labels import ENERGY_KEY, FORCES_KEY
from stable_plugin.md.system import System
from stable_plugin.models.base import default_dtype, save_new
from stable_plugin.models.fairchem.potential import FairchemPotential, energy_task, resolve_charge_and_spin
from stable_plugin.runtime import checks

# After stable_plugin.models.fairchem.potential, whose error says what to install if fairchem is missing.
import hydra  # isort: skip
from omegaconf import OmegaConf  # isort: skip
from fairchem.core.calculate.pretrained_mlip import (  # isort: skip
    available_models,
    pretrained_checkpoint_path_from_name,
)
from fairchem.core.common.registry import registry  # isort: skip
from fairchem.core.units.mlip_unit.api.inference import MLIPInferenceCheckpoint  # isort: skip
from fairchem.core.units.mlip_unit.mlip_unit import Task  # isort: skip
from fairchem.core.units.mlip_unit.utils import load_inference_model  # isort: skip

CORE = "fairchem.core"

MAX_SETTING = 100_000
"""A larger number in the configuration of a network is a typing error that would take all memory before it failed."""


class FairchemModel(nn.Module):
    """A fairchem model with the configuration in its checkpoint.

    Args:
        network: A ``HydraModel``.
        model_config: Configuration that fairchem builds the network from.
        tasks_config: Configurations of its tasks.
        task_name: Name of the data set whose energies are used; optional if the model knows only one.
        conservative: See :class:`~stable_plugin.models.fairchem.potential.FairchemPotential`.
        charge: Total charge of structures that state none, in units of e.
        spin: Spin multiplicity of structures that state none.

    Raises:
        ValueError: If the model lacks the task.
    """

    def __init__(
        self,
        network: Any,
        model_config: Mapping[str, Any],
        tasks_config: Sequence[Any],
        task_name: str | None = None,
        conservative: bool = False,
        charge: int | None = None,
        spin: int | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.model_config = model_config
        self.set_tasks(tasks_config)
        self.dataset = task_name or energy_task(self.tasks).datasets[0]
        energy_task(self.tasks, self.dataset)
        self.conservative, self.charge, self.spin = conservative, charge, spin

    @classmethod
    def from_configs(
        cls, model_config: Mapping[str, Any], tasks_config: Sequence[Any], seed: int = 0, **arguments: Any
    ) -> FairchemModel:
        """Return a model with random weights.

        Args:
            model_config: As for the class.
            tasks_config: As for the class.
            seed: Seed of the weights.
            arguments: Further arguments of the class.

        Raises:
            ValueError: If a configuration names anything other than parts of fairchem and tensors. Configurations may come
                from a file, and fairchem calls whatever they name.
        """
        _check_names(model_config, "model_config")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = hydra.utils.instantiate(copy.deepcopy(model_config))
        return cls(network, model_config, tasks_config, **arguments)

    def set_tasks(self, tasks_config: Sequence[Any]) -> None:
        """Replace the tasks, with their scales and element references.

        Args:
            tasks_config: As for the class.

        Raises:
            ValueError: If one names anything other than parts of fairchem and tensors.
        """
        for index, config in enumerate(tasks_config):
            _check_names(config, f"tasks_config[{index}]")
        self.tasks_config = list(tasks_config)
        self.tasks: list[Task] = [hydra.utils.instantiate(config) for config in self.tasks_config]

    def extra_repr(self) -> str:
        """Return the arguments for ``repr``."""
        return f"task_name={self.dataset!r}, conservative={self.conservative}, charge={self.charge}, spin={self.spin}"

    def forward(self, data: Any) -> Any:
        """Return the output of the network."""
        return self.network(data)

    def element_references(self) -> torch.Tensor:
        """Return the isolated-atom energies in eV, by atomic number.

        Raises:
            ValueError: If the energy task has no element references.
        """
        task = energy_task(self.tasks, self.dataset)
        if task.element_references is None:
            raise ValueError(
                f"the energy task of {self.dataset!r} has no element references: use a model trained with them, or "
                "E0s='model'."
            )
        references: torch.Tensor = task.element_references.element_references
        return references

    def shift_energies(self, shifts: float | Mapping[int, float]) -> None:
        """Add constants to the isolated-atom energies, which changes no force.

        Args:
            shifts: Constant in eV for all elements, or by atomic number.

        Raises:
            ValueError: If the energy task has no element references.
        """
        task, references = energy_task(self.tasks, self.dataset), self.element_references()
        if isinstance(shifts, Mapping):
            for number, shift in shifts.items():
                references[number] += shift
        else:
            references += shifts
        index = self.tasks.index(task)
        config = as_container(self.tasks_config[index])
        config["element_references"] = _element_references(references.tolist())
        self.tasks_config[index] = config

    def stable_potential(self, system: System) -> FairchemPotential:
        """Return the potential that simulates ``system``."""
        system = system.with_electrons(self.charge, self.spin)
        return FairchemPotential(self.network, system, self.tasks, self.dataset, self.conservative)

    def with_charge_and_spin(self, frame: Atoms) -> Atoms:
        """Return a copy of a structure that states charge and spin.

        Args:
            frame: An ASE structure.

        Raises:
            ValueError: If neither the structure nor the model states one, and the data set uses them.
        """
        copied: Atoms = frame.copy()
        charge = frame.info.get("charge", self.charge)
        copied.info["charge"], copied.info["spin"] = resolve_charge_and_spin(
            charge, frame.info.get("spin", self.spin), self.dataset
        )
        return copied


def load_fairchem(
    source: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32, **arguments: Any
) -> FairchemModel:
    """Load a fairchem inference checkpoint with its averaged weights, which calculators use.

    Such a file is a pickle: loading one runs code that it contains. Load files you trust.

    Args:
        source: Path of a checkpoint, or the name of a pretrained model such as ``uma-s-1p1``, downloaded by fairchem.
        device: Device of the loaded model.
        dtype: Precision of the loaded model; fairchem trains in single precision.
        arguments: Further arguments of :class:`FairchemModel`.

    Returns:
        The model.

    Raises:
        FileNotFoundError: If the source is neither a file nor a name that fairchem knows and can download.
        ValueError: If the file is not a fairchem inference checkpoint.
    """
    path = _find_checkpoint(source)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # unpickling runs code of the file, which can raise anything
        raise ValueError(
            f"{path} cannot be read as a fairchem checkpoint ({type(error).__name__}: {error}): pass the inference_ckpt.pt "
            "that fairchem training writes."
        ) from error
    if not isinstance(checkpoint, MLIPInferenceCheckpoint):
        raise ValueError(
            f"{path} contains a {type(checkpoint).__name__}, not a fairchem inference checkpoint: pass the inference_ckpt.pt "
            "that fairchem training writes."
        )
    # Buffers and scales that are not in the checkpoint are created in the default dtype.
    with default_dtype(dtype):
        averaged, checkpoint = load_inference_model(str(path), use_ema=True, preloaded_checkpoint=checkpoint)
        model = FairchemModel(averaged.module, checkpoint.model_config, checkpoint.tasks_config, **arguments)
    return model.to(device, dtype)


def save_fairchem(model: FairchemModel, path: str | Path) -> None:
    """Write an inference checkpoint that fairchem can load.

    The file appears complete or not at all.

    Args:
        model: The model.
        path: A path that does not exist yet.

    Raises:
        FileExistsError: If there is a file already.
    """
    weights = {name: tensor.detach().cpu() for name, tensor in model.network.state_dict().items()}
    averaged = {"n_averaged": torch.tensor(1), **{f"module.{name}": tensor for name, tensor in weights.items()}}
    save_new(MLIPInferenceCheckpoint(model.model_config, weights, averaged, model.tasks_config), path)


def new_fairchem(
    backbone: Mapping[str, Any],
    heads: Mapping[str, Any],
    frames: Sequence[Atoms],
    *,
    task_name: str,
    energy_weight: float,
    forces_weight: float,
    seed: int = 0,
    isolated_energies: Mapping[int, float] | None = None,
    **arguments: Any,
) -> FairchemModel:
    """Return an untrained model, with element references and a scale fitted to labeled structures.

    Args:
        backbone: Configuration of the backbone; ``model`` is its name in fairchem.
        heads: Configurations of the heads; ``module`` is the name in fairchem.
        frames: Labeled structures.
        task_name: Name of the data set that the frames belong to.
        energy_weight: Weight of the energy loss per atom.
        forces_weight: Weight of the force loss.
        seed: Seed of the weights.
        isolated_energies: Element references in eV by atomic number; fitted to the structures if None.
        arguments: Further arguments of :class:`FairchemModel`.
    """
    config = {
        "_target_": f"{CORE}.models.base.HydraModel",
        "backbone": dict(backbone),
        "heads": {name: dict(head) for name, head in heads.items()},
        "pass_through_head_outputs": True,
    }
    tasks = _tasks(frames, task_name, energy_weight, forces_weight, isolated_energies)
    return FairchemModel.from_configs(config, tasks, seed, task_name=task_name, **arguments)


def _find_checkpoint(source: str | Path) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    if str(source) not in available_models:
        raise FileNotFoundError(
            f"checkpoint={str(source)!r} is neither a file nor a model that fairchem can download: pass the path of an "
            f"inference checkpoint, or one of {', '.join(available_models)}."
        )
    try:
        return Path(pretrained_checkpoint_path_from_name(str(source)))
    except Exception as error:  # a download can fail with any error of the hub's client
        raise FileNotFoundError(
            f"fairchem could not download checkpoint={str(source)!r} ({type(error).__name__}: {error}). Check the network "
            "and your access to the model, or pass the path of a downloaded file."
        ) from error


def _check_names(config: Any, path: str) -> None:
    """Raise unless hydra and fairchem will only call parts of a model."""
    config = as_container(config) if OmegaConf.is_config(config) else config
    if isinstance(config, Mapping):
        name = config.get("_target_")
        tensor = str(name).startswith("torch.") and str(name).endswith("ensor") and str(name).count(".") == 1
        if name is not None and not (str(name).startswith("fairchem.core.") or tensor):
            raise ValueError(
                f"{path}._target_={name!r} is not a part of fairchem and is not called: use a class of fairchem.core."
            )
        for key in ("model", "module", "head_cls"):
            if isinstance(config.get(key), str):
                _network_class(f"{path}.{key}", config[key])
        for key, value in config.items():
            _check_names(value, f"{path}.{key}")
    elif isinstance(config, list):
        for index, entry in enumerate(config):
            _check_names(entry, f"{path}[{index}]")


def check_new(backbone: Mapping[str, Any], heads: Mapping[str, Any]) -> None:
    """Check configurations of a new model, because fairchem calls whatever they name.

    Args:
        backbone: As for :func:`new_fairchem`.
        heads: As for :func:`new_fairchem`.

    Raises:
        ValueError: If a name is not that of a network, an argument is not one of the network's, or a number is out of range.
    """
    parts = {"backbone": (backbone, "model"), **{f"heads.{name}": (head, "module") for name, head in heads.items()}}
    if not heads:
        raise ValueError(f"heads={heads!r} is empty: add at least one head, with a module= that predicts energies.")
    for part, (config, key) in parts.items():
        if not isinstance(config, Mapping) or key not in config:
            raise ValueError(f"{part}={config!r} has no {key}: set {key}= to the name of a class of fairchem.")
        kind = _network_class(f"{part}.{key}", config[key])
        parameters = inspect.signature(kind).parameters
        open_ended = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
        for name, value in config.items():
            if name != key and name not in parameters and not open_ended:
                raise ValueError(
                    f"{part}.{name}={value!r} is not an argument of {config[key]}: use one of {', '.join(parameters)}."
                )
            if isinstance(value, int | float) and not isinstance(value, bool):
                checks.number(f"{part}.{name}", value, at_least=-MAX_SETTING, at_most=MAX_SETTING)


def _network_class(name: str, value: Any) -> type:
    try:
        # As fairchem looks it up: by a registered short name or a full one.
        found = registry.get_model_class(value)
    except Exception as error:  # importing runs a module, which can raise anything
        raise ValueError(f"{name}={value!r} is not found ({error}): use the name of a class of fairchem.") from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(
            f"{name}={value!r} is not a network: use the name of a class of fairchem, or of a torch module."
        )
    return found


def _tasks(
    frames: Sequence[Atoms],
    dataset: str,
    energy_weight: float,
    forces_weight: float,
    isolated_energies: Mapping[int, float] | None,
) -> list[dict[str, Any]]:
    """Return tasks for energy and forces, with element references, fitted if not given, and the RMS force as the scale."""
    n_elements = 1 + max(int(frame.numbers.max()) for frame in frames)
    counts = np.array([np.bincount(frame.numbers, minlength=n_elements) for frame in frames], dtype=float)
    energies = np.array([frame.info[ENERGY_KEY] for frame in frames])
    if isolated_energies is None:
        references = np.linalg.lstsq(counts, energies, rcond=None)[0]
    else:
        references = np.array([isolated_energies.get(number, 0.0) for number in range(n_elements)])
    scale = float(np.sqrt(np.mean(np.concatenate([frame.arrays[FORCES_KEY] for frame in frames]) ** 2)))
    return [
        {
            **_task("energy", "system", [1], dataset, scale, "PerAtomMAELoss", "mean", energy_weight),
            "element_references": _element_references(references.tolist()),
        },
        _task("forces", "atom", [3], dataset, scale, "L2NormLoss", "mean", forces_weight),
    ]


def _element_references(energies: list[float]) -> dict[str, Any]:
    return {
        "_target_": f"{CORE}.modules.normalization.element_references.ElementReferences",
        "element_references": {"_target_": "torch.DoubleTensor", "_args_": [energies]},
    }


def as_container(config: Any) -> dict[str, Any]:
    """Return a copy of a configuration as dictionaries and lists, without the types of OmegaConf."""
    container: Any = OmegaConf.to_container(config) if OmegaConf.is_config(config) else copy.deepcopy(config)
    return dict(container)


def _task(
    name: str, level: str, dim: list[int], dataset: str, scale: float, loss: str, reduction: str, weight: float
) -> dict[str, Any]:
    return {
        "_target_": f"{CORE}.units.mlip_unit.mlip_unit.Task",
        "name": name,
        "level": level,
        "property": name,
        "out_spec": {"_target_": f"{CORE}.units.mlip_unit.mlip_unit.OutputSpec", "dim": dim, "dtype": "float32"},
        "normalizer": {
            "_target_": f"{CORE}.modules.normalization.normalizer.Normalizer",
            "mean": 0.0,
            "rmsd": scale,
        },
        "datasets": [dataset],
        "loss_fn": {
            "_target_": f"{CORE}.modules.loss.DDPMTLoss",
            "loss_fn": {"_target_": f"{CORE}.modules.loss.{loss}"},
            "reduction": reduction,
            "coefficient": weight,
        },
        "metrics": ["mae"],
    }
