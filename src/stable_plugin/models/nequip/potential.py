"""NequIP models applied to replicas of one system."""

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
    from nequip.data import AtomicDataDict as KEY
except ImportError as error:
    raise not_installed("nequip", "NequIP", "nequip") from error


class NequIPPotential(Potential):
    """A NequIP or Allegro model applied to replicas of one system.

    Positions and energies are in double precision, as in NequIP itself, whatever the precision of the network.

    Source of the model: Batzner et al., Nat. Commun. 13, 2453 (2022), arXiv:2101.03164.

    Args:
        module: A ``GraphModel`` in eV and Å.
        system: What is simulated.
        types: Name of the model's atom type of each chemical symbol, where they differ.

    Raises:
        ValueError: If the model does not know an element of the system, or takes inputs that the system does not have.
    """

    # Any: nn.Module does not declare the attributes of a NequIP model.
    module: Any
    uncompilable = "NequIP models, which e3nn compiles"

    def __init__(self, module: Any, system: System, types: Mapping[str, str] | None = None) -> None:
        super().__init__(module, system)
        self.dtype = torch.float64
        self.system = system.to(self.device, self.dtype)
        self._names = dict(types or {})
        known = list(module.type_names)
        wanted = [self._names.get(symbol, symbol) for symbol in system.symbols]
        unknown = sorted(set(wanted) - set(known))
        if unknown:
            raise ValueError(
                f"the model does not know the atom type(s) {', '.join(unknown)} (it knows {', '.join(known)}): train it on "
                "frames that contain them, or pass potential=, a function that returns a NequIPPotential with types=, if "
                "the model's types are not named after elements."
            )
        self._types = torch.tensor([known.index(name) for name in wanted], device=self.device)
        self._electrons = self._electronic_inputs()
        # ForceStressOutput, without which only energies are computed.
        self._energy_model = getattr(module.model, "func", module.model)

    def settings(self) -> dict[str, Any]:
        return {"types": self._names} if self._names else {}

    @property
    def cutoff(self) -> float:
        return float(self.module.metadata["r_max"])

    @property
    def constant_energy(self) -> float:
        return float(self._shifts().detach().sum())

    def atomic_energies(self, positions: Tensor, edges: Edges) -> Tensor:
        n_replicas, n_atoms, _ = positions.shape
        flat = positions.reshape(-1, 3)
        sender, receiver = edges.index
        replicas = torch.arange(n_replicas, device=self.device)
        output = self._energy_model(
            {
                KEY.POSITIONS_KEY: flat,
                KEY.EDGE_INDEX_KEY: edges.index,
                KEY.EDGE_VECTORS_KEY: flat[receiver] - flat[sender] + edges.shifts,
                KEY.ATOM_TYPE_KEY: self._types.repeat(n_replicas),
                KEY.BATCH_KEY: replicas.repeat_interleave(n_atoms),
                KEY.NUM_NODES_KEY: torch.full((n_replicas,), n_atoms, device=self.device),
                **{
                    key: torch.full((n_replicas, 1), number, device=self.device)
                    for key, number in self._electrons.items()
                },
            }
        )
        energies: Tensor = output[KEY.PER_ATOM_ENERGY_KEY].double().reshape(n_replicas, n_atoms)
        return energies - self._shifts()

    def _shifts(self) -> Tensor:
        """Return the energies of isolated atoms, (n_atoms,)."""
        shifts = torch.zeros(self.system.n_atoms, dtype=torch.float64, device=self.device)
        for part in self.module.modules():
            if getattr(part, "has_shifts", False):
                by_type = part.shifts.reshape(-1)
                shifts = shifts + (by_type if len(by_type) == 1 else by_type[self._types])
        return shifts

    def _electronic_inputs(self) -> dict[str, int]:
        """Return charge and spin for a model that takes them."""
        numbers = {}
        for key, number in ((KEY.TOTAL_CHARGE_KEY, self.system.charge), (KEY.TOTAL_SPIN_KEY, self.system.spin)):
            if key in self.module.model_input_fields:
                if number is None:
                    raise ValueError(f"the model takes the {key} of a structure: set atoms.info[{key!r}].")
                numbers[key] = number
        return numbers
