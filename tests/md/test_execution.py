"""Compiled energies and chosen threads: other speed, same numbers."""

import logging

import pytest
import torch
from toys import as_potential, tiny_mace, triatomic

from stable_plugin import BondDeviation, BondLengths, Langevin, NonFinite, Schedule, System
from stable_plugin.algorithm.training_loop import TrainingLoop
from stable_plugin.md import Execution, Simulator
from stable_plugin.md.backends import forces
from stable_plugin.md.backends.compiled import CompiledForces
from stable_plugin.runtime import threads
from stable_plugin.runtime.threads import fastest_threads, on_threads


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
def test_compiled_energies_and_forces_are_those_of_the_model(
    aspirin_potential, compiled_aspirin, aspirin_positions, spread
):
    positions = spread * aspirin_positions[:2]
    edges = aspirin_potential.edges(positions)
    with aspirin_potential.frozen():
        energies, forces = aspirin_potential.energies_and_forces(positions, edges)
        ours = compiled_aspirin(positions, edges)
    assert torch.allclose(ours[0].double(), energies.double(), rtol=1e-9, atol=1e-9)
    assert torch.allclose(ours[1], forces, rtol=1e-8, atol=1e-9)


def test_neither_new_weights_nor_another_number_of_edges_compile_anything_again(aspirin_frames, aspirin_positions):
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


def test_a_compiled_simulation_goes_the_way_of_a_plain_one(aspirin_potential, aspirin_positions):
    expected, _ = run(aspirin_potential, aspirin_positions[:2], compile=False)
    window, simulator = run(aspirin_potential, aspirin_positions[:2], compile=True)
    assert simulator.forces.compiled
    assert torch.allclose(window.positions, expected.positions, rtol=0, atol=1e-9)
    assert all(parameter.requires_grad for parameter in aspirin_potential.module.parameters())
    assert all(parameter.grad is None for parameter in aspirin_potential.module.parameters())


def test_any_torch_module_can_be_compiled():
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


def test_without_a_compiler_the_simulation_goes_on_and_says_so(monkeypatch, caplog):
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


def test_a_compiled_model_with_other_forces_is_refused(monkeypatch):
    potential = triatomic(10.0)
    positions = torch.randn(1, 3, 3, generator=seeded(), dtype=torch.float64)
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda *arguments: 1.1 * function(*arguments))
    with pytest.raises(ValueError, match=r"compiled Springs gives forces that are off by"):
        CompiledForces(potential)(positions, potential.edges(positions))


def test_a_short_simulation_is_not_compiled():
    positions = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [-0.3, 0.95, 0]]], dtype=torch.float64)
    potential = triatomic(10.0)
    detector = BondDeviation()
    detector.bind(potential.system, positions)
    simulator = Simulator(potential, Langevin(), detector)
    simulator.run(simulator.prepare(positions, seeded()), 20, 10, seeded(1))
    assert simulator.forces.compiled is False


def test_a_choice_that_is_put_back_is_not_made_again():
    positions = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [-0.3, 0.95, 0]]], dtype=torch.float64)
    potential = triatomic(10.0)
    first = forces.Forces(potential, Execution())
    first.load_state_dict({"threads": 3, "compiled": False})
    first.expected_steps = 10**12
    assert first.choose_threads(positions) == 3
    first.settle(positions)
    assert first.state_dict() == {"threads": 3, "compiled": False}
    asked = forces.Forces(potential, Execution(threads=1, compile=False))
    asked.load_state_dict({"threads": 3, "compiled": True})
    assert asked.state_dict() == {"threads": 1, "compiled": False}, "what is asked for goes first"


@pytest.fixture
def three_threads(monkeypatch):
    monkeypatch.setattr(threads, "_fastest", {})
    # A clock that only calls move: real ones go by the machine's other work too.
    monkeypatch.setattr(threads.time, "perf_counter", lambda: Clock.now)
    with on_threads(3):
        yield


class Clock:
    now = 0.0


def slow_on(slow):
    def call():
        Clock.now += 0.02 if torch.get_num_threads() in slow else 0.005

    return call


@pytest.mark.parametrize(("slow", "expected"), [({2, 3}, 1), ({1, 3}, 2), ({1, 2}, 3), (set(), 3)])
def test_the_fastest_number_of_threads_is_taken_and_torchs_own_in_doubt(three_threads, slow, expected):
    assert fastest_threads("call", slow_on(slow)) == expected
    assert torch.get_num_threads() == 3


def test_a_kind_of_call_is_measured_once(three_threads):
    assert fastest_threads("call", slow_on({2, 3})) == 1
    assert fastest_threads("call", slow_on({1})) == 1
    assert fastest_threads("another", slow_on({1})) != 1


def test_a_simulation_runs_on_the_threads_asked_for_and_puts_them_back():
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


def test_a_loop_hands_its_execution_on_and_saves_what_was_chosen(aspirin_potential, aspirin_positions):
    def loop(execution=None):
        return TrainingLoop(
            aspirin_potential,
            aspirin_positions[:2],
            aspirin_positions,
            integrator=Langevin(500.0),
            observables=[BondLengths()],
            detector=BondDeviation(0.5),
            n_replicas=2,
            window_ps=0.01,
            record_every_fs=5.0,
            execution=execution,
            schedule=Schedule(stable_ps=0.05, max_windows=3),
        )

    first = loop(Execution(threads=2, compile=False))
    assert first.simulator.execution.threads == 2
    assert first.simulator.forces.expected_steps == (5 + 3) * 20
    saved = first.state_dict()
    assert saved["forces"] == {"threads": 2, "compiled": False}
    resumed = loop()
    resumed.load_state_dict(saved)
    assert resumed.simulator.forces.state_dict() == saved["forces"]
