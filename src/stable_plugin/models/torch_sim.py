"""Any model of torch-sim as a potential that can be evaluated, but not trained."""

from __future__ import annotations

from math import inf
from typing import Any

import torch
from torch import Tensor

from stable_plugin.md.neighbors import Edges
from stable_plugin.md.system import System
from stable_plugin.models.base import Potential
from stable_plugin.models.calculator import Placeholder


def is_torch_sim_model(module: Any) -> bool:
    """Return whether a module is a ``torch_sim.models.interface.ModelInterface``; torch-sim is not imported."""
    return any(
        base.__name__ == "ModelInterface" and base.__module__.partition(".")[0] == "torch_sim"
        for base in type(module).__mro__
    )


class TorchSimPotential(Potential):
    """A torch-sim model applied to all replicas at once, with the neighbor list and the precision of that model.

    It is evaluated as it is, with the forces that the model returns: :class:`~stable_plugin.evaluation.Evaluator` simulates
    with it. To train, pass the model of a known family that is inside.

    Args:
        model: A ``torch_sim.models.interface.ModelInterface``.
        system: What is simulated.

    Raises:
        ValueError: If the model computes no forces.
    """

    # Any: nn.Module does not declare the attributes of torch-sim's models.
    module: Any
    sees_cells = True
    uncompilable = "torch-sim models"

    def __init__(self, model: Any, system: System) -> None:
        super().__init__(Placeholder(model.dtype, model.device), system)
        self.module = model
        if not self.module.compute_forces:
            raise ValueError(
                f"{type(model).__name__} has compute_forces=False, but simulations need forces: set compute_forces=True."
            )
        self._states: dict[int, Any] = {}

    @property
    def cutoff(self) -> float:
        return inf

    def atomic_energies(self, positions: Tensor, edges: Edges) -> Tensor:
        raise TypeError(
            f"{type(self.module).__name__} is a torch-sim model, which is evaluated as it is: to train, pass the model of "
            "MACE, fairchem or another family that it contains."
        )

    def energies(self, positions: Tensor, edges: Edges) -> Tensor:
        return self.energies_and_forces(positions, edges)[0]

    def energies_and_forces(self, positions: Tensor, edges: Edges) -> tuple[Tensor, Tensor]:
        state = self._state(len(positions))
        state.positions = positions.detach().reshape(-1, 3).clone()
        if edges.cell is not None:
            state.cell = edges.cell.to(state.cell).mT.contiguous()  # torch-sim's cell vectors are columns
        output = self.module(state)
        return output["energy"].detach(), output["forces"].detach().reshape(positions.shape)

    def _state(self, n_replicas: int) -> Any:
        """Return the state of torch-sim for so many replicas, whose positions are replaced."""
        if n_replicas not in self._states:
            from torch_sim.io import atoms_to_state

            atoms = self.system.atoms(torch.zeros(self.system.n_atoms, 3))
            self._states[n_replicas] = atoms_to_state([atoms] * n_replicas, self.device, self.dtype)
        return self._states[n_replicas].clone()
