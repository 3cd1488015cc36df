"""SevenNet models applied to replicas of one system."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stable_plugin.md.neighbors import Edges
from stable_plugin.md.system import System
from stable_plugin.models.base import Potential
from stable_plugin.models.family import not_installed

try:
    from sevenn import _keys as KEY
    from sevenn.nn.edge_embedding import EdgeEmbedding
    from sevenn.nn.node_embedding import OnehotEmbedding
except ImportError as error:
    raise not_installed("sevennet", "SevenNet", "sevenn") from error


class SevenNetPotential(Potential):
    """A SevenNet model applied to replicas of one system.

    Source of the model: Park, Kim, Hwang and Han, J. Chem. Theory Comput. 20, 4857 (2024), arXiv:2402.03789.

    Args:
        module: An ``AtomGraphSequential``.
        system: What is simulated.
        modal: Name of the modality (the level of theory) of a multi-modal model.

    Raises:
        ValueError: If the model does not know an element of the system, or the modality.
    """

    # Any: nn.Module does not declare the attributes of a SevenNet model.
    module: Any
    uncompilable = "SevenNet models, which e3nn compiles"

    def __init__(self, module: Any, system: System, modal: str | None = None) -> None:
        super().__init__(module, system)
        known = {} if module.type_map is None else module.type_map
        numbers = system.numbers.tolist()
        unknown = sorted({symbol for symbol, z in zip(system.symbols, numbers, strict=True) if z not in known})
        if unknown:
            raise ValueError(
                f"the model does not know the element(s) {', '.join(unknown)} (it knows the atomic numbers "
                f"{sorted(known)}): use a model that was trained on them."
            )
        modals = list(module.modal_map or {})
        if (modal is not None or modals) and modal not in modals:
            raise ValueError(
                f"modal={modal!r} is not a modality of the model: "
                f"{f'use one of {modals}' if modals else 'remove it, the model has only one'}."
            )
        self._modal = modal
        self._types = torch.tensor([known[z] for z in numbers], device=self.device)
        self._constants: dict[int, dict[str, Tensor]] = {}

    def settings(self) -> dict[str, Any]:
        return {"modal": self._modal}

    @property
    def cutoff(self) -> float:
        return float(self.module.cutoff)

    @property
    def constant_energy(self) -> float:
        return float(self._shifts(self._entries(1)).sum())

    @property
    def branch(self) -> str | None:
        return self._modal

    def shift_energies(self, per_atom_eV: float) -> bool:
        return self.shift_isolated_atoms(dict.fromkeys(self.module.type_map, per_atom_eV))

    @torch.no_grad()
    def shift_isolated_atoms(self, shifts: Mapping[int, float]) -> bool:
        types = self.module.type_map
        constants = self._rescale.shift  # (n_types,), a row for each modality, or one for all elements
        added = torch.zeros(len(types), dtype=constants.dtype, device=constants.device)
        for number, shift in shifts.items():
            added[types[number]] = shift
        if constants.shape[-1] != len(types):
            if not (added == added[0]).all():
                return False
            added = added[:1]
        row = (
            constants if self._modal is None or constants.dim() == 1 else constants[self.module.modal_map[self._modal]]
        )
        row += added
        return True

    def atomic_energies(self, positions: Tensor, edges: Edges) -> Tensor:
        flat = positions.reshape(-1, 3)
        sender, receiver = edges.index
        constants = self._entries(len(positions))
        data = {
            **constants,
            KEY.POS: flat,
            KEY.EDGE_IDX: edges.index,
            KEY.EDGE_VEC: flat[receiver] - flat[sender] + edges.shifts,
        }
        if self._modal is not None:
            # SevenNet's own calculator shares the module and sets this to False.
            self.module.set_is_batch_data(True)
        for part in self.module:
            if isinstance(part, OnehotEmbedding):  # depends on the elements only: among the constants
                continue
            data = part(data)
            if isinstance(part, EdgeEmbedding):
                # SevenNet's cutoff functions rise again beyond the cutoff: its own graphs have no such edge, padded ones do.
                inside = (data[KEY.EDGE_LENGTH] < self.module.cutoff).to(self.dtype)
                data[KEY.EDGE_EMBEDDING] = data[KEY.EDGE_EMBEDDING] * inside[:, None]
            if KEY.ATOMIC_ENERGY in data:  # what follows sums, and differentiates without keeping the graph
                break
        energies = data[KEY.ATOMIC_ENERGY].double() - self._shifts(constants)
        return energies.reshape(positions.shape[:2])

    @property
    def _rescale(self) -> Any:
        """The layer that scales atomic energies and adds those of isolated atoms."""
        return self.module._modules["rescale_atomic_energy"]

    def _shifts(self, entries: dict[str, Tensor]) -> Tensor:
        """Return the isolated-atom energies, which are what remains of an atomic energy without interaction."""
        zeros = torch.zeros(len(entries[KEY.NODE_FEATURE]), 1, dtype=self.dtype, device=self.device)
        shifts: Tensor = self._rescale({**entries, KEY.SCALED_ATOMIC_ENERGY: zeros})[KEY.ATOMIC_ENERGY]
        return shifts.detach().double()

    def _entries(self, n_replicas: int) -> dict[str, Tensor]:
        """Return the part of the graph that does not depend on positions and weights."""
        if n_replicas not in self._constants:
            entries = {KEY.NODE_FEATURE: self._types.repeat(n_replicas)}
            entries[KEY.BATCH] = torch.arange(n_replicas, device=self.device).repeat_interleave(self.system.n_atoms)
            if self._modal is not None:
                index = self.module.modal_map[self._modal]
                entries[KEY.MODAL_TYPE] = torch.full((n_replicas,), index, device=self.device)
            for part in self.module:
                if isinstance(part, OnehotEmbedding):
                    entries = part(entries)
            # One-hot vectors are in single precision whatever the model is in.
            self._constants[n_replicas] = {
                name: entry.to(self.dtype) if entry.is_floating_point() else entry for name, entry in entries.items()
            }
        return self._constants[n_replicas]
