"""CHGNet as a family of models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from stable_plugin.md.system import System
from stable_plugin.models.base import Potential
from stable_plugin.models.family import ModelFamily

if TYPE_CHECKING:
    from stable_plugin.models.lightning_module import PotentialModule

PREFIX = "chgnet-"
"""How the names of pretrained models begin; CHGNet's own names, such as 0.3.0, follow."""


class CHGNetFamily(ModelFamily):
    """CHGNet: its checkpoints and pretrained models."""

    name = "chgnet"
    title = "CHGNet"
    packages = ("chgnet",)
    suffixes = (".pth.tar",)
    loader_arguments = ("device", "dtype")
    pretrained = "'chgnet-0.3.0'"

    def is_model(self, module: nn.Module) -> bool:
        return hasattr(module, "graph_converter") and hasattr(module, "bond_basis_expansion")

    def make_potential(self, module: nn.Module, system: System) -> Potential:
        from stable_plugin.models.chgnet.potential import CHGNetPotential

        return CHGNetPotential(module, system)

    def is_pretrained(self, name: str) -> bool:
        return name.lower().startswith(PREFIX)

    def load(self, source: str | Path, **arguments: Any) -> nn.Module:
        from stable_plugin.models.chgnet.files import load_chgnet

        model: nn.Module = load_chgnet(source, **arguments)
        return model

    def file_suffix(self, module: nn.Module) -> str | None:
        return self.suffixes[0]

    def save(self, module: nn.Module, path: Path) -> None:
        from stable_plugin.models.chgnet.files import save_chgnet

        save_chgnet(next(part for part in module.modules() if self.owns(part)), path)

    def lightning_module(self) -> type[PotentialModule]:
        from stable_plugin.models.fine_tuning import FineTuningModule

        return FineTuningModule


FAMILY = CHGNetFamily()
