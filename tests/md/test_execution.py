"""Compiled energies and numbers of threads: another speed, the same results."""

import copy
import logging

import pytest
import torch
from toys import TRIATOMIC, as_potential, tiny_mace, triatomic

from stable_plugin import BondDeviation, BondLengths, Langevin, NonFinite, Schedule, StABlEConfig, System
from stable_plugin.algorithm.assembly import assemble
from stable_plugin.md import Execution, Simulator
from stable_plugin.md import simulator as simulator_module
from stable_plugin.md.backends import forces
from stable_plugin.md.backends.compiled import CompiledForces
from stable_plugin.runtime import threads


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def aspirin_potential(aspirin_frames):
    system = System.from_atoms(aspirin_frames[0])
    return as_potential(tiny_mace(system.numbers, atomic_inter_scale=20.0), system)


@pytest.fixture(scope="module")
def compiled_aspirin(aspirin_potential):
    return CompiledForces(aspirin_potential)


def run(potential, positions, **execution):
    simulator = Simulator(
        potential, Langevin(500.0, 0.5, 1.0), NonFinite(), check_every_fs=5.0, execution=Execution(**execution)
    )
    simulator.forces.expected_steps = 10**9
    return simulator.run(simulator.prepare(positions, seeded()), 20, 10, seeded(1)), simulator


@pytest.mark.parametrize("spread", [1.0, 1.3, 0.8])
def test_compiled_forces_match_eager_forces(aspirin_potential, compiled_aspirin, aspirin_positions, spread):
    positions = spread * aspirin_positions[:2]
    edges = aspirin_potential.edges(positions)
    with aspirin_potential.frozen():
        energies, forces = aspirin_potential.energies_and_forces(positions, edges)
        ours = compiled_aspirin(positions, edges)
    assert torch.allclose(ours[0].double(), energies.double(), rtol=1e-9, atol=1e-9)
    assert torch.allclose(ours[1], forces, rtol=1e-8, atol=1e-9)


def test_new_weights_and_edges_are_not_recompiled(aspirin_frames, aspirin_positions):
    system = System.from_atoms(aspirin_frames[0])
    potential = as_potential(tiny_mace(system.numbers, atomic_inter_scale=20.0, seed=3), system)
    call = CompiledForces(potential)
    positions = aspirin_positions[:2]
    with potential.frozen():
        call(positions, potential.edges(positions))
        counters = torch._dynamo.utils.counters
        before = counters["stats"]["unique_graphs"]
        for spread in (1.0, 1.1, 1.4):
            with torch.no_grad():
                for parameter in potential.module.parameters():
                    parameter.mul_(1.05)
            edges = potential.edges(spread * positions)
            expected = potential.energies_and_forces(spread * positions, edges)[1]
            assert torch.allclose(call(spread * positions, edges)[1], expected, rtol=1e-8, atol=1e-9)
        assert counters["stats"]["unique_graphs"] == before


def test_compiled_run_matches_eager_run(aspirin_potential, aspirin_positions):
    expected, _ = run(aspirin_potential, aspirin_positions[:2], compile=False)
    window, simulator = run(aspirin_potential, aspirin_positions[:2], compile=True)
    assert simulator.forces.compiled
    assert torch.allclose(window.positions, expected.positions, rtol=0, atol=1e-9)
    assert all(parameter.requires_grad for parameter in aspirin_potential.module.parameters())
    assert all(parameter.grad is None for parameter in aspirin_potential.module.parameters())


def test_compiled_forces_of_any_torch_module():
    potential = triatomic(10.0)
    positions = torch.randn(3, 3, 3, generator=seeded(), dtype=torch.float64)
    edges = potential.edges(positions)
    ours, expected = CompiledForces(potential)(positions, edges), potential.energies_and_forces(positions, edges)
    assert torch.allclose(ours[0], expected[0])
    assert torch.allclose(ours[1], expected[1])


def broken_compiler(*_, **__):
    def call(*_):
        raise RuntimeError("no C++ compiler")

    return call


def test_missing_compiler_is_logged_or_an_error(monkeypatch, caplog):
    monkeypatch.setattr(torch, "compile", broken_compiler)
    monkeypatch.setattr(forces, "COMPILATION_S", 0.0)
    positions = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [-0.3, 0.95, 0]]], dtype=torch.float64)
    expected, _ = run(triatomic(10.0), positions, compile=False)
    with caplog.at_level(logging.WARNING, "stable_plugin"):
        window, simulator = run(triatomic(10.0), positions)
    assert torch.equal(window.positions, expected.positions)
    assert simulator.forces.compiled is False
    assert "no C++ compiler" in caplog.text
    with pytest.raises(ValueError, match=r"compile=True: Springs could not be compiled .*no C\+\+ compiler"):
        run(triatomic(10.0), positions, compile=True)


