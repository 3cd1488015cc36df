"""Energies by torch.compile, for simulations long enough to pay for it."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stable_plugin.md.derivatives import differentiated
from stable_plugin.md.neighbors import Edges
from stable_plugin.runtime.memory import is_out_of_memory

if TYPE_CHECKING:
    from stable_plugin.models.base import Potential

TOLERANCE = 1e-3
"""Difference between compiled and eager forces in single precision, relative to the largest force."""


class CompiledForces:
    """Energies and forces of a potential whose energy is compiled.

    The weights are shared with the potential: changes in place take effect at once. Neither these nor a different
    number of edges cause another compilation. Forces are the gradient of the compiled energy, taken outside of it: a
    model that differentiates inside its forward pass cannot be traced by torch.compile.

    Args:
        potential: Potential whose energy is compiled.

    Raises:
        ValueError: If the potential cannot be compiled, or its forces differ from the eager ones.
    """

    def __init__(self, potential: Potential) -> None:
        self._potential = potential
        with self._explained(ValueError):
            self._traceable = traceable = potential.compilable()

        def energies(positions: Tensor, index: Tensor, shifts: Tensor) -> Tensor:
            return traceable.energies(positions, Edges(index, shifts))

        # torch counts compilations per code object, which potentials would share, and stops compiling after eight.
        code = energies.__code__.replace(co_name="compiled_energies")
        separate = types.FunctionType(code, energies.__globals__, closure=energies.__closure__)
        self._energies = torch.compile(separate, fullgraph=True)
        self._checked = False

    def __call__(self, positions: Tensor, edges: Edges) -> tuple[Tensor, Tensor]:
        """Return energies and forces as :meth:`~stable_plugin.models.base.Potential.energies_and_forces` does."""
        with self._explained():
            if not self._checked:
                # What the potential sets up at its first call must exist before it is traced.
                self._traceable.energies(positions, edges)
            if edges.index.shape[1] > 1:
                torch._dynamo.mark_dynamic(edges.index, 1)
                torch._dynamo.mark_dynamic(edges.shifts, 0)
            energies, forces = differentiated(
                lambda at, listed: self._energies(at, listed.index, listed.shifts), positions, edges
            )
        if not self._checked:
            self._check(positions, edges, forces)
            self._checked = True
        return energies, forces

    def __repr__(self) -> str:
        return f"CompiledForces(potential={self._potential!r})"

    @contextmanager
    def _explained(self, *explained: type[Exception]) -> Iterator[None]:
        """Raise a ValueError for any error but that of memory, and those that explain themselves."""
        try:
            yield
        except explained:
            raise
        except Exception as error:  # a missing compiler or an untraceable model raise many kinds of errors
            if is_out_of_memory(error):
                raise
            raise ValueError(
                f"compile=True: {type(self._potential.module).__name__} could not be compiled ({type(error).__name__}: "
                f"{str(error).strip().splitlines()[0] if str(error) else ''}). Set compile=False."
            ) from error

    def _check(self, positions: Tensor, edges: Edges, forces: Tensor) -> None:
        """Raise an error if the compiled forces differ from the eager ones."""
        _, expected = self._potential.energies_and_forces(positions, edges)
        off = (forces - expected).abs().max().item()
        if not off <= TOLERANCE * expected.abs().max().item() + TOLERANCE:
            raise ValueError(
                f"compile=True: the compiled {type(self._potential.module).__name__} has forces that are off by "
                f"{off:.2g} eV/Å. Set compile=False."
            )
