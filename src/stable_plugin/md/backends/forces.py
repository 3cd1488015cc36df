"""Energies and forces, computed the fastest way that the machine and the model allow."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import cache
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stable_plugin.md.backends.compiled import CompiledForces
from stable_plugin.md.execution import Execution
from stable_plugin.md.neighbors import Edges
from stable_plugin.runtime.memory import OUT_OF_MEMORY, is_out_of_memory
from stable_plugin.runtime.threads import ThreadGovernor

if TYPE_CHECKING:
    from stable_plugin.models.base import Potential

log = logging.getLogger(__name__)

COMPILATION_S = 30.0
"""Time in s that compiling a small model takes without a cache."""

COMPILED_GAIN = 0.4
"""Fraction of a step that compiling saves, a cautious value: half is usual for small models."""


class Forces:
    """Energies and forces of a potential, on the fastest number of threads, compiled if that pays.

    If all replicas do not fit into memory at once, the batch is halved, and stays so.

    Args:
        potential: Potential to evaluate.
        execution: Settings of the user.

    Attributes:
        expected_steps: Expected number of steps of the simulation, which the cost of compiling is weighed against.
        max_replicas: Maximum number of replicas per model call; None for all of them.
        compiled: Whether the potential is compiled; None before the first :meth:`settle`.
        governor: Chooses the number of threads; None if they are set by the user or the device is not a CPU.
    """

    def __init__(self, potential: Potential, execution: Execution) -> None:
        self.potential = potential
        self.execution = execution
        self.expected_steps = 0
        on_cpu = potential.device.type == "cpu"
        self.governor = ThreadGovernor() if execution.threads == "auto" and on_cpu else None
        self.compiled: bool | None = None if execution.compile == "auto" else execution.compile
        self.max_replicas: int | None = None
        self._compiled: CompiledForces | None = None

    def __repr__(self) -> str:
        return f"Forces(potential={self.potential!r}, execution={self.execution!r})"

    def __call__(self, positions: Tensor, edges: Edges) -> tuple[Tensor, Tensor]:
        """Return energies and forces as :meth:`~stable_plugin.models.base.Potential.energies_and_forces` does."""
        return self._in_batches(self._compiled or self.potential.energies_and_forces, positions, edges)

    def plain(self, positions: Tensor, edges: Edges) -> tuple[Tensor, Tensor]:
        """Return energies and forces by the model that is not compiled."""
        return self._in_batches(self.potential.energies_and_forces, positions, edges)

    @property
    def threads(self) -> int | None:
        """Number of threads in use; None for torch's own number, and before it has been measured."""
        if self.governor is not None:
            return self.governor.threads
        return self.execution.threads if isinstance(self.execution.threads, int) else None

    def choose_threads(self, positions: Tensor) -> int | None:
        """Return the number of threads for a window, measured before the first one unless it is set."""
        if self.governor is not None and self.governor.threads is None:
            self.review_threads(positions)
        return self.threads

    def review_threads(self, positions: Tensor) -> None:
        """Measure again on which number of threads a call is fastest, if steps have become slow.

        Call this after a window and before :meth:`state_dict`: the next window then runs on the same number of threads,
        whether the run is interrupted in between or not.

        Args:
            positions: (n_replicas, n_atoms, 3) in Å, of replicas like those of the next window.
        """
        if self.governor is None:
            return
        kind = (type(self.potential.module).__name__, positions.shape, positions.dtype)
        edges = cache(lambda: self.potential.edges(positions))  # found only if something is timed
        self.governor.review(kind, lambda: self.plain(positions, edges()))

    def record_step(self, seconds: float) -> None:
        """Record the mean duration in s of the steps of a block."""
        if self.governor is not None:
            self.governor.record(seconds)

    def settle(self, positions: Tensor) -> None:
        """Compile the potential, if that is requested and possible.

        Call this on the number of threads of the simulation.

        Args:
            positions: Positions of all replicas, (n_replicas, n_atoms, 3) in Å.

        Raises:
            ValueError: If ``compile=True`` and the potential cannot be compiled.
        """
        if self.compiled is None:
            can_pay = positions.device.type == "cpu" and not self.potential.uncompilable
            self.compiled = can_pay and self._pays(positions)
        if not self.compiled or self._compiled is not None:
            return
        try:
            compiled = CompiledForces(self.potential)
            self._in_batches(compiled, positions, self.potential.edges(positions))
        except ValueError as error:
            if self.execution.compile is True:
                raise
            log.warning("the simulation continues without compiling the model: %s", error)
            self.compiled = False
        else:
            self._compiled = compiled

    def state_dict(self) -> dict[str, Any]:
        """Return the choices made: others in a resumed run would change the last digits of its results."""
        step_s = None if self.governor is None else self.governor.step_s
        return {"threads": self.threads, "step_s": step_s, "compiled": self.compiled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the choices of :meth:`state_dict`, except for what the user has set."""
        if self.governor is not None:
            self.governor.load_state_dict(state)
        if self.execution.compile == "auto":
            self.compiled = state["compiled"]

    def _in_batches(
        self, call: Callable[[Tensor, Edges], tuple[Tensor, Tensor]], positions: Tensor, edges: Edges
    ) -> tuple[Tensor, Tensor]:
        """Return energies and forces by as few calls as fit into memory."""
        n_replicas = len(positions)
        while True:
            most = self.max_replicas or n_replicas
            try:
                if most >= n_replicas:
                    return call(positions, edges)
                cutoff, n_atoms = self.potential.cutoff, positions.shape[1]
                parts = [
                    call(part, edges.slice_replicas(first, first + len(part), n_atoms, cutoff))
                    for first, part in zip(range(0, n_replicas, most), positions.split(most), strict=True)
                ]
                energies, forces = zip(*parts, strict=True)
                return torch.cat(energies), torch.cat(forces)
            except OUT_OF_MEMORY as error:
                if not is_out_of_memory(error) or most == 1:
                    raise
            self.max_replicas = ceil(min(most, n_replicas) / 2)
            log.warning("out of memory: the simulation continues with %d replicas per model call.", self.max_replicas)

    def _pays(self, positions: Tensor) -> bool:
        """Return whether compiling saves more time than it takes."""
        edges = self.potential.edges(positions)
        self.plain(positions, edges)
        began = time.perf_counter()
        self.plain(positions, edges)
        step_s = time.perf_counter() - began
        if COMPILED_GAIN * step_s * self.expected_steps < COMPILATION_S:
            return False
        log.info(
            "compiling the model, which takes up to a minute: about %d steps of %.0f ms are expected",
            self.expected_steps,
            1000.0 * step_s,
        )
        return True
