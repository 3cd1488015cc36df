"""StABlE training in Lightning: callback, mixin and data module."""

from stable_plugin.integrations.lightning.callback import StABlECallback
from stable_plugin.integrations.lightning.data import ExtxyzDataModule
from stable_plugin.integrations.lightning.mixin import StABlEMixin

__all__ = ["ExtxyzDataModule", "StABlECallback", "StABlEMixin"]
