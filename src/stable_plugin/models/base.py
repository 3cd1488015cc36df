"""What moves the atoms: the one protocol that the simulator and the estimator know."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stable_plugin.md.neighbors import Edges, edges_within
from stable_plugin.md.system import System
from stable_plugin.runtime.atomic_files import atomic_write


class Potential(ABC):
    """A model applied to replicas of one system.

    Energies are interaction energies: constants of the composition (isolated-atom energies) are left out. They
    cancel in forces and in the estimator, and in single precision they would drown what matters.

    Args:
        module: The model. It stays the caller's: weights changed elsewhere are seen at once.
        system: What is simulated.
    """

    def __init__(self, module: nn.Module, system: System) -> None:
        self.module = module
        parameter = next(module.parameters())
        self.device = parameter.device
        self.dtype = parameter.dtype
        self.system = system.to(self.device, self.dtype)

    @property
    def constant_energy(self) -> float:
        """What the interaction energy of one replica lacks to the model's total energy, in eV."""
        return 0.0

    @property
    @abstractmethod
    def cutoff(self) -> float:
        """Distance in Å beyond which two atoms share no edge; ``inf`` for a model that needs no edges."""

    def edges(self, positions: Tensor) -> Edges:
        """The exact neighbour graph of any positions, (n_replicas, n_atoms, 3) in Å."""
        return edges_within(positions, self.cutoff, self.system)

    @abstractmethod
    def atomic_energies(self, positions: Tensor, edges: Edges) -> Tensor:
        """Energies per atom, differentiable in the positions and in the model's parameters.

        Args:
            positions: (n_replicas, n_atoms, 3) in Å.
            edges: Neighbour graph of these replicas.

        Returns:
            (n_replicas, n_atoms) in eV.
        """

    def energies(self, positions: Tensor, edges: Edges) -> Tensor:
        """Energies per replica, (n_replicas,) in eV; arguments as in :meth:`atomic_energies`."""
        return self.atomic_energies(positions, edges).sum(dim=1)

    def compilable(self) -> Potential:
        """A potential with the same weights, the same tensors, whose :meth:`energies` torch.compile can follow.

        Raises:
            ValueError: If there is none.
        """
        return self

    def energies_and_forces(self, positions: Tensor, edges: Edges) -> tuple[Tensor, Tensor]:
        """Energies and forces, without gradients for the parameters.

        Args:
            positions: (n_replicas, n_atoms, 3) in Å.
            edges: Neighbour graph of these replicas.

        Returns:
            Energies (n_replicas,) in eV, and forces (n_replicas, n_atoms, 3) in eV/Å.
        """
        return differentiated(self.energies, positions, edges)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode, as it is simulated: no dropout; put back as it was."""
        modes = {module: module.training for module in self.module.modules()}
        self.module.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Evaluation mode without parameter gradients; both are put back as they were."""
        trainable = self.trainable_parameters()
        with self.evaluating():
            for parameter in trainable:
                parameter.requires_grad_(False)
            try:
                yield
            finally:
                for parameter in trainable:
                    parameter.requires_grad_(True)

    @contextmanager
    def simulating(self) -> Iterator[None]:
        """:meth:`frozen`, with whatever makes many calls under the same weights cheaper."""
        with self.frozen():
            yield

    @property
    def simulated_module(self) -> nn.Module:
        """The module whose weights are read while :meth:`simulating`."""
        return self.module

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters that a gradient is wanted for, in the model's order."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]


def differentiated(
    energies: Callable[[Tensor, Edges], Tensor], positions: Tensor, edges: Edges
) -> tuple[Tensor, Tensor]:
    """Energies (n_replicas,) of a function of positions and edges, and minus their gradient (n_replicas, n_atoms, 3)."""
    with torch.enable_grad():
        positions = positions.detach().requires_grad_(True)
        values = energies(positions, edges)
        (gradient,) = torch.autograd.grad(values.sum(), positions)
    return values.detach(), -gradient


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set torch's default dtype, which model families build their models and graphs in, and put it back."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def save_new(content: Any, path: str | Path) -> None:
    """Write a file with ``torch.save`` that appears whole or not at all.

    Raises:
        FileExistsError: If there is a file already.
        OSError: If it cannot be written; names the path and the way out.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists and is not overwritten: choose another path or remove it.")
    with atomic_write(path, "model") as partial:
        torch.save(content, partial)
