"""Energies and forces the fastest way that this machine and this model allow."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stable_plugin.md.backends.compiled import CompiledForces
from stable_plugin.md.execution import Execution
from stable_plugin.md.neighbors import Edges
from stable_plugin.runtime.memory import OUT_OF_MEMORY, is_out_of_memory
from stable_plugin.runtime.threads import fastest_threads

if TYPE_CHECKING:
    from stable_plugin.models.base import Potential

log = logging.getLogger(__name__)

COMPILATION_S = 30.0
"""What compiling a small model takes where nothing is cached, in s."""

GAIN = 0.4
"""Share of a step that compiling saves at least, in short of the half that is usual for small models."""


class Forces:
    """Energies and forces of a potential, on the right number of threads, compiled where that pays.

    Where memory does not suffice for all replicas at once, the batch is halved, for good.

    Args:
        potential: Whose.
        execution: What is wanted.

    Attributes:
        expected_steps: Steps that are still to come, as far as can be told: what compiling is weighed against.
        most_replicas: Replicas in one call of the model at most; None for all of them.
        threads: Threads that were chosen; None before the first :meth:`settle`, and for torch's own.
        compiled: Whether the potential is compiled; None before the first :meth:`settle`.
    """

    def __init__(self, potential: Potential, execution: Execution) -> None:
        self.potential = potential
        self.execution = execution
        self.expected_steps = 0
        self.threads: int | None = execution.threads if isinstance(execution.threads, int) else None
        self.compiled: bool | None = None if execution.compile == "auto" else execution.compile
        self.most_replicas: int | None = None
        self._compiled: CompiledForces | None = None

    def __call__(self, positions: Tensor, edges: Edges) -> tuple[Tensor, Tensor]:
        """As :meth:`~stable_plugin.models.base.Potential.energies_and_forces`."""
        return self._in_batches(self._compiled or self.potential.energies_and_forces, positions, edges)

    def plain(self, positions: Tensor, edges: Edges) -> tuple[Tensor, Tensor]:
        """The same by the model as it is, whether it has been compiled or not."""
        return self._in_batches(self.potential.energies_and_forces, positions, edges)

    def choose_threads(self, positions: Tensor) -> int | None:
        """The number of threads to run on; measured at the first call if that is wanted."""
        if self.threads is None and self.execution.threads == "auto" and positions.device.type == "cpu":
            kind = (type(self.potential.module).__name__, positions.shape, positions.dtype)
            edges = self.potential.edges(positions)
            self.threads = fastest_threads(kind, lambda: self.plain(positions, edges))
        return self.threads

    def settle(self, positions: Tensor) -> None:
        """Compile, if that is wanted and possible; on the threads that the simulation will run on.

        Raises:
            ValueError: If compiling was asked for and is not possible.
        """
        if self.compiled is None:
            self.compiled = positions.device.type == "cpu" and self._pays(positions)
        if not self.compiled or self._compiled is not None:
            return
        try:
            compiled = CompiledForces(self.potential)
            self._in_batches(compiled, positions, self.potential.edges(positions))
        except ValueError as error:
            if self.execution.compile is True:
                raise
            log.warning("the simulation goes on without compiling the model: %s", error)
            self.compiled = False
        else:
            self._compiled = compiled

    def state_dict(self) -> dict[str, Any]:
        """What was chosen: another choice on resuming would give other last digits."""
        return {"threads": self.threads, "compiled": self.compiled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Choose as before; what is asked for explicitly goes first."""
        if self.execution.threads == "auto":
            self.threads = state["threads"]
        if self.execution.compile == "auto":
            self.compiled = state["compiled"]

    def _in_batches(
        self, call: Callable[[Tensor, Edges], tuple[Tensor, Tensor]], positions: Tensor, edges: Edges
    ) -> tuple[Tensor, Tensor]:
        n_replicas = len(positions)
        while True:
            most = self.most_replicas or n_replicas
            try:
                if most >= n_replicas:
                    return call(positions, edges)
                cutoff, n_atoms = self.potential.cutoff, positions.shape[1]
                parts = [
                    call(part, edges.of_range(first, first + len(part), n_atoms, cutoff))
                    for first, part in zip(range(0, n_replicas, most), positions.split(most), strict=True)
                ]
                energies, forces = zip(*parts, strict=True)
                return torch.cat(energies), torch.cat(forces)
            except OUT_OF_MEMORY as error:
                if not is_out_of_memory(error) or most == 1:
                    raise
            self.most_replicas = ceil(min(most, n_replicas) / 2)
            log.warning("out of memory: the simulation goes on with %d replicas per model call.", self.most_replicas)

    def _pays(self, positions: Tensor) -> bool:
        edges = self.potential.edges(positions)
        self.plain(positions, edges)
        began = time.perf_counter()
        self.plain(positions, edges)
        step_s = time.perf_counter() - began
        if GAIN * step_s * self.expected_steps < COMPILATION_S:
            return False
        log.info(
            "compiling the model, which takes up to a minute: about %d steps of %.0f ms are to come",
            self.expected_steps,
            1000.0 * step_s,
        )
        return True
