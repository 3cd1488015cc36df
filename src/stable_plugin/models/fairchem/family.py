"""fairchem as a family of models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ase import Atoms
from torch import nn

from stable_plugin.md.system import System
from stable_plugin.models.base import Potential
from stable_plugin.models.family import ModelFamily

if TYPE_CHECKING:
    from stable_plugin.models.lightning_module import PotentialModule

PRETRAINED = ("uma-", "esen-", "allscaip-")
"""How the names of fairchem's pretrained models begin."""


class FairchemFamily(ModelFamily):
    """fairchem: eSEN, UMA and AllScAIP, their inference checkpoints and pretrained models."""

    name = "fairchem"
    title = "fairchem"
    packages = ("fairchem",)
    suffixes = (".pt",)
    loader_arguments = ("device", "dtype", "task_name", "conservative", "charge", "spin")
    pretrained = "'uma-s-1p1'"

    def is_model(self, module: nn.Module) -> bool:
        return hasattr(module, "output_heads")

    def make_potential(self, module: nn.Module, system: System) -> Potential:
        from stable_plugin.models.fairchem.potential import FairchemPotential

        return FairchemPotential(module, system)

    def is_pretrained(self, name: str) -> bool:
        return name.startswith(PRETRAINED)

    def load(self, source: str | Path, **arguments: Any) -> nn.Module:
        from stable_plugin.models.fairchem.files import load_fairchem

        return load_fairchem(source, **arguments)

    def file_suffix(self, module: nn.Module) -> str | None:
        return None if _with_tasks(module) is None else self.suffixes[0]

    def save(self, module: nn.Module, path: Path) -> None:
        from stable_plugin.models.fairchem.files import save_fairchem

        save_fairchem(_with_tasks(module), path)

    def structures(self, module: nn.Module, items: Sequence[Any]) -> list[Atoms] | None:
        if not all(hasattr(item, "to_ase_single") for item in items):
            return None
        return [item.to_ase_single() for item in items]

    def lightning_module(self) -> type[PotentialModule]:
        from stable_plugin.models.fairchem.lightning_module import FairchemModule

        return FairchemModule


FAMILY = FairchemFamily()


def _with_tasks(module: nn.Module) -> Any:
    """Return the model inside a module with the tasks that its file needs, None if there is none."""
    return next((part for part in module.modules() if hasattr(part, "tasks_config")), None)