@pytest.mark.parametrize("fails", ["compilable", "first call"])
def test_any_error_of_a_potential_that_is_prepared_for_compilation_is_logged_or_an_error(fails, monkeypatch, caplog):
    """Potentials of other packages raise errors of their own kinds, before anything is compiled."""

    def broken(*_, **__):
        raise KeyError("no such layer")

    def failing():
        potential = triatomic(10.0)
        traceable = copy.copy(potential)
        monkeypatch.setattr(traceable, "energies", broken)
        monkeypatch.setattr(potential, "compilable", broken if fails == "compilable" else lambda: traceable)
        return potential

    monkeypatch.setattr(forces, "COMPILATION_S", 0.0)
    positions = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [-0.3, 0.95, 0]]], dtype=torch.float64)
    expected, _ = run(triatomic(10.0), positions, compile=False)
    with caplog.at_level(logging.WARNING, "stable_plugin"):
        window, simulator = run(failing(), positions)
    assert torch.equal(window.positions, expected.positions)
    assert simulator.forces.compiled is False
    assert "continues without compiling the model" in caplog.text and "no such layer" in caplog.text
    with pytest.raises(ValueError, match=r"compile=True: Springs could not be compiled .*no such layer"):
        run(failing(), positions, compile=True)


def test_compiled_forces_that_differ_are_rejected(monkeypatch):
    potential = triatomic(10.0)
    positions = torch.randn(1, 3, 3, generator=seeded(), dtype=torch.float64)
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda *arguments: 1.1 * function(*arguments))
    with pytest.raises(ValueError, match=r"compiled Springs has forces that are off by .* Set compile=False"):
        CompiledForces(potential)(positions, potential.edges(positions))


def test_short_simulation_is_not_compiled():
    positions = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [-0.3, 0.95, 0]]], dtype=torch.float64)
    potential = triatomic(10.0)
    detector = BondDeviation()
    detector.bind(potential.system, positions)
    simulator = Simulator(potential, Langevin(), detector)
    simulator.run(simulator.prepare(positions, seeded()), 20, 10, seeded(1))
    assert simulator.forces.compiled is False


def test_forces_load_state_dict_restores_choices():
    positions = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [-0.3, 0.95, 0]]], dtype=torch.float64)
    potential = triatomic(10.0)
    first = forces.Forces(potential, Execution())
    saved = {"threads": 3, "step_s": 0.01, "compiled": False}
    first.load_state_dict(saved)
    first.expected_steps = 10**12
    assert first.choose_threads(positions) == 3
    first.settle(positions)
    assert first.state_dict() == saved
    explicit = forces.Forces(potential, Execution(threads=1, compile=False))
    explicit.load_state_dict({**saved, "compiled": True})
    assert explicit.state_dict() == {"threads": 1, "step_s": None, "compiled": False}, "the user's settings win"


def test_family_that_cannot_be_compiled_is_not_tried(monkeypatch, caplog):
    monkeypatch.setattr(forces, "COMPILATION_S", 0.0)
    positions = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [-0.3, 0.95, 0]]], dtype=torch.float64)
    potential = triatomic(10.0)
    monkeypatch.setattr(type(potential), "uncompilable", "springs, which rust")
    with caplog.at_level(logging.INFO, "stable_plugin"):
        _, simulator = run(potential, positions)
    assert simulator.forces.compiled is False and "compil" not in caplog.text
    with pytest.raises(ValueError, match=r"compile=True is not available for springs, which rust. Set compile=False"):
        run(potential, positions, compile=True)


def test_run_uses_and_restores_threads():
    seen = []
    potential = triatomic(10.0)
    plain = potential.energies_and_forces
    potential.energies_and_forces = lambda *arguments: seen.append(torch.get_num_threads()) or plain(*arguments)
    positions = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [-0.3, 0.95, 0]]], dtype=torch.float64)
    own = torch.get_num_threads()
    simulator = Simulator(potential, Langevin(), NonFinite(), execution=Execution(threads=own + 1, compile=False))
    start = simulator.prepare(positions, seeded())
    seen.clear()
    simulator.run(start, 10, 10, seeded(1))
    assert set(seen) == {own + 1}
    assert torch.get_num_threads() == own


def test_training_loop_saves_choices_of_execution(aspirin_potential, aspirin_positions):
    def loop(execution=None):
        config = StABlEConfig(
            objective="boltzmann",
            integrator=Langevin(500.0),
            observables=[BondLengths()],
            detector=BondDeviation(0.5),
            n_replicas=2,
            window_ps=0.01,
            record_every_fs=5.0,
            execution=execution or Execution(),
            schedule=Schedule(max_failures_per_ns=30_000.0, max_windows=3),
        )
        return assemble(aspirin_potential, aspirin_positions[:2], aspirin_positions, config)

    first = loop(Execution(threads=2, compile=False))
    assert first.simulator.execution.threads == 2
    assert first.simulator.forces.expected_steps == (3 + 2 + 7) * 20, "learning, probes, verification"
    saved = first.state_dict()
    assert saved["replicas"]["forces"] == {"threads": 2, "step_s": None, "compiled": False}
    resumed = loop()
    resumed.load_state_dict(saved)
    assert resumed.simulator.forces.state_dict() == saved["replicas"]["forces"]


