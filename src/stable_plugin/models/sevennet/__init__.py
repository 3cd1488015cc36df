"""SevenNet models, trained elsewhere, and the pretrained ones."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stable_plugin.models.sevennet.files import SevenNetModel, load_sevennet, save_sevennet
    from stable_plugin.models.sevennet.potential import SevenNetPotential

__all__ = ["SevenNetModel", "SevenNetPotential", "load_sevennet", "save_sevennet"]

_DEFINED_IN = {
    "SevenNetModel": "files",
    "SevenNetPotential": "potential",
    "load_sevennet": "files",
    "save_sevennet": "files",
}


def __getattr__(name: str) -> Any:
    # sevenn is slow to import and may be missing, and the registry only needs the module family.
    if name in _DEFINED_IN:
        return getattr(import_module(f"{__name__}.{_DEFINED_IN[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
