"""MACE models, trained here or elsewhere, and the MACE foundation models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stable_plugin.models.mace.files import load_mace, save_mace
    from stable_plugin.models.mace.lightning_module import MACEModule
    from stable_plugin.models.mace.potential import MACEPotential

__all__ = ["MACEModule", "MACEPotential", "load_mace", "save_mace"]

_DEFINED_IN = {
    "MACEModule": "lightning_module",
    "MACEPotential": "potential",
    "load_mace": "files",
    "save_mace": "files",
}


def __getattr__(name: str) -> Any:
    # mace and Lightning are slow to import and may be missing, and the registry only needs the module family.
    if name in _DEFINED_IN:
        return getattr(import_module(f"{__name__}.{_DEFINED_IN[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
