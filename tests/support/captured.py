"""Stand-ins for CUDA graphs, which make a simulator on the CPU take the path of captured blocks."""

import torch

from stable_plugin.md import Execution
from stable_plugin.md.backends.cuda_graph import WARM_UPS, CapturedBlock
from stable_plugin.md.neighbors import NeighborList

PLAIN = Execution(compile=False, threads=None)


class Recorder(CapturedBlock):
    """Keeps its memory as a CUDA graph does, and computes again at each replay."""

    def _record(self, generator, pool):
        for _ in range(WARM_UPS):
            self._block(*self._inputs)
        return self._block(*self._inputs)

    def _replay(self):
        for held, new in zip(self._outputs, self._block(*self._inputs), strict=True):
            held.copy_(new)


class Refuser(CapturedBlock):
    """Fails to record."""

    def _record(self, generator, pool):
        self._block(*self._inputs)
        raise RuntimeError("operation not permitted when stream is capturing")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def with_fixed_edges(simulator):
    """Give the simulator a neighbor list of fixed capacity."""
    potential = simulator.potential
    simulator.neighbors = NeighborList(potential.cutoff, 1.0, potential.system, fixed=True)
    return simulator


def capturing(simulator, block=Recorder):
    """Let the simulator capture its blocks with a stand-in."""
    with_fixed_edges(simulator)
    simulator.graphs.captured_block = block
    simulator.capturing = True
    return simulator
