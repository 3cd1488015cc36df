"""NequIP and Allegro models, in training by NequIP and from its files."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stable_plugin.models.nequip.files import load_nequip
    from stable_plugin.models.nequip.potential import NequIPPotential

__all__ = ["NequIPPotential", "load_nequip"]

_DEFINED_IN = {"NequIPPotential": "potential", "load_nequip": "files"}


def __getattr__(name: str) -> Any:
    # nequip is slow to import and may be missing, and the registry only needs the module family.
    if name in _DEFINED_IN:
        return getattr(import_module(f"{__name__}.{_DEFINED_IN[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
