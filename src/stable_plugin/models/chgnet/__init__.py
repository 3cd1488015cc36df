"""CHGNet models, trained elsewhere, and the pretrained ones."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stable_plugin.models.chgnet.files import load_chgnet, save_chgnet
    from stable_plugin.models.chgnet.potential import CHGNetPotential

__all__ = ["CHGNetPotential", "load_chgnet", "save_chgnet"]

_DEFINED_IN = {"CHGNetPotential": "potential", "load_chgnet": "files", "save_chgnet": "files"}


def __getattr__(name: str) -> Any:
    # chgnet is slow to import and may be missing, and the registry only needs the module family.
    if name in _DEFINED_IN:
        return getattr(import_module(f"{__name__}.{_DEFINED_IN[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