@pytest.mark.parametrize("changes", [{"capture": "yes"}, {"compile": 1.0}, {"threads": 0}, {"threads": "all"}])
def test_execution_rejects_invalid_choices(changes):
    ((name, value),) = changes.items()
    with pytest.raises(ValueError, match=f"^{name}={value!r} .*'auto'"):
        Execution(**changes)


def test_execution_repr_shows_arguments():
    assert repr(Execution(threads=2)) == "Execution(capture='auto', compile='auto', threads=2)"


class SlowMachine:
    """A clock that only model calls move, on a machine where one or several threads are slow.

    Attributes:
        slow_on: Numbers of threads on which a call takes 50 ms instead of 5 ms.
        calls: Number of threads of each model call so far.
    """

    def __init__(self, potential):
        self.now, self.slow_on, self.calls = 0.0, set(), []
        self._energies_and_forces = potential.energies_and_forces

    def perf_counter(self):
        return self.now

    def energies_and_forces(self, positions, edges):
        threads_now = torch.get_num_threads()
        self.calls.append(threads_now)
        self.now += 0.05 if threads_now in self.slow_on else 0.005
        return self._energies_and_forces(positions, edges)


@pytest.fixture
def machine(monkeypatch):
    """Return a potential and the machine that it runs on, which has four threads."""
    monkeypatch.setattr(threads, "_measurements", {})
    monkeypatch.setattr(threads, "MIN_PAUSE_S", 10.0)
    potential = triatomic(10.0)
    machine = SlowMachine(potential)
    monkeypatch.setattr(potential, "energies_and_forces", machine.energies_and_forces)
    for module in (threads, simulator_module):
        monkeypatch.setattr(module, "time", machine)
    with threads.on_threads(4):
        yield potential, machine


def windows_on(potential, machine, n_windows, execution, on_block_end=None):
    """Run windows of half a second each; return the numbers of threads that each of them used, and the simulator."""
    simulator = Simulator(potential, Langevin(), NonFinite(), execution=execution)
    state, used = simulator.prepare(torch.tensor(TRIATOMIC.positions)[None], seeded()), []
    for window in range(n_windows):
        simulator.forces.choose_threads(state.positions)
        machine.calls.clear()
        if on_block_end is not None:
            on_block_end(window)
        review = simulator.forces.review_threads

        def reviewed(positions, review=review, simulator=simulator):
            used.append(set(machine.calls))
            review(positions)

        simulator.forces.review_threads = reviewed
        state = simulator.run(state, 100, 10, seeded(1)).end
        simulator.forces.review_threads = review
    return used, simulator


def test_threads_change_between_windows_when_slow(machine):
    potential, clock = machine

    def become_busy(window):
        clock.now += 60.0
        clock.slow_on = {2, 4} if window >= 2 else set()

    used, simulator = windows_on(potential, clock, 5, Execution(compile=False), become_busy)
    assert used == [{4}, {4}, {4}, {1}, {1}], "the slow window is finished on the threads that it began with"
    assert simulator.forces.state_dict()["threads"] == 1
    assert torch.get_num_threads() == 4


def test_threads_return_when_the_machine_is_free(machine):
    potential, clock = machine
    clock.slow_on = {2, 4}

    def become_free(window):
        clock.now += 60.0
        if window == 2:
            clock.slow_on = {1, 2}

    used, _ = windows_on(potential, clock, 5, Execution(compile=False), become_free)
    assert used == [{1}, {1}, {1}, {4}, {4}]


@pytest.mark.parametrize("explicit", [4, None])
def test_explicit_threads_are_never_changed(machine, explicit):
    potential, clock = machine
    clock.slow_on = {2, 4}

    def wait(window):
        clock.now += 60.0
        clock.slow_on = set() if window == 0 else {2, 4}

    used, simulator = windows_on(potential, clock, 4, Execution(threads=explicit, compile=False), wait)
    assert used == [{4}] * 4
    assert simulator.forces.threads == explicit


def test_interrupted_window_keeps_threads(machine):
    """The window that is simulated again runs on the number of threads of its first attempt."""
    potential, clock = machine
    _, simulator = windows_on(potential, clock, 1, Execution(compile=False))
    before, start = simulator.forces.state_dict(), simulator.prepare(torch.tensor(TRIATOMIC.positions)[None], seeded())
    clock.now, clock.slow_on = clock.now + 60.0, {2, 4}

    def interrupt(steps):
        if steps > 60:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulator.run(start, 100, 10, seeded(1), interrupt)
    assert simulator.forces.state_dict()["threads"] == before["threads"] == 4
    assert torch.get_num_threads() == 4
