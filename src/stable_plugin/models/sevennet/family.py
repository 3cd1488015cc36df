"""SevenNet as a family of models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from stable_plugin.md.system import System
from stable_plugin.models.base import Potential
from stable_plugin.models.family import ModelFamily

if TYPE_CHECKING:
    from stable_plugin.models.lightning_module import PotentialModule

PRETRAINED = ("7net-", "sevennet-")
"""How the names of SevenNet's pretrained models begin."""


class SevenNetFamily(ModelFamily):
    """SevenNet: ``AtomGraphSequential``, its checkpoints and pretrained models."""

    name = "sevennet"
    title = "SevenNet"
    packages = ("sevenn",)
    suffixes = (".pth",)
    loader_arguments = ("device", "dtype", "modal")
    pretrained = "'7net-0'"

    def is_model(self, module: nn.Module) -> bool:
        return hasattr(module, "type_map") and hasattr(module, "cutoff")

    def make_potential(self, module: nn.Module, system: System) -> Potential:
        from stable_plugin.models.sevennet.potential import SevenNetPotential

        return SevenNetPotential(module, system)

    def is_pretrained(self, name: str) -> bool:
        return name.lower().startswith(PRETRAINED)

    def load(self, source: str | Path, **arguments: Any) -> nn.Module:
        from stable_plugin.models.sevennet.files import load_sevennet

        return load_sevennet(source, **arguments)

    def file_suffix(self, module: nn.Module) -> str | None:
        return None if _with_config(module) is None else self.suffixes[0]

    def save(self, module: nn.Module, path: Path) -> None:
        from stable_plugin.models.sevennet.files import save_sevennet

        save_sevennet(_with_config(module), path)

    def lightning_module(self) -> type[PotentialModule]:
        from stable_plugin.models.fine_tuning import FineTuningModule

        return FineTuningModule


def _with_config(module: nn.Module) -> Any:
    """Return the model inside a module with the configuration that its file needs, None if there is none."""
    for part in module.modules():
        if hasattr(part, "network") and hasattr(part, "config"):
            return part
    return None


FAMILY = SevenNetFamily()
