"""Stress and pressure at the volume of the cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from ase import units
from torch import Tensor

from stable_plugin.md.centers import MolecularCenters
from stable_plugin.md.system import System
from stable_plugin.observables.potential import PotentialObservable
from stable_plugin.runtime import checks
from stable_plugin.units import BOLTZMANN

VOIGT = ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))
"""Rows and columns of a stress in the order of ASE."""


class _Virial(PotentialObservable):
    """Base class of observables of the stress; arguments as of :class:`Pressure`."""

    def __init__(self, target: list[float], molecular: bool, **kwargs: Any) -> None:
        self.molecular = molecular
        super().__init__(target, **kwargs)

    def bind(self, system: System, reference: Tensor, cell: Tensor | None = None) -> None:
        name = type(self).__name__
        system.require_periodic(f"{name} needs a volume", f"set cell and pbc of the frames, or leave {name} out")
        super().bind(system, reference, cell)
        self._centers = MolecularCenters(system) if self.molecular else None

    def stresses(self, positions: Tensor, cell: Tensor | None) -> Tensor:
        """Return the stress of frames with its kinetic part, (n_frames, 3, 3) in GPa, positive under tension."""
        moved = None if self._centers is None else self._centers(positions, cell)
        derivative = self.potential.strain_derivative(
            positions, cell, moved=moved, create_graph=torch.is_grad_enabled()
        ).double()
        n_moving = self.system.n_atoms if self._centers is None else self._centers.number
        kinetic = n_moving * BOLTZMANN * self._temperature_K * torch.eye(3).to(derivative)
        volume = self.system.volume(cell).to(derivative).reshape(-1, 1, 1)
        return (derivative - kinetic) / volume / units.GPa


class Pressure(_Virial):
    r"""Pressure at the volume of the cell, in GPa.

    .. math:: P = \frac{1}{3V} \left( 3 N k_B T - \mathrm{tr} \frac{\partial U}{\partial \varepsilon} \right)

    N is the number of molecules, which the strain ε moves as a whole, or that of atoms. Both have the same mean in
    equilibrium; stiff bonds make the pressure of atoms vary more from frame to frame. The kinetic part has
    its mean at the temperature of the thermostat.

    A target of 1 bar in a cell of the measured density corrects the density without simulating at constant pressure.

    Source: Hummer, Grønbech-Jensen and Neumann, J. Chem. Phys. 109, 2791 (1998), for molecules and atoms.

    Input of ``update``: ``positions``, (n_frames, n_atoms, 3) in Å, wrapped or not.

    Output of ``compute``: (1,) in GPa.

    Args:
        target_GPa: Pressure to reproduce in GPa; 1 bar is 1e-4.
        molecular: Whether the strain moves molecules as a whole. They must be shorter than half the smallest height of
            the cell. An atom without bonds, or of a framework, is moved by itself.
        kwargs: ``scale`` in GPa, and arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If an argument is not a number.

    Example:
        >>> import torch
        >>> from ase.build import bulk
        >>> from ase.calculators.emt import EMT
        >>> from stable_plugin import Pressure, System
        >>> from stable_plugin.models import find_potential
        >>> copper = bulk("Cu", a=3.5, cubic=True)  # compressed from 3.59 Å
        >>> positions = torch.tensor(copper.positions)[None]
        >>> pressure = Pressure(target_GPa=1e-4)
        >>> pressure.bind(System.from_atoms(copper), positions)
        >>> pressure.attach(find_potential(EMT(), pressure.system), temperature_K=300.0)
        >>> round(pressure.per_frame(positions).item(), 1)
        12.3
    """

    def __init__(self, target_GPa: float, molecular: bool = True, **kwargs: Any) -> None:
        self.target_GPa = checks.number("target_GPa", target_GPa)
        super().__init__([self.target_GPa], molecular, **kwargs)

    def of_frames(self, positions: Tensor, cell: Tensor | None = None) -> Tensor:
        return -self.stresses(positions, cell).diagonal(dim1=1, dim2=2).mean(dim=1, keepdim=True)

    def axis(self) -> dict[str, Any]:
        return {"kind": "bars", "x": ["P"], "xlabel": "", "ylabel": "pressure / GPa"}


class Stress(_Virial):
    r"""Stress at the shape and volume of the cell, in GPa, as ASE defines it: positive under tension.

    .. math:: \sigma_{ij} = \frac{1}{V} \left( \frac{\partial U}{\partial \varepsilon_{ij}} - N k_B T \, \delta_{ij} \right)

    Elastic constants are trained at fixed strain: a cell that is strained by ε has the stress C ε as its target. Cells with
    different strains are systems of one training. Further remarks at :class:`Pressure`.

    Input of ``update``: ``positions``, (n_frames, n_atoms, 3) in Å, wrapped or not.

    Output of ``compute``: (6,) in GPa: xx, yy, zz, yz, xz, xy.

    Args:
        target_GPa: Stress to reproduce in GPa: six numbers in the order above.
        molecular: Whether the strain moves molecules as a whole, as for :class:`Pressure`.
        kwargs: ``scale`` in GPa, and arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If an argument is not a number, or the target has not six of them.

    Example:
        >>> import torch
        >>> from ase.build import bulk
        >>> from ase.calculators.emt import EMT
        >>> from stable_plugin import Stress, System
        >>> from stable_plugin.models import find_potential
        >>> copper = bulk("Cu", a=3.59, cubic=True)
        >>> copper.set_cell(copper.cell * [1.01, 1, 1], scale_atoms=True)
        >>> positions = torch.tensor(copper.positions)[None]
        >>> stress = Stress(target_GPa=[1.7, 1.2, 1.2, 0, 0, 0])  # 1 % of the elastic constants of copper
        >>> stress.bind(System.from_atoms(copper), positions)
        >>> stress.attach(find_potential(EMT(), stress.system), temperature_K=1.0)
        >>> [round(value, 1) for value in stress.per_frame(positions)[0, :2].tolist()]
        [1.7, 1.1]
    """

    def __init__(self, target_GPa: Sequence[float], molecular: bool = True, **kwargs: Any) -> None:
        if not isinstance(target_GPa, Sequence) or isinstance(target_GPa, str) or len(target_GPa) != len(VOIGT):
            raise ValueError(f"target_GPa={target_GPa!r} must be six numbers in GPa: xx, yy, zz, yz, xz, xy.")
        self.target_GPa = [checks.number("target_GPa", each) for each in target_GPa]
        super().__init__(self.target_GPa, molecular, **kwargs)

    def of_frames(self, positions: Tensor, cell: Tensor | None = None) -> Tensor:
        rows, columns = zip(*VOIGT, strict=True)
        return self.stresses(positions, cell)[:, rows, columns]

    def axis(self) -> dict[str, Any]:
        return {"kind": "bars", "x": ["xx", "yy", "zz", "yz", "xz", "xy"], "xlabel": "", "ylabel": "stress / GPa"}
