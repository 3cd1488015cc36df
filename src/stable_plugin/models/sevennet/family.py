"""SevenNet as a family of models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from stable_plugin.md.system import System
from stable_plugin.models.base import Potential
from stable_plugin.models.family import ModelFamily

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


FAMILY = SevenNetFamily()
