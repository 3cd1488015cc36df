"""CHGNet's checkpoints and pretrained models: load and save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from stable_plugin.models.base import save_new
from stable_plugin.models.chgnet.family import PREFIX

# After the module whose error says what to install if chgnet is missing.
from stable_plugin.models.chgnet.potential import CHGNet
from stable_plugin.runtime.console import quiet_stdout


def load_chgnet(source: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> CHGNet:
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
    pretrained = name.lower().startswith(PREFIX) and not path.exists()
    if not pretrained and not path.is_file():
        raise FileNotFoundError(f"checkpoint={name!r} is neither a file nor a pretrained model: pass an existing .pth.tar file.")
    try:
        with quiet_stdout():  # CHGNet prints its number of parameters
            model: Any = (
                CHGNet.load(model_name=name[len(PREFIX) :].lower(), use_device="cpu", verbose=False)
                if pretrained
                else CHGNet.from_file(str(path))
            )
    except Exception as error:  # unpickling runs code of the file, which can raise anything
        if pretrained:
            raise FileNotFoundError(f"model={name!r} is not a pretrained model of CHGNet ({error}): use 'chgnet-0.3.0'.") from error
        raise ValueError(
            f"{source} cannot be read as a CHGNet checkpoint ({type(error).__name__}: {error}): pass a checkpoint that CHGNet "
            "training writes."
        ) from error
    return model.to(device, dtype)


def save_chgnet(model: CHGNet, path: str | Path) -> None:
    """Write a checkpoint that ``CHGNet.from_file`` opens.

    The file appears complete or not at all.

    Args:
        model: The model.
        path: A path that does not exist yet.

    Raises:
        FileExistsError: If there is a file already.
    """
    weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    save_new({"model": {"state_dict": weights, "model_args": model.model_args}}, path)
