"""The batched simulator: frames, blocks, neighbor lists, and unstable replicas."""

import numpy as np
import pytest
import torch
from ase import Atoms
from toys import TRIATOMIC, Oscillators, PairRepulsion, as_potential, tiny_mace, triatomic

from stable_plugin import BondDeviation, Langevin, NonFinite, NoseHooverChain, System
from stable_plugin.md import Simulator
from stable_plugin.md.neighbors import NeighborList
from stable_plugin.md.window import NEVER
from stable_plugin.models import ModulePotential
from stable_plugin.units import FS


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def triatomic_start(n_replicas):
    return torch.tensor(TRIATOMIC.positions).repeat(n_replicas, 1, 1)


def triatomic_simulator(integrator=None, **changes):
    settings = {"check_every_fs": 5.0}
    return Simulator(triatomic(10.0), integrator or Langevin(400.0, 0.5, 5.0), NonFinite(), **{**settings, **changes})


def same(first, second):
    return all(torch.equal(mine, other) for mine, other in zip(first.tensors(), second.tensors(), strict=True))


def test_prepare_energies_and_forces_of_springs(generator):
    positions = triatomic_start(2)
    positions[1, 1] = torch.tensor([1.2, 0.0, 0.0], dtype=torch.float64)
    state = triatomic_simulator().prepare(positions, generator)
    other = np.hypot(0.3, 0.95) - 1.0
    expected = [0.5 * 10 * other**2, 0.5 * 10 * other**2 + 0.5 * 10 * 0.2**2]
    assert state.energies.tolist() == pytest.approx(expected, rel=1e-12)
    # A bond that is 0.2 Å too long along x has a force of 2 eV/Å.
    assert (state.forces[1] - state.forces[0])[1].tolist() == pytest.approx([-2.0, 0.0, 0.0])
    assert (state.forces[1] - state.forces[0])[0].tolist() == pytest.approx([2.0, 0.0, 0.0])
    assert torch.allclose(state.forces.sum(dim=1), torch.zeros(2, 3, dtype=torch.float64), atol=1e-14)


def test_prepare_uses_or_draws_velocities():
    velocities = torch.ones(2, 3, 3)
    simulator = triatomic_simulator()
    assert torch.equal(simulator.prepare(triatomic_start(2), seeded(), velocities).velocities, velocities.double())
    assert simulator.prepare(triatomic_start(2), seeded()).velocities.unique().numel() == 18


@pytest.mark.parametrize("integrator", [Langevin(400.0, 0.5, 5.0), NoseHooverChain(400.0, 0.5)])
def test_run_records_frames_at_their_steps(integrator):
    simulator = triatomic_simulator(integrator)
    start = simulator.prepare(triatomic_start(3), seeded())
    window = simulator.run(start, 35, 10, seeded(1))
    assert window.positions.shape == window.velocities.shape == (3, 3, 3, 3)
    state, generator = start, seeded(1)
    for frame in range(3):
        state = simulator.run(state, 10, 10, generator).end
        assert torch.equal(window.positions[frame], state.positions)
        assert torch.equal(window.velocities[frame], state.velocities)
    assert same(window.end, simulator.run(state, 5, 10, generator).end)
    assert same(window.start, start)
    assert window.valid.all()
    assert window.duration_ps == pytest.approx(0.0175)


def test_run_end_has_forces_of_its_positions():
    simulator = triatomic_simulator()
    end = simulator.run(simulator.prepare(triatomic_start(3), seeded()), 30, 10, seeded(1)).end
    assert same(end, simulator.refresh(end))


def test_refresh_uses_present_weights():
    simulator = triatomic_simulator()
    state = simulator.prepare(triatomic_start(2), seeded())
    with torch.no_grad():
        simulator.potential.module.log_k += torch.log(torch.tensor(3.0))
    fresh = simulator.refresh(state)
    assert torch.allclose(fresh.energies, 3.0 * state.energies)
    assert torch.allclose(fresh.forces, 3.0 * state.forces)
    assert torch.equal(fresh.velocities, state.velocities)


def test_run_shorter_than_a_record_has_no_frames():
    simulator = triatomic_simulator()
    window = simulator.run(simulator.prepare(triatomic_start(2), seeded()), 6, 10, seeded(1))
    assert window.positions.shape == (0, 2, 3, 3)
    assert window.frames().shape == (0, 3, 3)
    assert not window.unstable.any()


def test_run_calls_on_block_end():
    simulator = triatomic_simulator()
    steps = []
    start = simulator.prepare(triatomic_start(1), seeded())
    simulator.run(start, 50, 10, seeded(1), on_block_end=steps.append)
    assert steps == list(range(5, 51, 5))


