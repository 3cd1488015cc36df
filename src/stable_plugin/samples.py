"""Frames of the latest windows, and what they still say about a potential that has changed since."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stable_plugin.estimator import BoltzmannEstimator, Estimate, Loss, effective_share, reweighting


@dataclass
class Sample:
    """Frames of one window, and how far they have been used.

    Attributes:
        positions: (n_frames, n_atoms, 3) in Å.
        values: Per observable, its value in each frame, (n_frames, n_values).
        energies: Under the parameters that the frames were simulated with, (n_frames,) in eV.
        steps: Optimizer steps taken while this was the newest sample.
    """

    positions: Tensor
    values: list[Tensor]
    energies: Tensor
    steps: int = 0

    def to(self, device: torch.device) -> Sample:
        """The same sample on a device."""
        return Sample(
            self.positions.to(device), [value.to(device) for value in self.values], self.energies.to(device), self.steps
        )


class SampleMemory:
    """The samples of the latest windows, weighed together.

    Each sample is reweighted to the present parameters on its own; together they count by their effective sizes. So an
    old sample fades as the potential moves away from it, and a failure in it that was learned away comes back into the
    mean when the potential returns to it.

    Source: reweighting as in Thaler and Zavadlav, Nat. Commun. 12, 6884 (2021), eq. 3 to 5.

    Args:
        estimator: Of the potential that is trained.
        size: Samples kept.
    """

    def __init__(self, estimator: BoltzmannEstimator, size: int) -> None:
        self.estimator = estimator
        self._samples: deque[Sample] = deque(maxlen=size)
        self._weights: list[Tensor] = []

    @property
    def newest(self) -> Sample:
        """The sample of the latest window."""
        return self._samples[-1]

    def add(self, positions: Tensor, values: list[Tensor]) -> None:
        """Keep the frames of a window that was simulated with the present parameters."""
        self._samples.append(Sample(positions, values, self.estimator.energies(positions)))

    def reweight(self) -> float:
        """Weigh all frames under the present parameters.

        Returns:
            Effective share of the newest sample.
        """
        self._weights = [
            reweighting(self.estimator.energies(sample.positions), sample.energies, self.estimator.temperature_K)
            for sample in self._samples
        ]
        return effective_share(self._weights[-1])

    def estimate(self, targets: Sequence[Tensor], loss: Loss) -> Estimate:
        """Loss and gradient over all samples, as :meth:`reweight` weighed them.

        Its effective share is that of the newest sample.
        """
        # A sample that has lost its meaning may hold weights that are not finite: it counts for nothing.
        sizes = torch.stack([torch.nan_to_num(1.0 / weights.square().sum(), nan=0.0) for weights in self._weights])
        together = torch.cat(
            [torch.nan_to_num(size * weights) for size, weights in zip(sizes / sizes.sum(), self._weights, strict=True)]
        )
        estimate = self.estimator.estimate(
            torch.cat([sample.positions for sample in self._samples]),
            [torch.cat(parts) for parts in zip(*(sample.values for sample in self._samples), strict=True)],
            targets,
            loss,
            together,
        )
        return replace(estimate, effective_share=effective_share(self._weights[-1]))

    def state_dict(self) -> list[dict[str, Any]]:
        """The samples as plain data."""
        return [dict(vars(sample)) for sample in self._samples]

    def load_state_dict(self, state: Sequence[dict[str, Any]]) -> None:
        """Put back what :meth:`state_dict` gave."""
        device = self.estimator.potential.device
        self._samples = deque((Sample(**entry).to(device) for entry in state), maxlen=self._samples.maxlen)
