"""How many threads a simulation on a CPU runs on."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch

CALLS = 3

WORTH_A_CHANGE = 1.15
"""How much faster another number of threads must be than torch's own."""

_fastest: dict[Hashable, int] = {}


def fastest_threads(kind: Hashable, call: Callable[[], object]) -> int:
    """The number of threads that a call is fastest on, measured once in a process for each kind of call.

    More threads are not always faster: on small tensors they wait for each other, and on a busy machine for their turn.

    Args:
        kind: What the answer is remembered by.
        call: What to time.
    """
    if kind not in _fastest:
        own = torch.get_num_threads()
        times = {}
        call()
        for threads in sorted({own, (own + 1) // 2, 1}):
            with on_threads(threads):
                times[threads] = min(_seconds(call) for _ in range(CALLS))
        best = min(times, key=lambda threads: times[threads])
        _fastest[kind] = best if times[own] > WORTH_A_CHANGE * times[best] else own
    return _fastest[kind]


@contextmanager
def on_threads(threads: int | None) -> Iterator[None]:
    """Let torch use so many threads, and put its own number back; None leaves it."""
    own = torch.get_num_threads()
    if threads is None or threads == own:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(own)


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
