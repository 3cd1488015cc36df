"""StABlE training for Lightning: callback, mixin, data module, and modules for known families of models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stable_plugin.lightning.callback import StABlECallback
from stable_plugin.lightning.data import ExtxyzDataModule
from stable_plugin.lightning.mixin import StABlEMixin

if TYPE_CHECKING:
    from stable_plugin.lightning.fairchem_module import FairchemModule
    from stable_plugin.lightning.mace_module import MACEModule

__all__ = ["ExtxyzDataModule", "FairchemModule", "MACEModule", "StABlECallback", "StABlEMixin"]


def __getattr__(name: str) -> Any:
    # The families are optional, and slow to import: only those who ask for one need it.
    if name == "MACEModule":
        from stable_plugin.lightning.mace_module import MACEModule

        return MACEModule
    if name == "FairchemModule":
        from stable_plugin.lightning.fairchem_module import FairchemModule

        return FairchemModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
