"""Captured blocks on a CUDA device; needs MACE."""

import numpy as np
import pytest
import torch
from ase.build import molecule
from observable_tools import water_grid
from toys import Oscillators, as_potential, tiny_mace

from stable_plugin import BondDeviation, Execution, Langevin, NonFinite, NoseHooverChain, System
from stable_plugin.md import Simulator
from stable_plugin.md.state import kinetic_temperature
from stable_plugin.models import ModulePotential

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

PLAIN, CAPTURED = Execution(capture=False), Execution(capture=True)


def seeded(device, seed=0):
    return torch.Generator(device).manual_seed(seed)


def systems():
    return {"aspirin-sized molecule": molecule("C6H6"), "periodic water": water_grid(6.4)}


@pytest.fixture(params=list(systems()))
def atoms(request):
    return systems()[request.param]


def simulator_of(atoms, device, execution, integrator=None, detector=None, scale=1.0):
    model = tiny_mace(atoms.numbers, channels=8, r_max=3.0, atomic_inter_scale=scale).to(device)
    potential = as_potential(model, System.from_atoms(atoms))
    detector = detector or BondDeviation(0.3, 3.0)
    positions = torch.tensor(atoms.positions, device=device)[None]
    detector.bind(potential.system, positions)
    integrator = integrator or Langevin(300.0, 0.5, 1.0)
    return Simulator(potential, integrator, detector, check_every_fs=5.0, execution=execution)


def start_of(simulator, atoms, n_replicas=4):
    random = np.random.default_rng(0)
    frames = atoms.positions + 0.02 * random.normal(size=(n_replicas, len(atoms), 3))
    velocities = 0.02 * random.normal(size=frames.shape)
    return simulator.prepare(torch.tensor(frames), seeded(simulator.potential.device), torch.tensor(velocities))


def windows_of(simulator, atoms, n_windows=3, n_steps=60, n_replicas=4):
    generator = seeded(simulator.potential.device, 1)
    state, windows = start_of(simulator, atoms, n_replicas), []
    for _ in range(n_windows):
        windows.append(simulator.run(simulator.refresh(state), n_steps, 20, generator))
        state = windows[-1].end
        with torch.no_grad():
            for parameter in simulator.potential.module.parameters():
                parameter.mul_(1.01)
    return windows


def close(windows, expected, tolerance=1e-7):
    """Return whether windows agree to rounding: a GPU sums in any order, and trajectories diverge."""
    return all(
        torch.allclose(mine.positions.cpu(), other.positions.cpu(), rtol=0, atol=tolerance)
        and torch.equal(mine.unstable_step.cpu(), other.unstable_step.cpu())
        for mine, other in zip(windows, expected, strict=True)
    )


@pytest.mark.parametrize(
    "integrator", [Langevin(300.0, 0.5, 0.0), Langevin(300.0, 0.5, 2.0), NoseHooverChain(300.0, 0.5)]
)
def test_captured_run_matches_eager_run(atoms, integrator):
    expected = windows_of(simulator_of(atoms, "cuda", PLAIN, integrator), atoms)
    simulator = simulator_of(atoms, "cuda", CAPTURED, integrator)
    assert close(windows_of(simulator, atoms), expected)
    assert simulator.capturing
    assert (expected[0].positions[-1] - expected[0].positions[0]).abs().max() > 1e-3


def test_gpu_trajectory_matches_cpu(atoms):
    integrator = Langevin(300.0, 0.5, 0.0)
    expected = windows_of(simulator_of(atoms, "cpu", PLAIN, integrator), atoms, n_windows=1)
    assert close(windows_of(simulator_of(atoms, "cuda", CAPTURED, integrator), atoms, n_windows=1), expected)


def test_new_weights_are_not_captured_again():
    atoms = molecule("C6H6")
    simulator = simulator_of(atoms, "cuda", CAPTURED)
    windows_of(simulator, atoms, n_windows=4, n_replicas=2)  # few enough for all pairs to fit the first capacity
    assert simulator.graphs.captures == 2


def test_replays_draw_new_noise_from_the_seed():
    atoms = molecule("C6H6")

    def run(seed):
        simulator = simulator_of(atoms, "cuda", CAPTURED)
        state = start_of(simulator, atoms)
        generator = seeded("cuda", seed)
        return [simulator.run(state, 20, 20, generator).positions.cpu() for _ in range(2)]

    first, second = run(1)
    again, _ = run(1)
    other, _ = run(2)
    assert (first - second).abs().max() > 1e-3
    assert (first - other).abs().max() > 1e-3
    assert torch.allclose(first, again, rtol=0, atol=1e-8)


