"""Potentials: one protocol, a file for each family of models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from stable_plugin.md.system import System
from stable_plugin.models.base import Potential
from stable_plugin.models.module import ModulePotential, NoInteraction

__all__ = ["ModulePotential", "NoInteraction", "Potential", "find_potential", "load_potential"]


FAIRCHEM_NAMES = ("uma-", "esen-", "allscaip-")
"""How the names of fairchem's pretrained models begin."""


def find_potential(module: Any, system: System) -> Potential:
    """The potential inside a module, for instance inside a LightningModule.

    A module may say itself what its potential is with a method ``stable_potential(system)``; otherwise the first
    submodule of a known family is taken.

    Args:
        module: Where to look.
        system: What is to be simulated.

    Raises:
        TypeError: If no potential is found.
    """
    if hasattr(module, "stable_potential"):
        potential: Potential = module.stable_potential(system)
        return potential
    for part in module.modules():
        families = {base.__module__.split(".")[0] for base in type(part).__mro__}
        if "mace" in families and hasattr(part, "atomic_energies_fn"):
            from stable_plugin.models.mace.potential import MACEPotential

            return MACEPotential(part, system)
        if "fairchem" in families and hasattr(part, "output_heads"):
            from stable_plugin.models.fairchem.potential import FairchemPotential

            return FairchemPotential(part, system)
    raise TypeError(
        f"no potential found in {type(module).__name__}: it holds no MACE or fairchem model. Give the module a method "
        "stable_potential(system) that returns a stable_plugin.models.Potential, for instance a ModulePotential."
    )


def load_potential(source: str | Path, **arguments: Any) -> nn.Module:
    """Load a potential of a known family.

    Such files are pickles, which can run code: load files you trust.

    Args:
        source: Path of a fairchem inference checkpoint (``.pt``) or of a MACE ``.model`` file, or the name of a
            foundation model of either family.
        arguments: Further arguments of the family's loader, such as ``task_name`` for fairchem.

    Raises:
        FileNotFoundError: If it is neither a file nor a name that is known.
        ValueError: If the file is of another kind.
    """
    name = str(source)
    if name.endswith(".pt") or name.startswith(FAIRCHEM_NAMES):
        from stable_plugin.models.fairchem.files import load_fairchem

        return load_fairchem(source, **arguments)
    from stable_plugin.models.mace.files import load_mace

    model: nn.Module = load_mace(source, **arguments)
    return model