def test_run_restores_module_and_keeps_no_graph():
    simulator = triatomic_simulator()
    module = simulator.potential.module
    module.train()
    window = simulator.run(simulator.prepare(triatomic_start(2), seeded()), 20, 10, seeded(1))
    assert module.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in module.parameters())
    assert not any(tensor.requires_grad for tensor in [window.positions, window.velocities, *window.end.tensors()])


def aspirin_run(potential, positions, **settings):
    simulator = Simulator(potential, Langevin(500.0, 0.5, 1.0), NonFinite(), check_every_fs=6.0, **settings)
    start = simulator.prepare(positions, seeded())
    return simulator.run(start, 24, 12, seeded(1)), simulator


def test_block_length_does_not_change_trajectory(aspirin_frames, aspirin_positions):
    system = System.from_atoms(aspirin_frames[0])
    potential = as_potential(tiny_mace(system.numbers, atomic_inter_scale=20.0), system)
    expected, _ = aspirin_run(potential, aspirin_positions[:3], block_steps=1)
    assert (expected.positions[-1] - expected.positions[0]).abs().max() > 0.05
    for block_steps in (4, 12):
        window, _ = aspirin_run(potential, aspirin_positions[:3], block_steps=block_steps)
        assert torch.allclose(window.positions, expected.positions, rtol=0, atol=1e-10)
        assert torch.allclose(window.velocities, expected.velocities, rtol=0, atol=1e-10)
        assert torch.allclose(window.end.forces, expected.end.forces, rtol=0, atol=1e-10)


def hot_gas(skin_A=1.0, *, periodic=True, fixed=False, block_steps=20, blind=False):
    """Soft spheres just beyond the cutoff that move inside it; ``blind`` disables the check for missing edges."""
    grid = torch.stack(torch.meshgrid(*[torch.arange(2.0)] * 3, indexing="ij"), dim=-1).reshape(-1, 3)
    positions = 2.7 * grid.double().repeat(3, 1, 1)
    # Wide enough for images to be beyond the cutoff: the same trajectory with and without them.
    system = System.from_atoms(Atoms("H8", positions=positions[0].numpy(), cell=[40.0] * 3, pbc=periodic), bonds=[])
    potential, integrator = PairRepulsion(system), Langevin(2000.0, 0.5, 2.0)
    simulator = Simulator(
        potential, integrator, NonFinite(), check_every_fs=10.0, block_steps=block_steps, skin_A=skin_A
    )
    simulator.neighbors = NeighborList(potential.cutoff, skin_A, system, fixed=fixed)
    if blind:
        simulator.neighbors.did_overflow = lambda positions: torch.zeros(len(positions), dtype=torch.bool)
    generator = seeded(1)
    start = simulator.prepare(positions, seeded())
    inwards = start.replace(velocities=start.velocities - 0.02 / FS * (positions - 1.35))
    window = simulator.run(inwards, 160, 20, generator)
    return window, simulator.repeated_blocks, generator.get_state()


@pytest.fixture(scope="module")
def free_gas():
    """Return the trajectory from all pairs, which cannot miss an edge."""
    window, repeated, noise = hot_gas(periodic=False)
    assert repeated == 0
    return window, noise


def same_trajectory(window, expected):
    return torch.allclose(window.positions, expected.positions, rtol=0, atol=1e-11) and torch.allclose(
        window.velocities, expected.velocities, rtol=0, atol=1e-11
    )


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("skin", [0.0, 0.3])
def test_small_skin_repeats_blocks_exactly(free_gas, skin, fixed):
    expected, noise = free_gas
    window, repeated, noise_after = hot_gas(skin, fixed=fixed)
    assert repeated >= 1
    assert same_trajectory(window, expected)
    assert torch.equal(noise_after, noise), "a repeated block draws the same random numbers again"


def test_unchecked_overflow_changes_trajectory(free_gas):
    window, repeated, _ = hot_gas(0.0, blind=True)
    assert repeated == 0
    assert not same_trajectory(window, free_gas[0])


def test_sufficient_skin_repeats_no_block(free_gas):
    window, repeated, _ = hot_gas(3.0, block_steps=4)
    assert repeated == 0
    assert same_trajectory(window, free_gas[0])


def test_fixed_edges_are_reallocated(free_gas):
    """At the start no pair is within the cutoff, and the capacity is zero."""
    window, repeated, noise_after = hot_gas(periodic=False, fixed=True)
    assert repeated >= 1
    assert same_trajectory(window, free_gas[0])
    assert torch.equal(noise_after, free_gas[1])


