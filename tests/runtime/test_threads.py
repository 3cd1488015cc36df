"""The choice of the number of threads, with a clock that only calls move."""

from itertools import pairwise

import pytest
import torch

from stable_plugin.runtime import threads
from stable_plugin.runtime.threads import MIN_PAUSE_S, N_RECENT, ThreadGovernor, fastest_threads, on_threads


class Machine:
    """A clock, and a call that takes 5 ms, or 20 ms on some numbers of threads.

    Attributes:
        slow_on: Those numbers of threads.
        slow_s: Duration of a call on them in s.
        calls: Number of threads of each call so far.
    """

    def __init__(self):
        self.now, self.slow_on, self.slow_s, self.calls = 0.0, set(), 0.02, []

    def perf_counter(self):
        return self.now

    def call(self):
        self.calls.append(torch.get_num_threads())
        self.now += self.slow_s if self.calls[-1] in self.slow_on else 0.005


@pytest.fixture
def machine(monkeypatch):
    """Return a machine on which torch uses three threads."""
    monkeypatch.setattr(threads, "_measurements", {})
    monkeypatch.setattr(threads, "MIN_PAUSE_S", MIN_PAUSE_S)
    machine = Machine()
    monkeypatch.setattr(threads, "time", machine)
    with on_threads(3):
        yield machine


@pytest.mark.parametrize(("slow", "expected"), [({2, 3}, 1), ({1, 3}, 2), ({1, 2}, 3), (set(), 3)])
def test_fastest_threads_prefers_max_threads(machine, slow, expected):
    machine.slow_on = slow
    assert fastest_threads(machine.call, 3) == expected
    assert torch.get_num_threads() == 3
    assert set(machine.calls) == {1, 2, 3}


@pytest.mark.parametrize(("slow", "expected"), [({2, 3}, 1), (set(), 1), ({1}, 2), ({1, 2}, 3)])
def test_fastest_threads_keeps_present_if_similar(machine, slow, expected):
    machine.slow_on = slow
    assert fastest_threads(machine.call, 3, present=1) == expected


def test_fastest_threads_stops_timing_slow_numbers(machine):
    machine.slow_on, machine.slow_s = {2, 3}, 0.2
    assert fastest_threads(machine.call, 3) == 1
    assert machine.calls.count(2) == machine.calls.count(3) == 2, (
        "the first call, which starts the threads, and one more"
    )
    assert machine.calls.count(1) >= 3


def test_fastest_threads_of_one_is_not_timed(machine):
    assert fastest_threads(machine.call, 1) == 1
    assert machine.calls == []


def test_fastest_threads_keeps_the_random_stream(machine):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    fastest_threads(lambda: (torch.rand(3), machine.call()), 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_on_threads_restores_on_error():
    own = torch.get_num_threads()
    with pytest.raises(KeyError), on_threads(own + 1):
        assert torch.get_num_threads() == own + 1
        raise KeyError
    with on_threads(None):
        assert torch.get_num_threads() == own
    assert torch.get_num_threads() == own


def steps(governor, seconds, n=N_RECENT):
    for _ in range(n):
        governor.record(seconds)


def test_governor_measures_each_kind_once(machine):
    machine.slow_on = {2, 3}
    assert ThreadGovernor().review("step", machine.call) == 1
    n_calls = len(machine.calls)
    machine.slow_on = {1}
    assert ThreadGovernor().review("step", machine.call) == 1
    assert len(machine.calls) == n_calls
    assert ThreadGovernor().review("another", machine.call) != 1


def test_governor_keeps_threads_at_usual_speed(machine):
    governor = ThreadGovernor()
    assert governor.review("step", machine.call) == 3
    n_calls, machine.slow_on = len(machine.calls), {2, 3}
    for seconds in (0.10, 0.12, 0.15, 0.19):
        machine.now += 1000.0
        steps(governor, seconds)
        assert governor.review("step", machine.call) == 3
    assert len(machine.calls) == n_calls
    assert governor.step_s == 0.10


def test_governor_measures_again_when_slow(machine):
    governor = ThreadGovernor()
    governor.review("step", machine.call)
    steps(governor, 0.10)
    machine.now, machine.slow_on = machine.now + 1000.0, {2, 3}
    steps(governor, 0.21)
    assert governor.threads == 3, "only a review changes the number"
    assert governor.review("step", machine.call) == 1
    assert governor.step_s is None, "the usual duration on one thread is not known yet"


def test_governor_ignores_a_few_slow_steps(machine):
    governor = ThreadGovernor()
    governor.review("step", machine.call)
    steps(governor, 0.10)
    machine.now, machine.slow_on = machine.now + 1000.0, {2, 3}
    steps(governor, 10.0, N_RECENT // 2)
    assert governor.review("step", machine.call) == 3


def test_governor_pauses_between_measurements(machine):
    governor = ThreadGovernor()
    governor.review("step", machine.call)
    steps(governor, 0.10)
    machine.slow_on = {2, 3}
    steps(governor, 1.0)
    measured_at, n_calls = machine.now, len(machine.calls)
    pause = max(MIN_PAUSE_S, 10 * measured_at)
    machine.now = measured_at + 0.9 * pause
    assert governor.review("step", machine.call) == 3
    assert len(machine.calls) == n_calls
    machine.now = measured_at + 1.1 * pause
    assert governor.review("step", machine.call) == 1


def test_governor_raises_threads_when_free(machine):
    machine.slow_on = {2, 3}
    governor = ThreadGovernor()
    assert governor.review("step", machine.call) == 1
    machine.slow_on = {1, 2}
    steps(governor, 0.10)
    assert governor.review("step", machine.call) == 1
    machine.now += 1000.0
    assert governor.review("step", machine.call) == 3


def test_governor_doubles_the_pause(machine):
    machine.slow_on = {2, 3}
    governor = ThreadGovernor()
    governor.review("step", machine.call)
    measured_at = []
    for _ in range(1000):
        machine.now += 1.0
        n_calls = len(machine.calls)
        governor.review("step", machine.call)
        if len(machine.calls) > n_calls:
            measured_at.append(machine.now)
    pauses = [after - before for before, after in pairwise(measured_at)]
    assert len(pauses) >= 3
    assert all(after > 1.8 * before for before, after in pairwise(pauses))


def test_governor_with_one_thread_never_measures(machine):
    with on_threads(1):
        governor = ThreadGovernor()
        assert governor.review("step", machine.call) == 1
        machine.now += 1000.0
        steps(governor, 0.1)
        steps(governor, 1.0)
        assert governor.review("step", machine.call) == 1
    assert machine.calls == []


def test_governor_state_dict_keeps_threads(machine):
    governor = ThreadGovernor()
    governor.load_state_dict({"threads": 2, "step_s": 0.1})
    assert governor.review("step", machine.call) == 2
    assert machine.calls == []
    assert governor.state_dict() == {"threads": 2, "step_s": 0.1}
    assert repr(governor) == "ThreadGovernor(threads=2, step_s=0.1)"
    # The usual duration is that of the earlier process, so a busy machine is noticed.
    machine.now, machine.slow_on = machine.now + 1000.0, {2, 3}
    steps(governor, 0.3)
    assert governor.review("step", machine.call) == 1
