"""StABlE training in Lightning: callback, mixin, data module and checkpoint I/O."""

from stable_plugin.integrations.lightning.callback import StABlECallback
from stable_plugin.integrations.lightning.checkpoint_io import AtomicCheckpointIO
from stable_plugin.integrations.lightning.data import ExtxyzDataModule
from stable_plugin.integrations.lightning.mixin import StABlEMixin
from stable_plugin.integrations.lightning.pseudolabels import PseudoLabeledDataModule

__all__ = ["AtomicCheckpointIO", "ExtxyzDataModule", "PseudoLabeledDataModule", "StABlECallback", "StABlEMixin"]
