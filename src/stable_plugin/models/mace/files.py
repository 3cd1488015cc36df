"""MACE ``.model`` files and foundation models: load and save."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stable_plugin.models.base import save_new
from stable_plugin.models.family import not_installed
from stable_plugin.models.pickles import is_torchscript

try:
    import mace  # noqa: F401  (only its presence matters here)
except ImportError as error:
    raise not_installed("mace", "MACE", "mace-torch") from error


@contextmanager
def quiet_e3nn() -> Iterator[None]:
    """Silence the warnings of e3nn about TorchScript, one for each module, which a user cannot act on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The TorchScript type system", category=UserWarning)
        warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated", category=DeprecationWarning)
        yield


def load_mace(source: str | Path, device: str = "cpu") -> Any:
    """Load a MACE model.

    A ``.model`` file is a pickle: loading one runs code that it contains. Load files you trust.

    Args:
        source: Path of a ``.model`` file, or the name of a foundation model: ``small``, ``medium``, ... (MACE-MP), or
            ``off-small``, ``off-medium``, ``off-large`` (MACE-OFF), fetched by mace's own loaders.
        device: Device of the loaded model.

    Returns:
        The model, a ``mace.modules.MACE``.

    Raises:
        FileNotFoundError: If the source is neither a file nor a name that mace knows.
        ValueError: If the file does not load under the installed e3nn, or contains another object.
    """
    path = Path(source)
    if path.is_file():
        return _load_file(path, device)
    if path.suffix or os.sep in str(source):
        raise FileNotFoundError(
            f"no MACE model at {path}: pass an existing .model file or the name of a foundation model."
        )
    from mace.calculators import mace_mp, mace_off

    name = str(source)
    loader, size = (mace_off, name.removeprefix("off-")) if name.startswith("off-") else (mace_mp, name)
    try:
        return loader(model=size, device=device, return_raw_model=True)
    except Exception as error:  # a download, or a package that a model needs, can fail with any error
        raise FileNotFoundError(
            f"model={name!r} is neither a file nor a foundation model that mace could load ({error}). Pass the path of "
            "a .model file, or check the name and the network."
        ) from error


def save_mace(module: nn.Module, path: str | Path) -> None:
    """Write a ``.model`` file that ``mace.calculators.MACECalculator`` opens.

    The file appears complete or not at all. The model is saved in evaluation mode.

    Args:
        module: A MACE model.
        path: A path that does not exist yet.

    Raises:
        FileExistsError: If there is a file already.
    """
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        save_new(module, path)
    finally:
        for part, mode in modes.items():
            part.training = mode


def _load_file(path: Path, device: str) -> Any:
    import e3nn

    if is_torchscript(path):
        raise ValueError(
            f"{path} is a compiled TorchScript model, whose weights cannot be trained or simulated in batches: pass the "
            ".model file that mace_run_train writes beside it, without '_compiled' in its name."
        )

    try:
        with quiet_e3nn():
            model: Any = torch.load(path, map_location=device, weights_only=False)
    except Exception as error:  # unpickling runs code of the file, which can raise anything
        raise ValueError(
            f"{path} does not load under the installed e3nn {e3nn.__version__} ({type(error).__name__}: {error}). MACE "
            "models written with e3nn 0.4.4 load with e3nn 0.4.4 to 0.5.1: install e3nn==0.5.1, or check that the "
            "file is a MACE .model file."
        ) from error
    if not hasattr(model, "atomic_numbers") or not hasattr(model, "r_max"):
        raise ValueError(f"{path} contains a {type(model).__name__}, not a MACE model: pass a MACE .model file.")
    return model
