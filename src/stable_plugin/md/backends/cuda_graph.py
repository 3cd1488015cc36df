"""Blocks of steps as CUDA graphs: recorded once, replayed without launching each kernel."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

WARM_UPS = 3
"""Runs before a recording: TorchScript specializes in two, and libraries allocate what a recording must not."""

Block = Callable[..., list[Tensor]]
"""Maps tensors to tensors without reading the host, with shapes that do not depend on values."""


class CapturedBlock:
    """One block, recorded with the memory that it reads and writes.

    Weights, masses and other tensors that the block reads besides its inputs are read at each replay from the same
    addresses: changes in place take effect, replaced tensors do not.

    Args:
        block: Function to record.
        inputs: Example inputs; later ones must have the same shapes.
        generator: Generator that the block draws from; replays continue its stream.
        pool: Memory pool, shared by blocks that never run at the same time.
    """

    def __init__(self, block: Block, inputs: Sequence[Tensor], generator: torch.Generator, pool: Any) -> None:
        self._block = block
        self._inputs = [tensor.clone() for tensor in inputs]
        noise = generator.get_state()
        self._outputs = self._record(generator, pool)
        generator.set_state(noise)

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the block's outputs for other inputs, as copies that later calls do not change."""
        for held, new in zip(self._inputs, inputs, strict=True):
            held.copy_(new)
        self._replay()
        return [tensor.clone() for tensor in self._outputs]

    def _record(self, generator: torch.Generator, pool: Any) -> list[Tensor]:
        side, present = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(present)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self._block(*self._inputs)
            with refused_synchronization():
                self._block(*self._inputs)
        present.wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        spare = generator.clone_state()
        self._graph.register_generator_state(generator)
        try:
            with torch.cuda.graph(self._graph, pool=pool, stream=side):
                return self._block(*self._inputs)
        except Exception:
            # The state that was registered waits for the end of the recording, and cannot be drawn from any more.
            generator.graphsafe_set_state(spare)
            raise

    def _replay(self) -> None:
        self._graph.replay()


@contextmanager
def refused_synchronization() -> Iterator[None]:
    """Raise an error where the host waits for the device, which would break a recording and what was recorded before."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


class BlockGraphs:
    """Captured blocks by kind, recorded at their first use, and dropped when a tensor that they read is replaced.

    Attributes:
        captures: Number of blocks captured so far.
    """

    captured_block = CapturedBlock

    def __init__(self) -> None:
        self.captures = 0
        self._blocks: dict[Hashable, CapturedBlock] = {}
        self._depends_on: Hashable = None
        self._pool: Any = None

    def get(
        self, kind: Hashable, depends_on: Hashable, block: Block, inputs: Sequence[Tensor], generator: torch.Generator
    ) -> CapturedBlock:
        """Return the captured block, which is captured now if it is not yet.

        Args:
            kind: Key of the block among those in use at the same time.
            depends_on: What the blocks are valid for besides the shapes of the inputs, such as addresses that they
                read.
            block: Function to capture.
            inputs: Tensors that the block is called with.
            generator: Generator that the block draws from.
        """
        depends_on = (depends_on, *(tensor.shape for tensor in inputs))
        if depends_on != self._depends_on:
            self._blocks.clear()
            self._depends_on = depends_on
        if kind not in self._blocks:
            if self._pool is None and torch.cuda.is_available():
                self._pool = torch.cuda.graph_pool_handle()
            self._blocks[kind] = self.captured_block(block, inputs, generator, self._pool)
            self.captures += 1
        return self._blocks[kind]
