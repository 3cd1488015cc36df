"""CHGNet's checkpoints and pretrained models: load and save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from stable_plugin.models.base import save_new

# After the module whose error says what to install if chgnet is missing.
from stable_plugin.models.chgnet import potential  # noqa: F401
from stable_plugin.models.chgnet.family import PREFIX
from stable_plugin.runtime.console import quiet_stdout

from chgnet.model.model import CHGNet  # isort: skip


def load_chgnet(source: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """Load a CHGNet checkpoint.

    Such a file is a pickle: loading one runs code that it contains. Load files you trust.

    Args:
        source: Path of a checkpoint, or ``chgnet-`` with the name of a pretrained model: ``chgnet-0.3.0``, ``chgnet-r2scan``.
        device: Device of the loaded model.
        dtype: Precision of the loaded model; CHGNet trains in single precision.

    Returns:
        A ``CHGNet``.

    Raises:
        FileNotFoundError: If the source is neither a file nor a pretrained model.
        ValueError: If the file is not a CHGNet checkpoint.
    """
    path, name = Path(source), str(source)
    if not path.is_file():
        return _pretrained(name).to(device, dtype)
    try:
        with quiet_stdout():  # CHGNet prints its number of parameters
            model: Any = CHGNet.from_file(name)
    except Exception as error:  # unpickling runs code of the file, which can raise anything
        raise ValueError(
            f"{source} cannot be read as a CHGNet checkpoint ({type(error).__name__}: {error}): pass a checkpoint that CHGNet "
            "training writes."
        ) from error
    return model.to(device, dtype)


def _pretrained(name: str) -> Any:
    try:
        with quiet_stdout():
            return CHGNet.load(model_name=name.lower().removeprefix(PREFIX), use_device="cpu", verbose=False)
    except ValueError as error:
        raise FileNotFoundError(
            f"checkpoint={name!r} is neither a file nor a pretrained model ({error}): pass an existing .pth.tar file, or "
            "'chgnet-0.3.0', 'chgnet-0.2.0' or 'chgnet-r2scan'."
        ) from error


def save_chgnet(model: Any, path: str | Path) -> None:
    """Write a checkpoint that ``CHGNet.from_file`` opens.

    The file appears complete or not at all.

    Args:
        model: A ``CHGNet``.
        path: A path that does not exist yet.

    Raises:
        FileExistsError: If there is a file already.
    """
    weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    save_new({"model": {"state_dict": weights, "model_args": model.model_args}}, path)
