"""fairchem models: eSEN, UMA, AllScAIP."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stable_plugin.models.fairchem.files import FairchemModel, load_fairchem, save_fairchem
    from stable_plugin.models.fairchem.lightning_module import FairchemModule
    from stable_plugin.models.fairchem.potential import FairchemPotential

__all__ = ["FairchemModel", "FairchemModule", "FairchemPotential", "load_fairchem", "save_fairchem"]

_DEFINED_IN = {
    "FairchemModel": "files",
    "FairchemModule": "lightning_module",
    "FairchemPotential": "potential",
    "load_fairchem": "files",
    "save_fairchem": "files",
}


def __getattr__(name: str) -> Any:
    # fairchem and Lightning are slow to import and may be missing, and the registry only needs the module family.
    if name in _DEFINED_IN:
        return getattr(import_module(f"{__name__}.{_DEFINED_IN[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
