"""fairchem's inference checkpoints: what ``FAIRChemCalculator`` and ``load_predict_unit`` open."""

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

from stable_plugin.md.frames import ENERGY_KEY, FORCES_KEY
from stable_plugin.md.system import System
from stable_plugin.models.base import default_dtype, save_new
from stable_plugin.models.fairchem.potential import FairchemPotential, charge_and_spin, energy_task
from stable_plugin.runtime import checks

# After stable_plugin.models.fairchem.potential, whose error says what to install when fairchem is missing.
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

LARGEST_SETTING = 100_000
"""A network with more of anything is a slip of the pen, which would take all memory before it failed."""


class FairchemModel(nn.Module):
    """A fairchem model with what its checkpoint says of it.

    Args:
        network: A ``HydraModel``.
        model_config: The configuration that fairchem builds it from.
        tasks_config: The configurations of its tasks.
        task_name: Name of the data set whose energies are meant; may be left out if the model knows only one.
        conservative: See :class:`~stable_plugin.models.fairchem.potential.FairchemPotential`.
        charge: Total charge of structures that do not say.
        spin: Spin multiplicity of structures that do not say.

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
        self.take_tasks(tasks_config)
        self.dataset = task_name or energy_task(self.tasks).datasets[0]
        energy_task(self.tasks, self.dataset)
        self.conservative, self.charge, self.spin = conservative, charge, spin

    @classmethod
    def from_configs(
        cls, model_config: Mapping[str, Any], tasks_config: Sequence[Any], seed: int = 0, **arguments: Any
    ) -> FairchemModel:
        """A model with random weights.

        Args:
            model_config: As for the class.
            tasks_config: As for the class.
            seed: Seeds the weights.
            arguments: Further arguments of the class.

        Raises:
            ValueError: If a configuration names anything but parts of fairchem and tensors: it may come from a file.
        """
        _check_names(model_config, "model_config")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = hydra.utils.instantiate(copy.deepcopy(model_config))
        return cls(network, model_config, tasks_config, **arguments)

    def take_tasks(self, tasks_config: Sequence[Any]) -> None:
        """Predict what these configurations of tasks say, with their scales and element references.

        Raises:
            ValueError: If one names anything but parts of fairchem and tensors.
        """
        for index, config in enumerate(tasks_config):
            _check_names(config, f"tasks_config[{index}]")
        self.tasks_config = list(tasks_config)
        self.tasks: list[Task] = [hydra.utils.instantiate(config) for config in self.tasks_config]

    def forward(self, data: Any) -> Any:
        """The network's own output."""
        return self.network(data)

    def shift_energies(self, per_atom_eV: float) -> None:
        """Add a constant to the reference energy of every element: no force changes.

        Args:
            per_atom_eV: In eV per atom.
        """
        task = energy_task(self.tasks, self.dataset)
        if task.element_references is None:
            raise ValueError(f"the energy task of {self.dataset!r} has no element references to shift.")
        references = task.element_references.element_references
        references += per_atom_eV
        index = self.tasks.index(task)
        config = plain(self.tasks_config[index])
        config["element_references"] = _element_references(references.tolist())
        self.tasks_config[index] = config

    def stable_potential(self, system: System) -> FairchemPotential:
        """The potential that simulates."""
        system = system.with_electrons(self.charge, self.spin)
        return FairchemPotential(self.network, system, self.tasks, self.dataset, self.conservative)

    def with_electrons(self, frame: Atoms) -> Atoms:
        """A copy of a structure that states charge and spin.

        Raises:
            ValueError: If neither the structure nor the model does, and the data set needs them.
        """
        copied: Atoms = frame.copy()
        charge = frame.info.get("charge", self.charge)
        copied.info["charge"], copied.info["spin"] = charge_and_spin(
            charge, frame.info.get("spin", self.spin), self.dataset
        )
        return copied


def load_fairchem(
    source: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32, **arguments: Any
) -> FairchemModel:
    """Load a fairchem inference checkpoint with its averaged weights, those that calculators use.

    Such a file is a pickle: loading one runs code that it contains. Load files you trust.

    Args:
        source: Path of a checkpoint, or the name of a pretrained model such as ``uma-s-1p1``, fetched by fairchem.
        device: Where to.
        dtype: Precision; fairchem's models are trained in single.
        arguments: Further arguments of :class:`FairchemModel`.

    Raises:
        FileNotFoundError: If it is neither a file nor a name that fairchem knows or can fetch.
        ValueError: If the file is not a fairchem inference checkpoint.
    """
    path = _located(source)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # unpickling runs the file's own code: anything can come out of it
        raise ValueError(
            f"{path} cannot be read as a fairchem checkpoint ({type(error).__name__}: {error}): give the inference_ckpt.pt "
            "that fairchem training leaves behind."
        ) from error
    if not isinstance(checkpoint, MLIPInferenceCheckpoint):
        raise ValueError(
            f"{path} holds a {type(checkpoint).__name__}, not a fairchem inference checkpoint: give the inference_ckpt.pt "
            "that fairchem training leaves behind."
        )
    # Buffers and scales that no checkpoint holds are made in the default dtype.
    with default_dtype(dtype):
        averaged, checkpoint = load_inference_model(str(path), use_ema=True, preloaded_checkpoint=checkpoint)
        model = FairchemModel(averaged.module, checkpoint.model_config, checkpoint.tasks_config, **arguments)
    return model.to(device, dtype)


