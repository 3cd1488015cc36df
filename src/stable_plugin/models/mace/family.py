"""MACE as a family of models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ase import Atoms
from torch import nn

from stable_plugin.md.system import System
from stable_plugin.models.base import Potential
from stable_plugin.models.family import ModelFamily
from stable_plugin.models.mace.heads import heads_of

if TYPE_CHECKING:
    from stable_plugin.models.lightning_module import PotentialModule

PRETRAINED = ("small", "medium", "large", "mace-", "mh-", "off-")
"""How the names of MACE's foundation models begin."""


class MACEFamily(ModelFamily):
    """MACE: ``mace.modules.MACE`` and its subclasses, ``.model`` files and the foundation models."""

    name = "mace"
    title = "MACE"
    packages = ("mace",)
    suffixes = (".model",)
    loader_arguments = ("device",)
    pretrained = "'small', 'medium-mpa-0' or 'off-small'"

    def is_model(self, module: nn.Module) -> bool:
        return hasattr(module, "atomic_energies_fn")

    def make_potential(self, module: nn.Module, system: System) -> Potential:
        from stable_plugin.models.mace.potential import MACEPotential

        return MACEPotential(module, system)

    def is_pretrained(self, name: str) -> bool:
        return name.startswith(PRETRAINED)

    def load(self, source: str | Path, **arguments: Any) -> nn.Module:
        from stable_plugin.models.mace.files import load_mace

        model: nn.Module = load_mace(source, **arguments)
        return model

    def file_suffix(self, module: nn.Module) -> str:
        return self.suffixes[0]

    def save(self, module: nn.Module, path: Path) -> None:
        from stable_plugin.models.mace.files import save_mace

        save_mace(_model(module), path)

    def structures(self, module: nn.Module, items: Sequence[Any]) -> list[Atoms] | None:
        model = _model(module)
        if model is None or not all(hasattr(item, "node_attrs") for item in items):
            return None
        return [_structure(item, model) for item in items]

    def lightning_module(self) -> type[PotentialModule]:
        from stable_plugin.models.mace.lightning_module import MACEModule

        return MACEModule


FAMILY = MACEFamily()


def _model(module: nn.Module) -> Any:
    """Return the MACE model inside a module, None if there is none."""
    for part in module.modules():
        if hasattr(part, "atomic_energies_fn") and hasattr(part, "atomic_numbers"):
            return part
    return None


def _structure(graph: Any, model: Any) -> Atoms:
    """Return the structure of a graph, whose one-hot vectors and head are in the order of the model."""
    pbc: Any = getattr(graph, "pbc", None)
    periodic = pbc is not None and bool(pbc.any())
    head, heads = getattr(graph, "head", None), heads_of(model)
    return Atoms(
        numbers=model.atomic_numbers.cpu()[graph.node_attrs.argmax(dim=1).cpu()].numpy(),
        positions=graph.positions.detach().cpu().numpy(),
        cell=graph.cell.detach().cpu().numpy() if periodic else None,
        pbc=pbc.reshape(-1).tolist() if periodic else False,
        info={} if head is None or len(heads) == 1 else {"head": heads[int(head)]},
    )
