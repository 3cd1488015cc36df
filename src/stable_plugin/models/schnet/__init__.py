"""SchNetPack models, in training by SchNetPack and from its files."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stable_plugin.models.schnet.files import SchNetModel, load_schnet, save_schnet
    from stable_plugin.models.schnet.potential import SchNetPotential

__all__ = ["SchNetModel", "SchNetPotential", "load_schnet", "save_schnet"]

_DEFINED_IN = {
    "SchNetModel": "files",
    "SchNetPotential": "potential",
    "load_schnet": "files",
    "save_schnet": "files",
}


def __getattr__(name: str) -> Any:
    # schnetpack is slow to import and may be missing, and the registry only needs the module family.
    if name in _DEFINED_IN:
        return getattr(import_module(f"{__name__}.{_DEFINED_IN[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