def test_captured_run_has_the_temperature():
    atoms = molecule("H2O")
    system = System.from_atoms(atoms)
    potential = ModulePotential(Oscillators(5.0).to("cuda"), system)
    simulator = Simulator(potential, Langevin(300.0, 0.5, 20.0), NonFinite(), check_every_fs=5.0, execution=CAPTURED)
    generator = seeded("cuda")
    state = simulator.prepare(torch.zeros(256, 3, 3, dtype=torch.float64), generator)
    state = simulator.run(state, 500, 500, generator).end
    window = simulator.run(state, 1000, 100, generator)
    temperatures = kinetic_temperature(window.velocities, potential.system.masses).flatten()
    error = temperatures.std() / len(temperatures) ** 0.5
    assert abs(temperatures.mean() - 300.0) < 4.0 * error


def test_captured_run_flags_like_eager_run():
    atoms = molecule("C6H6")

    def flagged(execution):
        integrator, detector = Langevin(300.0, 0.5, 0.0), BondDeviation(0.8, 2.0)
        simulator = simulator_of(atoms, "cuda", execution, integrator, detector, scale=0.01)  # atoms fly nearly freely
        state = start_of(simulator, atoms)
        velocities = state.velocities.clone()
        velocities[1, 0] += 1.0
        return simulator.run(state.replace(velocities=velocities), 100, 20, seeded("cuda"))

    captured, plain = flagged(CAPTURED), flagged(PLAIN)
    assert captured.unstable.tolist() == [False, True, False, False]
    assert captured.unstable_step.tolist() == plain.unstable_step.tolist()
    assert captured.stopped.tolist() == plain.stopped.tolist()


def test_captured_batch_shrinks():
    atoms = molecule("C6H6")

    def run(execution):
        integrator, detector = Langevin(300.0, 0.5, 0.0), BondDeviation(0.8, 2.0)
        simulator = simulator_of(atoms, "cuda", execution, integrator, detector, scale=0.01)
        state = start_of(simulator, atoms)
        velocities = state.velocities.clone()
        velocities[:3, 0] += torch.tensor([1.0, 0.8, 1.0], device="cuda")[:, None]
        window = simulator.run(state.replace(velocities=velocities), 100, 20, seeded("cuda"), stop_unstable=True)
        return window, simulator.graphs.captures

    (captured, captures), (plain, _) = run(CAPTURED), run(PLAIN)
    assert captured.unstable_step.tolist() == plain.unstable_step.tolist()
    assert captured.unstable.tolist() == [True, True, True, False]
    assert captures >= 3, "for batches of four, of one, and between"
    assert torch.allclose(captured.positions[:, 3], plain.positions[:, 3], rtol=0, atol=1e-7)


def test_step_does_not_read_the_host(atoms):
    simulator = simulator_of(atoms, "cuda", PLAIN)
    state = start_of(simulator, atoms)
    simulator.run(state, 20, 20, seeded("cuda"))  # TorchScript specializes in the first calls
    block, calls = simulator._block, []

    def watched(*arguments, **keywords):
        torch.cuda.set_sync_debug_mode("error")
        try:
            calls.append(1)
            return block(*arguments, **keywords)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    simulator._block = watched
    simulator.run(state, 20, 20, seeded("cuda"))
    assert len(calls) == 4


def test_model_that_reads_the_host_runs_eagerly(caplog):
    class Reading(Oscillators):
        def forward(self, positions):
            return super().forward(positions) * (1.0 if positions.sum().item() > -1e9 else 0.0)

    system = System.from_atoms(molecule("H2O"))
    potential = ModulePotential(Reading(5.0).to("cuda"), system)

    def run(capture):
        simulator = Simulator(potential, Langevin(), NonFinite(), execution=Execution(capture=capture))
        generator = seeded("cuda")
        state = simulator.prepare(torch.zeros(2, 3, 3, dtype=torch.float64), generator)
        return simulator.run(state, 40, 20, generator).positions

    expected = run(False)
    assert torch.allclose(run("auto"), expected, rtol=0, atol=1e-9)
    assert "Reading cannot be captured" in caplog.text
    with pytest.raises(RuntimeError, match="capture=True: Reading cannot be captured"):
        run(True)