def save_fairchem(model: FairchemModel, path: str | Path) -> None:
    """Write an inference checkpoint that fairchem opens like any other.

    The file appears whole or not at all.

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
    **arguments: Any,
) -> FairchemModel:
    """An untrained model, with element references and a scale from labeled frames.

    Args:
        backbone: Configuration of the backbone, ``model`` being its name in fairchem.
        heads: Configurations of the heads, ``module`` being the name in fairchem.
        frames: Labelled structures.
        task_name: Name of the data set that the frames stand for.
        energy_weight: Of the energy's loss, per atom.
        forces_weight: Of the forces' loss.
        seed: Seeds the weights.
        arguments: Further arguments of :class:`FairchemModel`.
    """
    config = {
        "_target_": f"{CORE}.models.base.HydraModel",
        "backbone": dict(backbone),
        "heads": {name: dict(head) for name, head in heads.items()},
        "pass_through_head_outputs": True,
    }
    tasks = _tasks(frames, task_name, energy_weight, forces_weight)
    return FairchemModel.from_configs(config, tasks, seed, task_name=task_name, **arguments)


def _located(source: str | Path) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    if str(source) not in available_models:
        raise FileNotFoundError(
            f"checkpoint={str(source)!r} is neither a file nor a model that fairchem can fetch: give the path of an "
            f"inference checkpoint, or one of {', '.join(available_models)}."
        )
    try:
        return Path(pretrained_checkpoint_path_from_name(str(source)))
    except Exception as error:  # whatever a download can fail with
        raise FileNotFoundError(
            f"fairchem could not fetch checkpoint={str(source)!r} ({type(error).__name__}: {error}). Check the network and "
            "your access to the model, or give the path of a downloaded file."
        ) from error


def _check_names(config: Any, path: str) -> None:
    """Refuse to have hydra or fairchem call what is no part of a model."""
    config = plain(config) if OmegaConf.is_config(config) else config
    if isinstance(config, Mapping):
        name = config.get("_target_")
        tensor = str(name).startswith("torch.") and str(name).endswith("ensor") and str(name).count(".") == 1
        if name is not None and not (str(name).startswith("fairchem.core.") or tensor):
            raise ValueError(f"{path}._target_={name!r} is no part of fairchem, and is not called.")
        for key in ("model", "module", "head_cls"):
            if isinstance(config.get(key), str):
                _network_class(f"{path}.{key}", config[key])
        for key, value in config.items():
            _check_names(value, f"{path}.{key}")
    elif isinstance(config, list):
        for index, entry in enumerate(config):
            _check_names(entry, f"{path}[{index}]")


def check_new(backbone: Mapping[str, Any], heads: Mapping[str, Any]) -> None:
    """Refuse configurations of what is no part of a model: fairchem calls whatever they name.

    Args:
        backbone: As for :func:`new_fairchem`.
        heads: Likewise.

    Raises:
        ValueError: If a name is not that of a network, an argument is not one of its, or a number is not one that it can be
            built with.
    """
    parts = {"backbone": (backbone, "model"), **{f"heads.{name}": (head, "module") for name, head in heads.items()}}
    if not heads:
        raise ValueError(f"heads={heads!r} is empty: give at least one, with a module= that gives energies.")
    for part, (config, key) in parts.items():
        if not isinstance(config, Mapping) or key not in config:
            raise ValueError(
                f"{part}={config!r} does not say what it is: give {key}=, the name of a class of fairchem."
            )
        kind = _network_class(f"{part}.{key}", config[key])
        parameters = inspect.signature(kind).parameters
        open_ended = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
        for name, value in config.items():
            if name != key and name not in parameters and not open_ended:
                raise ValueError(
                    f"{part}.{name}={value!r} is no argument of {config[key]}: it takes {', '.join(parameters)}."
                )
            if isinstance(value, int | float) and not isinstance(value, bool):
                checks.number(f"{part}.{name}", value, at_least=-LARGEST_SETTING, at_most=LARGEST_SETTING)


def _network_class(name: str, value: Any) -> type:
    try:
        # As fairchem finds it, by a short name of its own or a full one.
        found = registry.get_model_class(value)
    except Exception as error:  # importing runs a module, from which anything can come
        raise ValueError(f"{name}={value!r} is not found ({error}): give the name of a class of fairchem.") from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(f"{name}={value!r} is no network: give the name of a class of fairchem, or of a torch module.")
    return found


def _tasks(frames: Sequence[Atoms], dataset: str, energy_weight: float, forces_weight: float) -> list[dict[str, Any]]:
    """Energy and forces, referenced to elements by least squares and scaled by the spread of the forces."""
    n_elements = 1 + max(int(frame.numbers.max()) for frame in frames)
    counts = np.array([np.bincount(frame.numbers, minlength=n_elements) for frame in frames], dtype=float)
    energies = np.array([frame.info[ENERGY_KEY] for frame in frames])
    references = np.linalg.lstsq(counts, energies, rcond=None)[0]
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


def plain(config: Any) -> dict[str, Any]:
    """A configuration without OmegaConf's types."""
    plain: Any = OmegaConf.to_container(config) if OmegaConf.is_config(config) else copy.deepcopy(config)
    return dict(plain)


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