BREAKS_AT = 1.4
FRAGILE = 2


def fragile_run(broken, breaks_at=BREAKS_AT, every=4):
    """Five molecules whose energy is NaN beyond a bond length; one of them may dissociate."""
    potential = triatomic(10.0, breaks_at)
    simulator = Simulator(potential, Langevin(300.0, 0.5, 1.0), NonFinite(), check_every_fs=every * 0.5, block_steps=20)
    start = simulator.prepare(triatomic_start(5), seeded())
    if broken:
        velocities = start.velocities.clone()
        velocities[FRAGILE, 1, 0] += 0.16 / FS
        start = start.replace(velocities=velocities)
    return simulator.run(start, 60, every, seeded(1))


def test_nan_replica_changes_no_other():
    healthy, broken = fragile_run(broken=False), fragile_run(broken=True)
    others = [replica for replica in range(5) if replica != FRAGILE]
    assert broken.stopped.tolist() == [replica == FRAGILE for replica in range(5)]
    assert not healthy.stopped.any()
    for attribute in ("positions", "velocities", "valid"):
        assert torch.equal(getattr(broken, attribute)[:, others], getattr(healthy, attribute)[:, others])
    for mine, other in zip(broken.end.tensors(), healthy.end.tensors(), strict=True):
        assert torch.equal(mine[others], other[others])


def test_nan_replica_is_flagged_and_stays_finite():
    # The same trajectory with a bond that never breaks shows when the energy became NaN.
    unbreakable = fragile_run(broken=True, breaks_at=float("inf"), every=1)
    arms = unbreakable.positions[:, FRAGILE, 1:] - unbreakable.positions[:, FRAGILE, :1]
    too_long = (arms.norm(dim=-1) >= BREAKS_AT).any(dim=-1)
    step = int(too_long.nonzero()[0]) + 1
    assert step % 4, "the step is not one of the detector's checks"
    assert 4 < step < 50

    window = fragile_run(broken=True)
    assert window.unstable_step.tolist() == [step if replica == FRAGILE else NEVER for replica in range(5)]
    assert window.unstable_fraction == pytest.approx(0.2)
    recorded_at = torch.arange(4, 61, 4)
    assert window.valid[:, FRAGILE].tolist() == (recorded_at < step).tolist()
    assert len(window.frames()) == 4 * 15 + int((recorded_at < step).sum())
    assert window.frames().isfinite().all()
    assert torch.equal(window.end.positions[FRAGILE], unbreakable.positions[step - 2, FRAGILE])
    assert window.end.finite().all()


def test_nonfinite_start_is_flagged_at_step_zero(aspirin_frames, aspirin_positions):
    system = System.from_atoms(aspirin_frames[0])
    potential = as_potential(tiny_mace(system.numbers), system)
    healthy, _ = aspirin_run(potential, aspirin_positions[:3])
    positions = aspirin_positions[:3].clone()
    positions[1, 4] = torch.nan
    window, _ = aspirin_run(potential, positions)
    assert window.unstable_step.tolist() == [NEVER, 0, NEVER]
    assert window.stopped.tolist() == [False, True, False]
    assert not window.valid[:, 1].any()
    others = [0, 2]
    assert torch.allclose(window.positions[:, others], healthy.positions[:, others], rtol=0, atol=1e-12)


TIMESTEP_FS = 1.0
CHECK_EVERY = 5
SPEEDS = (0.0, 0.007, 0.021)
"""Speeds in Å/fs at which the atoms of three free pairs separate."""


def flight(n_steps=50, **settings):
    """Free flight: the distance of replica r after n steps is 1 + SPEEDS[r] n."""
    system = System.from_atoms(Atoms("N2", positions=[[0, 0, 0], [0, 0, 1.0]]))
    positions = torch.tensor([[[0.0, 0, 0], [0, 0, 1.0]]], dtype=torch.float64).repeat(3, 1, 1)
    detector = BondDeviation(threshold=0.25, discard=0.6)
    detector.bind(system, positions)
    velocities = torch.zeros_like(positions)
    velocities[:, 1, 2] = torch.tensor(SPEEDS) / FS
    simulator = Simulator(
        ModulePotential(Oscillators(0.0), system),
        Langevin(300.0, TIMESTEP_FS, friction_per_ps=0.0),
        detector,
        check_every_fs=CHECK_EVERY * TIMESTEP_FS,
        block_steps=12,
    )
    return simulator.run(simulator.prepare(positions, seeded(), velocities), n_steps, 10, seeded(1), **settings)


