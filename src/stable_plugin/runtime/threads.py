"""The number of threads that torch uses on a CPU, chosen by measurement."""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from typing import Any

import torch

log = logging.getLogger(__name__)

MIN_CALLS = 3
"""Calls that are timed on each number of threads."""

MIN_TIMED_S = 0.05
"""Time in s that is measured on each number of threads: a few short calls say little beside a busy process."""

MAX_RATIO = 5.0
"""Duration of a call, relative to the fastest number of threads so far, at which a number is not timed any further."""

MIN_SPEEDUP = 1.15
"""Speedup that justifies a change of the number of threads."""

MAX_SLOWDOWN = 2.0
"""Duration of a step, relative to the usual one, beyond which the number of threads is measured again."""

N_RECENT = 9
"""Number of steps whose median is compared."""

MAX_OVERHEAD = 0.1
"""Fraction of the time that repeated measurements may take while steps are slow."""

MIN_PAUSE_S = 10.0
"""Minimum time in s between two measurements."""


@dataclass(frozen=True)
class _Measurement:
    """The fastest number of threads, when it was measured, and how long that took in s."""

    threads: int
    at: float
    cost_s: float


_measurements: dict[Hashable, _Measurement] = {}
"""The latest measurement of each kind of call in this process."""


class ThreadGovernor:
    """Chooses the number of threads, and reconsiders the choice when steps become slow.

    More threads are not always faster. On small tensors they wait for each other, and torch's OpenMP threads wait by
    spinning: on two cores beside one busy process, two threads can be ten times slower than one.

    Pass the duration of each step to :meth:`record`, and call :meth:`review` where the last digits of the results may
    change: results on different numbers of threads agree to rounding only. Save :meth:`state_dict` after that, so that
    a resumed run continues on the same number. For steps of a trainer::

        governor = ThreadGovernor()
        for epoch in range(n_epochs):
            with on_threads(governor.review("training step", forward_and_backward)):
                for batch in loader:
                    began = time.perf_counter()
                    step(batch)
                    governor.record(time.perf_counter() - began)

    The choice is measured at the first review, and measured again if

    - the median of the last ``N_RECENT`` steps exceeds ``MAX_SLOWDOWN`` times the lowest such median so far, or
    - fewer threads are in use than torch's own number, which may be faster again when other processes have ended. The
      pause before such a measurement doubles each time that it changes nothing.

    Attributes:
        threads: Number of threads to use; None before the first review.
        step_s: Usual duration of a step in s, the lowest median so far; None before ``N_RECENT`` steps.
    """

    def __init__(self) -> None:
        self.threads: int | None = None
        self.step_s: float | None = None
        self._max_threads = torch.get_num_threads()
        self._created_at = time.perf_counter()
        self._recent: deque[float] = deque(maxlen=N_RECENT)
        self._n_unchanged = 0

    def __repr__(self) -> str:
        return f"ThreadGovernor(threads={self.threads}, step_s={self.step_s})"

    def record(self, seconds: float) -> None:
        """Record the duration of a step in s."""
        self._recent.append(seconds)
        if len(self._recent) == N_RECENT:
            median = statistics.median(self._recent)
            self.step_s = median if self.step_s is None else min(self.step_s, median)

    def review(self, kind: Hashable, call: Callable[[], object]) -> int:
        """Return the number of threads for the next steps, measured now if that is due.

        Args:
            kind: Identifies calls that share their first measurement in this process.
            call: Representative part of a step without lasting effects, to be timed. The random stream of torch on the
                CPU is restored after it.
        """
        if self.threads is None:
            self.threads = _measurements[kind].threads if kind in _measurements else self._measure(kind, call)
        elif self._is_due(kind):
            self._measure_again(kind, call)
        return self.threads

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to continue on the same number of threads."""
        return {"threads": self.threads, "step_s": self.step_s}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.threads, self.step_s = state["threads"], state["step_s"]
        self._recent.clear()

    def _is_slow(self) -> bool:
        if self.step_s is None or len(self._recent) < N_RECENT:
            return False
        return statistics.median(self._recent) > MAX_SLOWDOWN * self.step_s

    def _is_due(self, kind: Hashable) -> bool:
        assert self.threads is not None
        if self.threads == self._max_threads == 1:
            return False
        last = _measurements.get(kind, _Measurement(self.threads, self._created_at, 0.0))
        pause = max(MIN_PAUSE_S, last.cost_s / MAX_OVERHEAD)
        waited = time.perf_counter() - last.at
        if self._is_slow():
            return waited >= pause
        return self.threads < self._max_threads and waited >= pause * 2 ** (1 + self._n_unchanged)

    def _measure(self, kind: Hashable, call: Callable[[], object]) -> int:
        began = time.perf_counter()
        threads = fastest_threads(call, self._max_threads, self.threads)
        ended = time.perf_counter()
        _measurements[kind] = _Measurement(threads, ended, ended - began)
        return threads

    def _measure_again(self, kind: Hashable, call: Callable[[], object]) -> None:
        before, was_slow = self.threads, self._is_slow()
        self.threads = self._measure(kind, call)
        if self.threads == before:
            self._n_unchanged += 1
        else:
            self._n_unchanged = 0
            log.info("the number of threads changes from %s to %d, which is faster now", before, self.threads)
        if was_slow or self.threads != before:
            # The usual duration on this number of threads, beside these processes, is not known yet.
            self.step_s = None
            self._recent.clear()


def fastest_threads(call: Callable[[], object], max_threads: int, present: int | None = None) -> int:
    """Return the number of threads among one, half of ``max_threads`` and ``max_threads`` on which a call is fastest.

    Args:
        call: Function to time.
        max_threads: Largest number.
        present: Number that is kept unless another one is faster by ``MIN_SPEEDUP``; ``max_threads`` by default.
    """
    present = max_threads if present is None else present
    if present == max_threads == 1:
        return 1
    # Models may draw random numbers; how many calls are timed must not change the numbers of the run.
    with torch.random.fork_rng(devices=[]):
        times: dict[int, float] = {}
        # One thread first: other processes slow it down the least.
        for n in sorted({1, (max_threads + 1) // 2, max_threads, present}):
            times[n] = _mean_seconds(call, n, MAX_RATIO * min(times.values(), default=inf))
    best = min(times, key=lambda n: times[n])
    return best if times[present] > MIN_SPEEDUP * times[best] else present


@contextmanager
def on_threads(threads: int | None) -> Iterator[None]:
    """Set torch's number of threads, and restore it on exit; None leaves it."""
    own = torch.get_num_threads()
    if threads is None or threads == own:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(own)


def _mean_seconds(call: Callable[[], object], threads: int, limit: float) -> float:
    """Return the mean duration of a call in s; fewer calls are timed if it exceeds ``limit``."""
    # The mean, not the minimum: on a busy machine the stalled calls count too.
    with on_threads(threads):
        call()  # starts the threads
        n_calls, began, elapsed = 0, time.perf_counter(), 0.0
        while n_calls < MIN_CALLS or elapsed < MIN_TIMED_S:
            call()
            n_calls, elapsed = n_calls + 1, time.perf_counter() - began
            if elapsed > limit * n_calls:
                break
    return elapsed / n_calls
