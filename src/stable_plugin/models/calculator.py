"""Any ASE calculator as a potential that can be evaluated, but not trained."""

from __future__ import annotations

from math import inf

import numpy as np
import torch
from ase.calculators.calculator import Calculator
from torch import Tensor, nn

from stable_plugin.md.cells import each_cell
from stable_plugin.md.neighbors import Edges
from stable_plugin.md.system import System
from stable_plugin.models.base import Potential


class CalculatorPotential(Potential):
    """An ASE calculator applied to replicas of one system, one after the other, in double precision on the CPU.

    It has no parameters: :class:`~stable_plugin.evaluation.Evaluator` simulates with it, StABlE training cannot.

    Args:
        calculator: Calculator with energies and forces, in ASE's units.
        system: What is simulated.

    Example:
        >>> from ase.build import bulk
        >>> from ase.calculators.emt import EMT
        >>> from stable_plugin import System
        >>> from stable_plugin.models import find_potential
        >>> find_potential(EMT(), System.from_atoms(bulk("Cu", cubic=True)))
        CalculatorPotential(EMT, Cu4)
    """

    sees_cells = True
    uncompilable = "ASE calculators"

    def __init__(self, calculator: Calculator, system: System) -> None:
        super().__init__(Placeholder(), system)
        self.calculator = calculator

    def of_system(self, system: System) -> Potential:
        return type(self)(self.calculator, system)

    def __repr__(self) -> str:
        formula = self.system.atoms(torch.zeros(self.system.n_atoms, 3)).get_chemical_formula()
        return f"{type(self).__name__}({type(self.calculator).__name__}, {formula})"

    @property
    def cutoff(self) -> float:
        return inf

    def atomic_energies(self, positions: Tensor, edges: Edges) -> Tensor:
        raise TypeError(
            f"{type(self.calculator).__name__} is an ASE calculator, which has no weights to train: evaluate it, or train a "
            "torch model."
        )

    def energies(self, positions: Tensor, edges: Edges) -> Tensor:
        return self.energies_and_forces(positions, edges)[0]

    def energies_and_forces(self, positions: Tensor, edges: Edges) -> tuple[Tensor, Tensor]:
        energies, forces = [], []
        for frame, cell in zip(positions, each_cell(edges.cell, len(positions)), strict=True):
            atoms = self.system.atoms(frame, cell=cell)
            atoms.set_constraint()  # forces as the calculator has them
            atoms.calc = self.calculator
            forces.append(torch.from_numpy(np.array(atoms.get_forces())))
            energies.append(atoms.get_potential_energy())
        return torch.tensor(energies, dtype=torch.float64), torch.stack(forces).to(positions)

    @torch.enable_grad()  # for calculators that differentiate by torch
    def strain_derivative(
        self,
        positions: Tensor,
        cell: Tensor | None = None,
        *,
        moved: Tensor | None = None,
        create_graph: bool = False,
    ) -> Tensor:
        derivatives = []
        for index, frame in enumerate(positions):
            atoms = self.system.atoms(frame, cell=None if cell is None else cell[index])
            atoms.calc = self.calculator
            derivative = atoms.get_volume() * torch.from_numpy(atoms.get_stress(voigt=False, apply_constraint=False))
            if moved is not None:
                # What moves by another vector than its own position leaves out that part of the work of the forces.
                forces = torch.from_numpy(atoms.get_forces(apply_constraint=False))
                own = forces.T @ (frame - moved[index]).to(forces)
                derivative = derivative + 0.5 * (own + own.T)
            derivatives.append(derivative)
        return torch.stack(derivatives).to(positions)


class Placeholder(nn.Module):
    """Stands for a model that is no torch module or has no parameters, with its device and precision.

    Args:
        dtype: Precision.
        device: Device.
    """

    def __init__(self, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros((), dtype=dtype, device=device), requires_grad=False)
