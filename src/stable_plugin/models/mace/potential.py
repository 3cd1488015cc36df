"""A MACE model applied to replicas of one system."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stable_plugin.md.neighbors import Edges
from stable_plugin.md.system import System
from stable_plugin.models.base import Potential, default_dtype
from stable_plugin.models.mace.files import quiet_e3nn
from stable_plugin.models.mace.heads import choose_head, heads_of, shift_isolated_atoms
from stable_plugin.runtime.memory import is_out_of_memory

log = logging.getLogger(__name__)


class MACEPotential(Potential):
    """A MACE model applied to replicas of one system.

    Source of the model: Batatia, Kovács, Simm, Ortner and Csányi, NeurIPS 2022, arXiv:2206.07697.

    Args:
        module: A ``mace.modules.MACE`` or a subclass that returns energies per atom.
        system: What is simulated.
        head: Name of the head of a multi-head model, where the system names none; if None, the one that MACE's own
            calculator takes by default.

    Raises:
        ValueError: If the model does not know an element of the system, or does not have the head.
    """

    # Any: nn.Module does not declare the attributes of a MACE model.
    module: Any

    def __init__(self, module: Any, system: System, head: str | None = None) -> None:
        super().__init__(module, system)
        known = module.atomic_numbers.tolist()
        unknown = sorted(
            {symbol for symbol, z in zip(system.symbols, system.numbers.tolist(), strict=True) if z not in known}
        )
        if unknown:
            raise ValueError(
                f"the model does not know the element(s) {', '.join(unknown)} (it knows the atomic numbers {known}): "
                "train it on frames that contain them, or choose a foundation model that does."
            )
        self._heads = heads_of(module)
        self._head = self._heads.index(choose_head(self._heads, system.head or head))
        if any(type(part).__name__ == "ChebychevBasis" for part in module.modules()):
            log.warning(
                "the model has radial_type='chebyshev', and torch has no derivative of these polynomials: its forces are not "
                "the gradient of its energy, in MACE's own calculator either. Use a model with another radial_type."
            )
        species = torch.tensor([known.index(z) for z in system.numbers.tolist()], device=self.device)
        self._one_hot = nn.functional.one_hot(species, len(known)).to(self.dtype)
        self._constants: dict[int, dict[str, Tensor]] = {}

    @property
    def cutoff(self) -> float:
        return float(self.module.r_max)

    def atomic_energies(self, positions: Tensor, edges: Edges) -> Tensor:
        output = self.module(self.graph(positions, edges), compute_force=False)
        energies: Tensor = output["node_energy"].double().reshape(positions.shape[:2])
        return energies - self._isolated_energies()

    @property
    def constant_energy(self) -> float:
        return float(self._isolated_energies().sum())

    @property
    def branch(self) -> str:
        return self._heads[self._head]

    def shift_energies(self, per_atom_eV: float) -> bool:
        shift_isolated_atoms(self.module, per_atom_eV, self._head)
        return True

    def shift_isolated_atoms(self, shifts: Mapping[int, float]) -> bool:
        shift_isolated_atoms(self.module, shifts, self._head)
        return True

    def energies(self, positions: Tensor, edges: Edges) -> Tensor:
        return self._interaction_energy(self.module(self.graph(positions, edges), compute_force=False))

    def compilable(self) -> MACEPotential:
        traceable = copy.copy(self)
        traceable.module = _without_torchscript(self.module)
        return traceable

    def settings(self) -> dict[str, Any]:
        return {"head": self.branch}

    def graph(self, positions: Tensor, edges: Edges) -> dict[str, Tensor]:
        """Return the dictionary that ``forward`` of a MACE model takes.

        Args:
            positions: (n_replicas, n_atoms, 3) in Å.
            edges: Neighbor graph of these replicas.
        """
        n_replicas = len(positions)
        if n_replicas not in self._constants:
            self._constants[n_replicas] = self._constant_entries(n_replicas)
        return {
            **self._constants[n_replicas],
            "positions": positions.reshape(-1, 3),
            "edge_index": edges.index,
            "shifts": edges.shifts,
            # Only stresses read these.
            "unit_shifts": edges.shifts,
        }

    def _isolated_energies(self) -> Tensor:
        energies: Tensor = self.module.atomic_energies_fn(self._one_hot)
        return energies[:, self._head].double()

    def _constant_entries(self, n_replicas: int) -> dict[str, Tensor]:
        n_atoms = self.system.n_atoms
        replicas = torch.arange(n_replicas, device=self.device)
        return {
            "node_attrs": self._one_hot.repeat(n_replicas, 1),
            "batch": replicas.repeat_interleave(n_atoms),
            "ptr": torch.arange(0, n_replicas * n_atoms + 1, n_atoms, device=self.device),
            "cell": torch.zeros(3 * n_replicas, 3, dtype=self.dtype, device=self.device),
            "head": torch.full((n_replicas,), self._head, device=self.device),
        }

    def _interaction_energy(self, output: dict[str, Tensor]) -> Tensor:
        if "interaction_energy" in output:
            return output["interaction_energy"]
        # Models without scale and shift return the isolated-atom energies as the first contribution.
        return output["contributions"][:, 1:].sum(dim=1)


def _without_torchscript(module: Any) -> nn.Module:
    """Return the model rebuilt from plain torch code, with the same parameters and buffers, not copies of them.

    Args:
        module: A MACE model.

    Raises:
        ValueError: If mace cannot rebuild the model.
    """
    try:
        rebuilt = _rebuilt(module)
        for name, parameter in module.named_parameters():
            _share(rebuilt, name, parameter, "_parameters")
        for name, buffer in module.named_buffers():
            _share(rebuilt, name, buffer, "_buffers")
        return rebuilt.eval()
    # mace reads the settings back from the parts of a model, and fails with any error on a part it does not expect:
    # with AttributeError on a radial basis of Chebyshev polynomials, for instance.
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"compile=True: mace cannot rebuild this {type(module).__name__} ({type(error).__name__}: {error}). "
            "Set compile=False."
        ) from error


def _rebuilt(module: Any) -> nn.Module:
    from mace.tools.compile import disable_e3nn_codegen, simplify
    from mace.tools.scripts_utils import extract_config_mace_model

    settings = extract_config_mace_model(module)
    if "error" in settings:
        raise ValueError(settings["error"])
    with quiet_e3nn(), disable_e3nn_codegen(), default_dtype(next(module.parameters()).dtype):
        rebuilt: nn.Module = simplify(type(module)(**settings))
    return rebuilt


def _share(module: nn.Module, name: str, tensor: Tensor, kind: str) -> None:
    """Put a parameter or buffer in the place of the rebuilt one; buffers of TorchScript itself have no counterpart."""
    path, _, leaf = name.rpartition(".")
    try:
        held = getattr(module.get_submodule(path), kind)
    except AttributeError:
        held = {}
    if leaf in held and held[leaf].shape == tensor.shape:
        held[leaf] = tensor
    elif kind == "_parameters":
        raise ValueError(f"the rebuilt model has no parameter {name} of shape {tuple(tensor.shape)}")
