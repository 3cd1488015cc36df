"""Out of memory: smaller model calls, and the same results."""

import logging
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from toys import as_potential, flat, tiny_mace

from stable_plugin import BondLengths, Langevin, NonFinite, System
from stable_plugin.algorithm.estimator import BoltzmannEstimator
from stable_plugin.md import Execution, Simulator
from stable_plugin.runtime.memory import is_out_of_memory


def limited(potential, most):
    """Return the potential, out of memory for more than ``most`` frames at once, and the batch sizes of its calls."""
    sizes = []
    plain = potential.atomic_energies

    def scarce(positions, edges):
        sizes.append(len(positions))
        if len(positions) > most:
            raise torch.OutOfMemoryError(f"tried to allocate {len(positions)} replicas")
        return plain(positions, edges)

    potential.atomic_energies = scarce
    potential.energies = lambda positions, edges: scarce(positions, edges).sum(dim=1)
    return potential, sizes


def aspirin_potential(frames):
    system = System.from_atoms(frames[0])
    return as_potential(tiny_mace(system.numbers), system)


def estimate(potential, positions, chunk):
    observable = BondLengths(target=[1.0] * len(potential.system.bonds))
    observable.bind(potential.system, positions)
    estimator = BoltzmannEstimator(potential, 500.0, chunk)
    return estimator.estimate(positions, [observable.per_frame(positions)], [observable.known_target]), estimator


def test_estimator_halves_its_chunk(aspirin_frames, aspirin_positions, caplog):
    positions = aspirin_positions[:10]
    expected, _ = estimate(aspirin_potential(aspirin_frames), positions, chunk=8)
    potential, sizes = limited(aspirin_potential(aspirin_frames), most=3)
    found, estimator = estimate(potential, positions, chunk=8)
    assert estimator.chunk == 2
    assert sizes == [8, 4, 2, 2, 2, 2, 2], "every frame is evaluated once"
    torch.testing.assert_close(flat(found.gradients), flat(expected.gradients), rtol=1e-10, atol=1e-12)
    assert [record.getMessage().count("chunk=") for record in caplog.records] == [1, 1]
    caplog.clear()
    estimator.energies(positions)
    assert not caplog.records


@pytest.mark.parametrize("error", [RuntimeError("some other fault"), torch.OutOfMemoryError("even for one")])
def test_other_errors_are_raised(aspirin_frames, error):
    potential = aspirin_potential(aspirin_frames)

    def fail(positions, edges):
        raise error

    potential.atomic_energies = fail
    positions = torch.tensor(aspirin_frames[0].positions).repeat(4, 1, 1)
    with pytest.raises(type(error), match=str(error)):
        BoltzmannEstimator(potential, 500.0, 2).energies(positions)
    potential.energies = fail
    simulator = Simulator(potential, Langevin(500.0), NonFinite(), execution=Execution(compile=False, threads=1))
    with pytest.raises(type(error), match=str(error)):
        simulator.prepare(positions, torch.Generator().manual_seed(0))


def window(potential, positions):
    simulator = Simulator(
        potential, Langevin(500.0, 0.5, 1.0), NonFinite(), execution=Execution(compile=False, threads="auto")
    )
    generator = torch.Generator().manual_seed(0)
    return simulator.run(simulator.prepare(positions, generator), 20, 10, generator), simulator


@pytest.mark.parametrize("n_replicas", [8, 5])
def test_simulator_halves_its_batch(aspirin_frames, aspirin_positions, n_replicas, caplog):
    positions = aspirin_positions[:n_replicas]
    expected, _ = window(aspirin_potential(aspirin_frames), positions)
    potential, sizes = limited(aspirin_potential(aspirin_frames), most=3)
    with caplog.at_level(logging.WARNING):
        found, simulator = window(potential, positions)
    assert simulator.forces.max_replicas == (2 if n_replicas == 8 else 3)
    assert max(sizes[sizes.index(2) :] if 2 in sizes else [0]) <= 3
    torch.testing.assert_close(found.positions, expected.positions, rtol=0.0, atol=1e-9)
    assert 1 <= len(caplog.records) <= 2


def test_is_out_of_memory():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**61, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("a shape that does not fit"))
    assert not is_out_of_memory(ValueError())


SCARCE = """
    import resource
    import torch
    from ase.io import read
    from stable_plugin import System
    from stable_plugin.algorithm.estimator import BoltzmannEstimator
    from toys import as_potential, tiny_mace

    torch.set_num_threads(1)
    frames = read("recipes/data/aspirin_train.extxyz", ":4")
    system = System.from_atoms(frames[0])
    estimator = BoltzmannEstimator(as_potential(tiny_mace(system.numbers, channels=16), system), 500.0, chunk=1024)
    few = torch.stack([torch.as_tensor(frame.positions) for frame in frames])
    for _ in range(3):
        expected = estimator.energies(few)
    held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + 150 * 2**20, resource.RLIM_INFINITY))
    found = estimator.energies(few.repeat(256, 1, 1))
    assert estimator.chunk < 1024, "the limit had no effect"
    torch.testing.assert_close(found, expected.repeat(256))
    print("chunk", estimator.chunk)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits and sizes of a process as on Linux")
def test_process_out_of_memory_continues():
    tests = Path(__file__).parents[1]
    program = f"import sys; sys.path.insert(0, {str(tests / 'support')!r})\n{textwrap.dedent(SCARCE)}"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tests.parent, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "out of memory: the estimator continues with chunk=512" in done.stderr
