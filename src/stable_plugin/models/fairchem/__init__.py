"""fairchem models: eSEN, UMA, AllScAIP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

# First: its error says what to install when fairchem is missing.
from stable_plugin.models.fairchem.potential import FairchemPotential  # isort: skip

from stable_plugin.models.fairchem.files import FairchemModel, load_fairchem, save_fairchem

if TYPE_CHECKING:
    from stable_plugin.models.fairchem.lightning_module import FairchemModule

__all__ = ["FairchemModel", "FairchemModule", "FairchemPotential", "load_fairchem", "save_fairchem"]


def __getattr__(name: str) -> Any:
    # Lightning is slow to import, and only training needs it.
    if name == "FairchemModule":
        from stable_plugin.models.fairchem.lightning_module import FairchemModule

        return FairchemModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
