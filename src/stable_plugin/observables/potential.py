"""Base class of observables that are functions of the potential as well as of the positions."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stable_plugin.md.system import System
from stable_plugin.observables.base import Observable

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
        if len(positions) == 0:
            return positions.new_empty(0, self.n_means)
        device = self.potential.device  # trajectories are kept on the CPU
        chunks = positions.to(device).split(self._chunk)
        cells = [None] * len(chunks) if cell is None else cell.to(device).split(self._chunk)
        # As energies are: in evaluation mode, also within a training step.
        with self.potential.frozen():
            parts = [self.of_frames(*frames) for frames in zip(chunks, cells, strict=True)]
        return torch.cat(parts).to(positions.device)

    @abstractmethod
    def of_frames(self, positions: Tensor, cell: Tensor | None = None) -> Tensor:
        """Return the observable of frames under the present parameters, (n_frames, n_means).

        Values are differentiable in the parameters where gradients are enabled.

        Args:
            positions: As many frames as memory allows in one call, (n_frames, n_atoms, 3) in Å.
            cell: Cells of the frames, (n_frames, 3, 3) in Å; that of the system if None.
        """
