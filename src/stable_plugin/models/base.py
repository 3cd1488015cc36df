"""The interface between models and the rest: energies and forces of replicas of one system."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import isinf
from pathlib import Path
from typing import Any

import torch
from ase import Atoms
from torch import Tensor, nn

from stable_plugin.md.derivatives import differentiated
from stable_plugin.md.neighbors import Edges, edges_within
from stable_plugin.md.strain import strain_derivative
from stable_plugin.md.system import System
from stable_plugin.runtime.atomic_files import atomic_write


class Potential(ABC):
    """A model applied to replicas of one system.

    Energies are interaction energies: constants of the composition (isolated-atom energies) are left out. They cancel in
    forces and in the estimator, and in single precision they would drown the differences that matter.

    A subclass defines :attr:`cutoff` and :meth:`atomic_energies`. Inherit
    :class:`stable_plugin.testing.PotentialConformance` to test it.

    Args:
        module: The model. It is not copied: weights that are changed in place elsewhere take effect at once.
        system: What is simulated.

    Attributes:
        module: The model.
        device: Device of the model.
        dtype: Precision of the model.
        system: What is simulated, on that device and in that precision.
    """

    sees_cells = False
    """Whether a model that builds its own graph does so in ``edges.cell``, the cell of each replica."""

    uncompilable = ""
    """Which models torch.compile cannot trace, and why; empty if it can trace them."""

    def __init__(self, module: nn.Module, system: System) -> None:
        self.module = module
        parameter = next(module.parameters())
        self.device = parameter.device
        self.dtype = parameter.dtype
        self.system = system.to(self.device, self.dtype)

    def __repr__(self) -> str:
        formula = Atoms(list(self.system.symbols)).get_chemical_formula()
        arguments = "".join(f", {name}={value!r}" for name, value in self.settings().items())
        return f"{type(self).__name__}({type(self.module).__name__}, {formula}{arguments})"

    def settings(self) -> dict[str, Any]:
        """Return the arguments besides module and system, for ``repr`` and :meth:`of_system`."""
        return {}

    def of_system(self, system: System) -> Potential:
        """Return a potential of the same model for another system.

        Args:
            system: What is simulated with it.
        """
        return type(self)(self.module, system, **self.settings())

    @property
    def constant_energy(self) -> float:
        """Total energy of the model minus the interaction energy of one replica, in eV."""
        return 0.0

    @property
    def branch(self) -> str | None:
        """Name of the head or modality whose constant :meth:`shift_energies` changes; None if all systems share one."""
        return None

    def shift_energies(self, per_atom_eV: float) -> bool:
        """Add a constant to the energy of every atom, which changes no force, where the model keeps such a constant.

        Args:
            per_atom_eV: The constant in eV.

        Returns:
            Whether the model has been changed.
        """
        return False

    def shift_isolated_atoms(self, shifts: Mapping[int, float]) -> bool:
        """Add constants to the energies of isolated atoms, which changes no force, where the model keeps them.

        Args:
            shifts: Constants in eV by atomic number.

        Returns:
            Whether the model has been changed.
        """
        return False

    @property
    @abstractmethod
    def cutoff(self) -> float:
        """Longest edge in Å; ``inf`` for a model that takes no edges."""

    def edges(self, positions: Tensor, cell: Tensor | None = None) -> Edges:
        """Return the exact neighbor graph.

        Args:
            positions: (n_replicas, n_atoms, 3) in Å.
            cell: Cell of each replica, (n_replicas, 3, 3) in Å; that of the system if None.

        Raises:
            ValueError: If cells are passed for a periodic model that takes no edges, and so would not see them.
        """
        if cell is not None and self.system.periodic and isinf(self.cutoff) and not self.sees_cells:
            raise ValueError(
                f"{type(self.module).__name__} builds its own neighbor graph, or none, and would not see that the cells of "
                "the replicas differ: pass frames with the same cell."
            )
        return edges_within(positions, self.cutoff, self.system, cell)

    @abstractmethod
    def atomic_energies(self, positions: Tensor, edges: Edges) -> Tensor:
        """Return the energy of each atom, differentiable in the positions and in the parameters of the model.

        Args:
            positions: (n_replicas, n_atoms, 3) in Å.
            edges: Neighbor graph of these replicas. Edges longer than the cutoff must contribute exactly zero.

        Returns:
            (n_replicas, n_atoms) in eV.
        """

    def energies(self, positions: Tensor, edges: Edges) -> Tensor:
        """Return the energy of each replica, (n_replicas,) in eV; arguments as in :meth:`atomic_energies`."""
        return self.atomic_energies(positions, edges).sum(dim=1)

    def compilable(self) -> Potential:
        """Return a potential on the same parameters and buffers whose :meth:`energies` torch.compile can trace.

        Raises:
            ValueError: If there is no such potential.
        """
        if self.uncompilable:
            raise ValueError(f"compile=True is not available for {self.uncompilable}. Set compile=False.")
        return self

    def energies_and_forces(self, positions: Tensor, edges: Edges) -> tuple[Tensor, Tensor]:
        """Return energies and forces, without gradients for the parameters.

        Args:
            positions: (n_replicas, n_atoms, 3) in Å.
            edges: Neighbor graph of these replicas.

        Returns:
            Energies (n_replicas,) in eV, and forces (n_replicas, n_atoms, 3) in eV/Å.
        """
        return differentiated(self.energies, positions, edges)

    def strain_derivative(
        self,
        positions: Tensor,
        cell: Tensor | None = None,
        *,
        moved: Tensor | None = None,
        create_graph: bool = False,
    ) -> Tensor:
        """Return the derivative of the energy with respect to a homogeneous strain, (n_replicas, 3, 3) in eV.

        Divided by the volume, it is the stress as ASE defines it: positive under tension, without its kinetic part.

        Args:
            positions: (n_replicas, n_atoms, 3) in Å.
            cell: Cell of each replica, (n_replicas, 3, 3) in Å; that of the system if None.
            moved: What the strain multiplies in the place of positions, see
                :func:`~stable_plugin.md.strain.strain_derivative`.
            create_graph: Whether the derivative is to be differentiated for the parameters.

        Raises:
            ValueError: If the model is periodic, and takes neither edges nor cells.
        """
        edges = self.edges_to_strain(positions, cell)
        return strain_derivative(self.energies, positions, edges, moved=moved, create_graph=create_graph)

    def edges_to_strain(self, positions: Tensor, cell: Tensor | None = None) -> Edges:
        """Return the neighbor graph with all that a strain changes, for :func:`~stable_plugin.md.strain.strained`.

        Args:
            positions: (n_replicas, n_atoms, 3) in Å.
            cell: Cell of each replica, (n_replicas, 3, 3) in Å; that of the system if None.

        Raises:
            ValueError: If the model is periodic, and takes neither edges nor cells.
        """
        if self.system.periodic and isinf(self.cutoff) and not self.sees_cells:
            raise ValueError(
                f"{type(self.module).__name__} takes neither edges nor cells, and would not see a strain: use a model that does "
                "for stresses and pressures."
            )
        if cell is None and self.system.periodic and isinf(self.cutoff):
            # A model that builds its own graph sees the strain in the cell.
            cell = self.system.cell.to(positions).expand(len(positions), 3, 3)
        return self.edges(positions, cell)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Switch to evaluation mode, without dropout; restore the mode of every submodule afterwards."""
        modes = {module: module.training for module in self.module.modules()}
        self.module.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Switch to evaluation mode without parameter gradients; restore both afterwards."""
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
        """Do as :meth:`frozen`, and prepare whatever makes many calls under the same weights cheaper."""
        with self.frozen():
            yield

    @property
    def simulated_module(self) -> nn.Module:
        """The module whose weights are read while :meth:`simulating`."""
        return self.module

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that require a gradient, in the order of the model."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set torch's default dtype, in which families build their models and graphs; restore it afterwards.

    Args:
        dtype: The precision to build in.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def save_new(content: Any, path: str | Path) -> None:
    """Write a new file with ``torch.save``, which appears complete or not at all.

    Args:
        content: What to save.
        path: A path that does not exist yet.

    Raises:
        FileExistsError: If there is a file already.
        OSError: If the file cannot be written; names the path and the remedy.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists and is not overwritten: choose another path or remove it.")
    with atomic_write(path, "model") as partial:
        torch.save(content, partial)
