"""Energies through torch.compile, for simulations long enough to pay for it."""

from __future__ import annotations

import types

import torch
from torch import Tensor

from stable_plugin.md.neighbors import Edges
from stable_plugin.models.base import Potential, differentiated
from stable_plugin.runtime.memory import is_out_of_memory

TOLERANCE = 1e-3
"""Relative to the largest force: what compiled arithmetic in single precision may differ by."""


class CompiledForces:
    """Energies and forces of a potential, its energy compiled.

    The weights stay the potential's: changes in place are seen at once and nothing is compiled again. Neither is it for
    another number of edges. Forces come from differentiating the compiled energy, outside of it: a model's own force path
    differentiates inside, which torch.compile cannot follow.

    Args:
        potential: Whose energy.

    Raises:
        ValueError: If the potential cannot be compiled, or the compiled one gives other forces.
    """

    def __init__(self, potential: Potential) -> None:
        self._potential = potential
        self._followed = followed = potential.compilable()

        def energies(positions: Tensor, index: Tensor, shifts: Tensor) -> Tensor:
            return followed.energies(positions, Edges(index, shifts))

        # torch counts compilations by code object, over all potentials, and gives up after eight.
        code = energies.__code__.replace(co_name="compiled_energies")
        separate = types.FunctionType(code, energies.__globals__, closure=energies.__closure__)
        self._energies = torch.compile(separate, fullgraph=True)
        self._checked = False

    def __call__(self, positions: Tensor, edges: Edges) -> tuple[Tensor, Tensor]:
        """As :meth:`~stable_plugin.models.base.Potential.energies_and_forces`."""
        if not self._checked:
            # Whatever the potential sets up at its first call is there before it is followed.
            self._followed.energies(positions, edges)
        if edges.index.shape[1] > 1:
            torch._dynamo.mark_dynamic(edges.index, 1)
            torch._dynamo.mark_dynamic(edges.shifts, 0)
        try:
            energies, forces = differentiated(
                lambda at, listed: self._energies(at, listed.index, listed.shifts), positions, edges
            )
        except Exception as error:  # a compiler that is missing, or a model it cannot follow: many kinds
            if is_out_of_memory(error):
                raise
            raise ValueError(
                f"compile=True: {type(self._potential.module).__name__} could not be compiled "
                f"({type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}). Set compile=False."
            ) from error
        if not self._checked:
            self._check(positions, edges, forces)
            self._checked = True
        return energies, forces

    def _check(self, positions: Tensor, edges: Edges, forces: Tensor) -> None:
        _, expected = self._potential.energies_and_forces(positions, edges)
        off = (forces - expected).abs().max().item()
        if not off <= TOLERANCE * expected.abs().max().item() + TOLERANCE:
            raise ValueError(
                f"compile=True: the compiled {type(self._potential.module).__name__} gives forces that are off by "
                f"{off:.2g} eV/Å. Set compile=False."
            )
