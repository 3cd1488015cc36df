"""NequIP's checkpoints and packages."""

from __future__ import annotations

import warnings
from pathlib import Path

from torch import nn

from stable_plugin.models.family import not_installed

try:
    from nequip.model.saved_models.load_utils import load_saved_model
    from nequip.utils.global_state import global_state_initialized, set_global_state
except ImportError as error:
    raise not_installed("nequip", "NequIP", "nequip") from error


def load_nequip(source: str | Path, device: str = "cpu") -> nn.Module:
    """Load the model in a checkpoint of ``nequip-train`` or a file of ``nequip-package``.

    The weights are those that NequIP's own tools take: averages, if the checkpoint has any. Such a file is a pickle:
    loading one runs code that it contains. Load files you trust.

    Args:
        source: Path of a ``.ckpt`` or ``.nequip.zip`` file.
        device: Device of the loaded model.

    Returns:
        The model.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is neither.
    """
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"checkpoint={str(source)!r} is not a file: pass an existing .ckpt or .nequip.zip file."
        )
    if not global_state_initialized():
        set_global_state()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            model: nn.Module = load_saved_model(str(path.absolute()))
    except Exception as error:  # unpickling runs code of the file, which can raise anything
        raise ValueError(
            f"{source} cannot be read as a NequIP model ({type(error).__name__}: {error}): pass a checkpoint of nequip-train "
            "or a file of nequip-package."
        ) from error
    return model.to(device)
