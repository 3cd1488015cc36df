"""SevenNet's checkpoints and pretrained models: load and save."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stable_plugin.md.system import System
from stable_plugin.models.base import default_dtype, save_new
from stable_plugin.models.sevennet.potential import SevenNetPotential

# After stable_plugin.models.sevennet.potential, whose error says what to install if sevenn is missing.
import sevenn  # isort: skip
from sevenn.util import load_checkpoint  # isort: skip


class SevenNetModel(nn.Module):
    """A SevenNet model with the configuration in its checkpoint.

    Args:
        network: An ``AtomGraphSequential``.
        config: Configuration that SevenNet builds the network from.
        modal: Name of the modality (the level of theory) of a multi-modal model.
    """

    def __init__(self, network: nn.Module, config: Mapping[str, Any], modal: str | None = None) -> None:
        super().__init__()
        self.network = network
        self.config = dict(config)
        self.modal = modal

    def extra_repr(self) -> str:
        """Return the arguments for ``repr``."""
        return f"modal={self.modal!r}"

    def forward(self, data: Any) -> Any:
        """Return the output of the network."""
        return self.network(data)

    def stable_potential(self, system: System) -> SevenNetPotential:
        """Return the potential that simulates ``system``."""
        return SevenNetPotential(self.network, system, self.modal)


def load_sevennet(
    source: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32, modal: str | None = None
) -> SevenNetModel:
    """Load a SevenNet checkpoint.

    Such a file is a pickle: loading one runs code that it contains. Load files you trust.

    Args:
        source: Path of a checkpoint, or the name of a pretrained model such as ``7net-0``.
        device: Device of the loaded model.
        dtype: Precision of the loaded model; SevenNet trains in single precision.
        modal: Name of the modality of a multi-modal model.

    Returns:
        The model.

    Raises:
        FileNotFoundError: If the source is neither a file nor a name that SevenNet knows.
        ValueError: If the file is not a SevenNet checkpoint.
    """
    try:
        checkpoint = load_checkpoint(str(source))
    except ValueError as error:
        raise FileNotFoundError(
            f"checkpoint={str(source)!r} is neither a file nor a pretrained model: pass an existing .pth file ({error})."
        ) from error
    try:
        # SevenNet builds some parts in the default dtype and warns of accelerators that are not installed.
        with default_dtype(torch.float32), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            network = checkpoint.build_model()
    except Exception as error:  # unpickling runs code of the file, which can raise anything
        raise ValueError(
            f"{source} cannot be read as a SevenNet checkpoint ({type(error).__name__}: {error}): pass a checkpoint that "
            "SevenNet training writes."
        ) from error
    return SevenNetModel(network, checkpoint.config, modal).to(device, dtype)


def save_sevennet(model: SevenNetModel, path: str | Path) -> None:
    """Write a checkpoint that ``SevenNetCalculator`` opens.

    The file appears complete or not at all.

    Args:
        model: The model.
        path: A path that does not exist yet.

    Raises:
        FileExistsError: If there is a file already.
    """
    weights = {name: tensor.detach().cpu() for name, tensor in model.network.state_dict().items()}
    # SevenNet renames the weights of files from older versions when it loads them; these have their new names.
    config = {**model.config, "version": sevenn.__version__}
    save_new({"config": config, "model_state_dict": weights, "epoch": None}, path)
