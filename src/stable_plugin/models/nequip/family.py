"""NequIP as a family of models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ase import Atoms
from torch import Tensor, nn

from stable_plugin.md.system import System
from stable_plugin.models.averages import WeightAverage
from stable_plugin.models.base import Potential
from stable_plugin.models.family import ModelFamily


class NequIPFamily(ModelFamily):
    """NequIP, Allegro and other models in NequIP's ``GraphModel``; its checkpoints and packages."""

    name = "nequip"
    title = "NequIP"
    packages = ("nequip",)
    suffixes = (".nequip.zip", ".ckpt")
    loader_arguments = ("device",)

    def owns(self, module: nn.Module) -> bool:
        # Not by the package of the class: models from packaged files have classes of their own.
        return self.is_model(module)

    def is_model(self, module: nn.Module) -> bool:
        return bool(getattr(module, "is_graph_model", False))

    def make_potential(self, module: nn.Module, system: System) -> Potential:
        from stable_plugin.models.nequip.potential import NequIPPotential

        return NequIPPotential(module, system)

    def load(self, source: str | Path, **arguments: Any) -> nn.Module:
        from stable_plugin.models.nequip.files import load_nequip

        return load_nequip(source, **arguments)

    def structures(self, module: nn.Module, items: Sequence[Any]) -> list[Atoms] | None:
        if not all(isinstance(item, dict) and {"pos", "atomic_numbers"} <= item.keys() for item in items):
            return None
        return [_structure(item) for item in items]

    def average(self, holder: Any) -> WeightAverage | None:
        """Return the average of NequIP's ``EMALightningModule``."""
        kept: Any = getattr(holder, "ema", None)
        if not (isinstance(holder, nn.Module) and hasattr(kept, "ema_weights") and hasattr(kept, "swap_parameters")):
            return None
        model: nn.Module = holder.get_submodule("model")
        return WeightAverage(
            type(holder).__name__, lambda: list(zip(model.parameters(), kept.ema_weights, strict=True))
        )


FAMILY = NequIPFamily()


def _structure(graph: dict[str, Tensor]) -> Atoms:
    pbc = graph["pbc"].reshape(-1).tolist() if "pbc" in graph else False
    cell = graph.get("cell")
    return Atoms(
        numbers=graph["atomic_numbers"].reshape(-1).cpu().numpy(),
        positions=graph["pos"].detach().cpu().numpy(),
        cell=None if cell is None else cell.detach().reshape(3, 3).cpu().numpy(),
        pbc=pbc,
    )
