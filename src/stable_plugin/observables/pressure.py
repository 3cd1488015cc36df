"""Observables that are functions of the potential as well as of the positions: the pressure."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from ase import units
from torch import Tensor

from stable_plugin.md.centers import MolecularCenters
from stable_plugin.md.system import System
from stable_plugin.observables.base import Observable
from stable_plugin.runtime import checks
from stable_plugin.units import BOLTZMANN

if TYPE_CHECKING:
    from stable_plugin.models.base import Potential


class PotentialObservable(Observable):
    r"""Base class of ensemble averages of a function g of the positions and of the potential's parameters θ.

    Their mean responds to the parameters in two ways, and the Boltzmann estimator follows both:

    .. math:: \nabla_\theta \langle g \rangle = \langle \nabla_\theta g \rangle - \beta \, \mathrm{Cov}(g, \nabla_\theta U)

    Subclasses implement :meth:`of_frames`. Targets must be given: frames alone have no value.

    Source: Thaler and Zavadlav, Nat. Commun. 12, 6884 (2021).

    Args:
        target: Mean that the potential should reproduce, (n_values,).
        kwargs: ``scale``, and arguments of :class:`torchmetrics.Metric`.
    """

    def __init__(self, target: list[float], **kwargs: Any) -> None:
        super().__init__(target, **kwargs)
        self._potential: Potential | None = None
        self._temperature_K = 0.0
        self._chunk = 1

    def bind(self, system: System, reference: Tensor, cell: Tensor | None = None) -> None:
        assert self._given_target is not None
        self._system = system
        self._set_target(self._given_target.to(reference.device))

    def attach(self, potential: Potential, temperature_K: float, chunk: int = 32) -> None:
        """Set the potential that the observable is a function of.

        Args:
            potential: The potential; its present weights count at each call.
            temperature_K: Temperature of the simulation in K.
            chunk: Frames per model call; bounds the memory.
        """
        self._potential, self._temperature_K, self._chunk = potential, temperature_K, chunk

    @property
    def potential(self) -> Potential:
        """Potential passed to :meth:`attach`.

        Raises:
            RuntimeError: If there is none yet.
        """
        if self._potential is None:
            raise RuntimeError(
                f"{type(self).__name__} has no potential yet: call attach(potential, temperature_K) after bind()."
            )
        return self._potential

    @torch.no_grad()
    def per_frame(self, positions: Tensor, cell: Tensor | None = None) -> Tensor:
        # As energies are: in evaluation mode, also within a training step.
        with self.potential.frozen():
            parts = [
                self.of_frames(
                    positions[first : first + self._chunk], None if cell is None else cell[first : first + self._chunk]
                )
                for first in range(0, len(positions), self._chunk)
            ]
        return torch.cat(parts) if parts else positions.new_empty(0, len(self.known_target))

    @abstractmethod
    def of_frames(self, positions: Tensor, cell: Tensor | None = None) -> Tensor:
        """Return the observable of frames under the present parameters, (n_frames, n_values).

        Values are differentiable in the parameters where gradients are enabled.

        Args:
            positions: As many frames as memory allows in one call, (n_frames, n_atoms, 3) in Å.
            cell: Cells of the frames, (n_frames, 3, 3) in Å; that of the system if None.
        """


class Pressure(PotentialObservable):
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
        self.molecular = molecular
        super().__init__([self.target_GPa], **kwargs)

    def bind(self, system: System, reference: Tensor, cell: Tensor | None = None) -> None:
        system.require_periodic(
            f"{type(self).__name__} needs a volume", "set cell and pbc of the frames, or leave Pressure out"
        )
        super().bind(system, reference, cell)
        self._centers = MolecularCenters(system) if self.molecular else None

    def of_frames(self, positions: Tensor, cell: Tensor | None = None) -> Tensor:
        moved = None if self._centers is None else self._centers(positions, cell)
        derivative = self.potential.strain_derivative(
            positions, cell, moved=moved, create_graph=torch.is_grad_enabled()
        )
        n_moving = self.system.n_atoms if self._centers is None else self._centers.number
        kinetic = 3.0 * n_moving * BOLTZMANN * self._temperature_K
        trace = derivative.diagonal(dim1=1, dim2=2).sum(dim=1).double()
        return ((kinetic - trace) / (3.0 * self.system.volume(cell)) / units.GPa)[:, None]

    def axis(self) -> dict[str, Any]:
        return {"kind": "bars", "x": ["P"], "xlabel": "", "ylabel": "pressure / GPa"}
