"""MACE models, trained here or elsewhere, and the MACE foundation models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

try:
    import mace  # noqa: F401  (its import is the check)
except ImportError as error:
    raise ImportError(
        "MACE models need the package mace-torch, which is not installed: pip install 'stable-plugin[mace]', or see "
        "the README for MACE and fairchem in one environment."
    ) from error

from stable_plugin.models.mace.files import load_mace, save_mace
from stable_plugin.models.mace.potential import MACEPotential

if TYPE_CHECKING:
    from stable_plugin.models.mace.lightning_module import MACEModule

__all__ = ["MACEModule", "MACEPotential", "load_mace", "save_mace"]


def __getattr__(name: str) -> Any:
    # Lightning is slow to import, and only training needs it.
    if name == "MACEModule":
        from stable_plugin.models.mace.lightning_module import MACEModule

        return MACEModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
