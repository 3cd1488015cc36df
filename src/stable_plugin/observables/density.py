"""Mass density, of simulations at constant pressure."""

from __future__ import annotations

from typing import Any

from ase import units
from torch import Tensor

from stable_plugin.md.system import System
from stable_plugin.observables.base import Observable
from stable_plugin.runtime import checks

G_PER_CM3 = 1e-3 * units.kg / (1e-2 * units.m) ** 3
"""In u/Å³."""


class Density(Observable):
    r"""Mass density, in g/cm³.

    .. math:: \rho = \frac{\sum_i m_i}{V}

    It is the same in all frames at constant volume; see :class:`~stable_plugin.MonteCarloBarostat` and
    :class:`~stable_plugin.Pressure`.

    Input of ``update``: ``positions``, (n_frames, n_atoms, 3) in Å, with the cells of the frames.

    Output of ``compute``: (1,) in g/cm³.

    Args:
        target_g_per_cm3: Density to reproduce in g/cm³; that of the reference frames if None.
        kwargs: ``scale`` in g/cm³, and arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import torch
        >>> from ase.build import bulk
        >>> from stable_plugin import Density, System
        >>> copper = bulk("Cu", cubic=True)
        >>> density = Density(target_g_per_cm3=8.96)
        >>> density.bind(System.from_atoms(copper), reference=torch.tensor(copper.positions)[None])
        >>> density.update(torch.tensor(copper.positions)[None])
        >>> round(density.compute().item(), 2)
        8.97
    """

    def __init__(self, target_g_per_cm3: float | None = None, **kwargs: Any) -> None:
        given = target_g_per_cm3
        super().__init__(None if given is None else [checks.number("target_g_per_cm3", given, above=0)], **kwargs)

    def bind(self, system: System, reference: Tensor, cell: Tensor | None = None) -> None:
        system.require_periodic(
            f"{type(self).__name__} needs a volume", "set cell and pbc of the frames, or leave Density out"
        )
        super().bind(system, reference, cell)

    def per_frame(self, positions: Tensor, cell: Tensor | None = None) -> Tensor:
        volume = self.system.volume(cell).to(positions).expand(len(positions))
        return (self.system.masses.to(positions).sum() / volume / G_PER_CM3)[:, None]

    def axis(self) -> dict[str, Any]:
        return {"kind": "bars", "x": ["ρ"], "xlabel": "", "ylabel": "density / g/cm³"}
