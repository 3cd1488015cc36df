"""Detectors based on velocities, and on numbers that are not finite."""

from __future__ import annotations

import torch
from torch import Tensor

from stable_plugin.detectors.base import Detector
from stable_plugin.md.state import kinetic_temperature
from stable_plugin.md.system import System
from stable_plugin.runtime import checks


class RunawayTemperature(Detector):
    r"""Kinetic temperature of a replica, in K.

    .. math:: v = \frac{1}{N_f k_\mathrm{B}} \sum_{i=1}^{N} m_i |\mathbf{v}_i|^2

    The number of degrees of freedom :math:`N_f` is 3 for each atom that moves, less 3 where the integrator keeps the
    momentum of the center of mass zero. The temperature of N atoms at T fluctuates with a standard deviation of :math:`T \sqrt{2 / 3N}` (canonical
    ensemble), so choose a threshold several of these above T. There is no default, because it depends on T.

    Args:
        threshold: In K.
        discard: In K; no limit if None.

    Example:
        >>> import torch
        >>> from ase.build import molecule
        >>> from ase.units import kB
        >>> from stable_plugin import RunawayTemperature, System
        >>> water = molecule("H2O")
        >>> system = System.from_atoms(water)
        >>> positions = torch.tensor(water.positions)[None]
        >>> detector = RunawayTemperature(threshold=1000.0)
        >>> detector.bind(system, reference=positions)
        >>> speed = (kB * 1500.0 / system.masses).sqrt()  # along each axis, at 1500 K
        >>> velocities = speed[None, :, None].expand_as(positions)
        >>> [round(value) for value in detector.measure(positions, velocities).tolist()]
        [1500]
    """

    unit = "K"

    def __init__(self, threshold: float, discard: float | None = None) -> None:
        checks.number("threshold", threshold, above=0)
        super().__init__(threshold, discard)
        self._masses: Tensor | None = None
        self._degrees_of_freedom: int | None = None

    def bind(self, system: System, reference: Tensor, cell: Tensor | None = None) -> None:
        self._masses, self._degrees_of_freedom = system.masses, 3 * system.n_moving

    def set_degrees_of_freedom(self, number: int) -> None:
        self._degrees_of_freedom = number

    def measure(self, positions: Tensor, velocities: Tensor, cell: Tensor | None = None) -> Tensor:
        if self._masses is None:
            raise RuntimeError("RunawayTemperature has no masses yet: call bind(system, reference) first.")
        return kinetic_temperature(velocities, self._masses.to(velocities), self._degrees_of_freedom)

    def offending_atoms(
        self, positions: Tensor, velocities: Tensor, cell: Tensor | None = None
    ) -> list[tuple[int, ...]]:
        """Return the atom with the largest kinetic energy."""
        assert self._masses is not None
        energies = self._masses.to(velocities) * velocities.square().sum(dim=-1)
        return [(int(atom),) for atom in torch.nan_to_num(energies, nan=torch.inf).argmax(dim=-1)]


class NonFinite(Detector):
    """1 if a position or velocity of the replica is not finite, and 0 otherwise.

    The simulator stops such replicas with every detector; use this one if nothing else is to be detected.

    Example:
        >>> import torch
        >>> from stable_plugin import NonFinite
        >>> positions = torch.tensor([[[0.0, 0.0, 0.0]], [[0.0, torch.nan, 0.0]]])
        >>> NonFinite().measure(positions, torch.zeros_like(positions)).tolist()
        [0.0, 1.0]
    """

    def __init__(self) -> None:
        super().__init__(threshold=0.5, discard=0.5)

    def measure(self, positions: Tensor, velocities: Tensor, cell: Tensor | None = None) -> Tensor:
        return (~torch.isfinite(positions + velocities).flatten(1).all(dim=1)).to(positions.dtype)
