"""Blocks of steps as CUDA graphs: recorded once, replayed without launching kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

WARM_UPS = 3
"""Runs before a recording: TorchScript settles after two, and libraries set up what a recording must not."""

Block = Callable[..., list[Tensor]]
"""Tensors to tensors, without a host synchronisation and with shapes that do not depend on values."""


class CapturedBlock:
    """One block, recorded with the memory it reads and writes.

    Weights, masses and whatever else the block reads besides its inputs are read anew at each replay from where they
    were: changes in place take effect, replaced tensors do not.

    Args:
        block: What is recorded.
        inputs: Example inputs; later ones have their shapes.
        generator: What the block draws from; replays go on in its stream.
        pool: Memory pool shared by blocks that never run at the same time.
    """

    def __init__(self, block: Block, inputs: Sequence[Tensor], generator: torch.Generator, pool: Any) -> None:
        self._block = block
        self._inputs = [tensor.clone() for tensor in inputs]
        noise = generator.get_state()
        self._outputs = self._record(generator, pool)
        generator.set_state(noise)

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The block's outputs for other inputs; they stay as they are when it is called again."""
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
        present.wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        self._graph.register_generator_state(generator)
        with torch.cuda.graph(self._graph, pool=pool, stream=side):
            return self._block(*self._inputs)

    def _replay(self) -> None:
        self._graph.replay()


class BlockGraphs:
    """Captured blocks by kind, made when they are first asked for, and dropped when what they were made from is replaced."""

    captured_block = CapturedBlock

    def __init__(self) -> None:
        self.captures = 0
        self._blocks: dict[Hashable, CapturedBlock] = {}
        self._made_from: Hashable = None
        self._pool: Any = None

    def get(
        self, kind: Hashable, made_from: Hashable, block: Block, inputs: Sequence[Tensor], generator: torch.Generator
    ) -> CapturedBlock:
        """The captured block, captured now if there is none.

        Args:
            kind: Which of the blocks that are in use at the same time.
            made_from: What all of them are only valid for, besides the shapes of the inputs: addresses of what they read.
            block: What to capture.
            inputs: Tensors that the block is called with.
            generator: What it draws from.
        """
        made_from = (made_from, *(tensor.shape for tensor in inputs))
        if made_from != self._made_from:
            self._blocks.clear()
            self._made_from = made_from
        if kind not in self._blocks:
            if self._pool is None and torch.cuda.is_available():
                self._pool = torch.cuda.graph_pool_handle()
            self._blocks[kind] = self.captured_block(block, inputs, generator, self._pool)
            self.captures += 1
        return self._blocks[kind]