def distances(positions):
    return (positions[..., 1, :] - positions[..., 0, :]).norm(dim=-1)


def test_unstable_replica_continues():
    window = flight()
    # 0.007 · 36 > 0.25: flagged at the next check, step 40. 0.021 · 12 > 0.25: step 15.
    assert window.unstable_step.tolist() == [NEVER, 40, 15]
    assert window.valid[:, :2].all()
    assert distances(window.end.positions)[1].item() == pytest.approx(1.0 + 0.007 * 50)
    assert distances(window.positions)[:, 1].tolist() == pytest.approx([1.0 + 0.07 * n for n in range(1, 6)])


def test_discarded_replica_is_stopped():
    window = flight()
    assert window.stopped.tolist() == [False, False, True]
    # 0.021 · 29 > 0.6: stopped at step 30.
    assert window.valid[:, 2].tolist() == [True, True, False, False, False]
    assert distances(window.positions)[:, 2].tolist() == pytest.approx([1.21, 1.42, 1.63, 1.63, 1.63])
    assert distances(window.end.positions)[2].item() == pytest.approx(1.63)


def test_stop_unstable_stops_at_the_threshold():
    window = flight(stop_unstable=True)
    assert window.unstable_step.tolist() == [NEVER, 40, 15]
    assert window.stopped.tolist() == [False, True, True]
    assert window.valid[:, 2].tolist() == [True, False, False, False, False]
    assert window.valid[:, 1].tolist() == [True, True, True, False, False]
    assert distances(window.end.positions).tolist() == pytest.approx([1.0, 1.0 + 0.007 * 40, 1.0 + 0.021 * 15])


def test_inactive_replicas_record_nothing():
    window = flight(active=torch.tensor([True, True, False]))
    assert torch.equal(window.end.positions[2], window.start.positions[2])
    assert not window.valid[:, 2].any()
    assert window.unstable_step.tolist() == [NEVER, 40, NEVER]
    assert torch.equal(window.positions[:, :2], flight().positions[:, :2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"check_every_fs": 0.7}, r"check_every_fs=0\.7 fs is not a whole number of timesteps"),
        ({"block_steps": 0}, r"block_steps=0"),
        ({"skin_A": -0.1}, r"skin_A=-0\.1"),
    ],
)
def test_simulator_rejects_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        triatomic_simulator(**changes)


def test_run_rejects_frames_between_checks():
    simulator = triatomic_simulator(check_every_fs=2.0)
    start = simulator.prepare(triatomic_start(1), seeded())
    with pytest.raises(ValueError, match=r"record_every=6 steps is not a multiple of the 4 steps.*record_every_fs"):
        simulator.run(start, 20, 6, seeded())
    with pytest.raises(ValueError, match=r"n_steps=0"):
        simulator.run(start, 0, 4, seeded())


def periodic_simulator():
    atoms = Atoms("N2", positions=[[0, 0, 0], [0, 0, 1.0]], cell=[[8.0, 0, 0], [1.0, 7.0, 0], [0, 0, 9.0]], pbc=True)
    return Simulator(PairRepulsion(System.from_atoms(atoms)), Langevin(), NonFinite()), atoms


def test_place_sets_the_cell_of_each_replica():
    simulator, atoms = periodic_simulator()
    state = simulator.place(torch.tensor(atoms.positions).repeat(3, 1, 1), seeded())
    assert torch.equal(state.cell, torch.tensor(atoms.cell.array).repeat(3, 1, 1))
    isolated = triatomic_simulator().place(triatomic_start(2), seeded())
    assert torch.equal(isolated.cell, torch.zeros(2, 3, 3, dtype=torch.float64))


def test_run_keeps_the_cell():
    simulator, atoms = periodic_simulator()
    start = simulator.prepare(torch.tensor(atoms.positions).repeat(3, 1, 1), seeded())
    end = simulator.run(start, 20, 10, seeded(1)).end
    assert end.cell is start.cell, "no step computes with it"


def test_simulator_repr_shows_arguments():
    simulator, _ = periodic_simulator()
    shown = repr(simulator)
    assert shown.startswith("Simulator(potential=")
    assert "integrator=Langevin(temperature_K=300.0, timestep_fs=0.5, friction_per_ps=1.0)" in shown
    assert "check_every_fs=5, block_steps=5, skin_A=1.0, execution=Execution(capture='auto'" in shown


def test_window_repr_shows_its_size():
    assert repr(flight()) == (
        "Window(n_frames=5, n_replicas=3, n_atoms=2, n_steps=50, timestep_fs=1.0, unstable_fraction=0.666667)"
    )
