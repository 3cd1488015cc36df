"""The zero of energy, which observables do not determine and which adaptive optimizers let drift."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from stable_plugin.md.cells import optional
from stable_plugin.models.base import Potential

log = logging.getLogger(__name__)

N_FRAMES = 8
"""Frames of each system whose mean energy is held."""

NEGLIGIBLE_EV = 1e-4
"""Drift in eV per atom that is not worth a shift, above the rounding of isolated-atom energies in single precision."""


class EnergyZero:
    """Holds the mean energy of a few frames of each system while the weights change.

    The Boltzmann estimator sees energy differences alone: a constant that is added to all energies changes neither forces
    nor observables. An optimizer that scales the gradient of each weight, as Adam does, moves that constant with every
    step. It is taken out where the family of models keeps a constant per atom.

    Args:
        potentials: Potential of each system; they hold the same module.
        frames: Frames of each system, (n_frames, n_atoms, 3) in Å.
        cells: Cells of these frames, (n_frames, 3, 3) in Å; None where all are that of the system.
        model_calls: Context of calls of the model, which must not change the trainer's random streams.
    """

    def __init__(
        self,
        potentials: Sequence[Potential],
        frames: Sequence[Tensor],
        cells: Sequence[Tensor | None],
        model_calls: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._model_calls = model_calls
        self.potentials = list(potentials)
        self._frames, self._cells = [], []
        for potential, positions, cell in zip(potentials, frames, cells, strict=True):
            chosen = torch.linspace(0, len(positions) - 1, min(N_FRAMES, len(positions))).round().long()
            self._frames.append(positions[chosen].to(potential.device, potential.dtype))
            self._cells.append(None if cell is None else cell[chosen].to(potential.device, potential.dtype))
        self._sizes = torch.tensor([float(potential.system.n_atoms) for potential in potentials], dtype=torch.float64)
        self._branches: dict[str | None, list[int]] = {}
        for number, potential in enumerate(self.potentials):
            self._branches.setdefault(potential.branch, []).append(number)
        self._before: Tensor | None = None
        self._is_held = True

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(repr(potential) for potential in self.potentials)})"

    def mark(self) -> None:
        """Record the mean energies as those to hold, at the first call only."""
        if self._before is None:
            self._before = self._energies()

    def drifts(self) -> dict[str | None, float]:
        """Return the change of the energies per atom since :meth:`mark`, in eV.

        For each branch of the model, it is the constant that fits its systems best.
        """
        if self._before is None:
            return {}
        change = self._energies() - self._before
        return {
            branch: float((change[own] * self._sizes[own]).sum() / self._sizes[own].square().sum())
            for branch, own in self._branches.items()
        }

    def restore(self) -> None:
        """Take the drift since :meth:`mark` out of the model, if it keeps a constant per atom."""
        if not self._is_held:
            return
        for branch, drift in self.drifts().items():
            if abs(drift) > NEGLIGIBLE_EV:
                self._is_held = self.potentials[self._branches[branch][0]].shift_energies(-drift)

    def warn(self) -> None:
        """Warn of a drift that could not be taken out."""
        drift = max(self.drifts().values(), key=abs, default=0.0)
        if not self._is_held and abs(drift) > 1e-3:
            log.warning(
                "the energies have drifted by %.0f meV/atom, as observables do not determine their zero, and %s keeps no "
                "constant that could be shifted back: subtract it from the energies, or define shift_energies(per_atom_eV) "
                "in its Potential.",
                1000.0 * drift,
                type(self.potentials[0].module).__name__,
            )

    def state_dict(self) -> dict[str, Tensor | None]:
        """Return the energies to hold."""
        return {"before": self._before}

    def load_state_dict(self, state: dict[str, Tensor | None]) -> None:
        """Restore what :meth:`state_dict` returned."""
        before = state["before"]
        self._before = None if before is None else before.cpu()

    def _energies(self) -> Tensor:
        """Return the mean total energy of the frames of each system, (n_systems,) in eV, float64."""
        with self._model_calls():
            means = [
                _mean_energy(potential, frames, cell) + potential.constant_energy
                for potential, frames, cell in zip(self.potentials, self._frames, self._cells, strict=True)
            ]
        return torch.tensor(means, dtype=torch.float64)


@torch.no_grad()
def _mean_energy(potential: Potential, positions: Tensor, cell: Tensor | None) -> float:
    with potential.frozen():
        return potential.energies(positions, potential.edges(positions, *optional(cell))).double().mean().item()
