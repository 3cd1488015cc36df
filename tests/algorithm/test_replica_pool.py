"""The replicas between two windows: probes, restart, failures, rollback, and what a checkpoint restores."""

from dataclasses import replace

import pytest
import torch
from ase import Atoms
from springs import SOFT, STIFF, TEMPERATURE, make_loop
from threaded_contexts import ThreadedContexts
from toys import TRIATOMIC, Springs, triatomic

from stable_plugin import System
from stable_plugin.algorithm.replica_pool import UnusablePotentialError
from stable_plugin.md.state import kinetic_temperature
from stable_plugin.models import ModulePotential
from stable_plugin.runtime.distributed import DistributedContext

N_REPLICAS = 24


def make_pool(stiffness, reference, **changes):
    return make_loop(triatomic(stiffness), reference, **changes).replicas


def simulated(pool):
    """Simulate one window from the present state, with the forces of the present weights."""
    return pool.simulate(pool.simulator.refresh(pool.state), lambda steps: None)


def start_frames(reference):
    """Return the structures that ``make_loop`` starts replicas from, as a set of plain values."""
    return {tuple(frame.flatten().tolist()) for frame in reference[:10]}


def is_fresh(state, reference):
    """Whether each replica is in a start frame, (n_replicas,)."""
    frames = start_frames(reference)
    return [tuple(positions.flatten().tolist()) in frames for positions in state.positions]


def equal(one, other, replicas=slice(None)):
    """Whether two states agree to the last bit, for some replicas."""
    return all(torch.equal(a[replicas], b[replicas]) for a, b in zip(one.tensors(), other.tensors(), strict=True))


@pytest.fixture
def mixed(reference):
    """Return a pool and a window in which some replicas became unstable."""
    pool = make_pool(2.5, reference)
    window = simulated(pool)
    assert 0 < window.unstable.sum() < N_REPLICAS
    return pool, window


def test_replicas_take_structures_in_turn(reference):
    pool = make_pool(SOFT, reference)
    assert torch.equal(pool.state.positions, reference[:10].repeat(3, 1, 1)[:N_REPLICAS])
    assert pool.n_replicas == N_REPLICAS
    assert pool.probe_start is pool.state


def test_replicas_of_a_rank_continue_the_turn(reference):
    pool = make_pool(SOFT, reference, context=DistributedContext(rank=1, size=2))
    expected = reference[:10].repeat(5, 1, 1)[N_REPLICAS : 2 * N_REPLICAS]
    assert torch.equal(pool.state.positions, expected)


def test_velocities_of_ranks_differ(reference):
    first, second = (
        make_pool(SOFT, reference, context=DistributedContext(rank=rank, size=2)).state.velocities for rank in (0, 1)
    )
    assert not torch.equal(first, second)


def test_advance_restarts_unstable_replicas_only(mixed, reference):
    pool, window = mixed
    pool.advance(window)
    assert equal(pool.state, window.end, ~window.unstable)
    assert is_fresh(pool.state, reference) == window.unstable.tolist()
    assert torch.equal(pool.state.forces, pool.simulator.refresh(pool.state).forces)


def test_restart_draws_frames_and_velocities_anew(mixed):
    pool, window = mixed
    everyone = replace(window, unstable_step=torch.zeros_like(window.unstable_step))
    pool.advance(everyone)
    first = pool.state
    pool.advance(everyone)
    assert not torch.equal(pool.state.positions, first.positions)
    assert not torch.equal(pool.state.velocities, first.velocities)


def test_restart_draws_whatever_the_outcome(mixed):
    """The number of draws must not depend on the outcome of a window."""
    pool, window = mixed
    before = pool.streams.choices.get_state()
    pool.advance(window)
    after = pool.streams.choices.get_state()
    pool.streams.choices.set_state(before)
    pool.advance(replace(window, unstable_step=torch.full_like(window.unstable_step, -1)))
    assert torch.equal(pool.streams.choices.get_state(), after)


def test_learning_starts_where_the_window_started(mixed, reference):
    pool, window = mixed
    state = pool.state
    pool.begin_learning_phase(window)
    assert equal(pool.learning_start, window.start, ~window.unstable)
    fresh = torch.tensor(is_fresh(pool.learning_start, reference))
    assert fresh[window.unstable].all()
    assert not torch.equal(pool.learning_start.velocities[window.unstable], window.start.velocities[window.unstable])
    assert pool.state is state, "the simulation phase continues elsewhere"


def test_refreshed_start_has_present_forces(mixed):
    pool, window = mixed
    pool.begin_learning_phase(window)
    with torch.no_grad():
        pool.simulator.potential.module.log_k.add_(1.0)
    refreshed = pool.refreshed_learning_start()
    assert torch.equal(refreshed.positions, pool.learning_start.positions)
    # Springs: forces are proportional to the stiffness, which has been multiplied by e.
    old = pool.learning_start.forces[~window.unstable]
    torch.testing.assert_close(refreshed.forces[~window.unstable], torch.e * old, rtol=1e-9, atol=1e-12)


def test_learning_after_a_probe_starts_anew(mixed, reference):
    """Nothing is learned from the start states of probes."""
    pool, _ = mixed
    pool.begin_learning_phase(None)
    assert all(is_fresh(pool.learning_start, reference))
    same = (pool.learning_start.velocities == pool.probe_start.velocities).flatten(1).all(dim=1)
    assert not same.any()


def test_probes_start_from_the_same_states(mixed, reference):
    pool, window = mixed
    for _ in range(2):
        pool.advance(window)
        with torch.no_grad():
            pool.simulator.potential.module.log_k.add_(1.0)
        choices = pool.streams.choices.get_state()
        pool.begin_probe()
        assert torch.equal(pool.state.positions, reference[:10].repeat(3, 1, 1)[:N_REPLICAS])
        assert torch.equal(pool.state.velocities, window.start.velocities)
        assert torch.equal(pool.state.forces, pool.simulator.refresh(pool.state).forces), (
            "forces of the present weights"
        )
        assert torch.equal(pool.streams.choices.get_state(), choices)


def test_failures_count_time_until_the_flag(reference):
    pool = make_pool(STIFF, reference)
    window = simulated(pool)
    steps = torch.full_like(window.unstable_step, -1)
    # 24 replicas of 200 steps of 0.5 fs, three of which stop earlier.
    steps[:3] = torch.tensor([0, 20, 100])
    window = replace(window, unstable_step=steps)
    assert pool.failures(window) == (3, pytest.approx(21 * 0.1 + 0.01 + 0.05))
    pools = [make_pool(STIFF, reference) for _ in range(2)]

    def work(rank, context):
        pools[rank].context = context
        return pools[rank].failures(window if rank == 0 else replace(window, unstable_step=torch.full_like(steps, -1)))

    assert ThreadedContexts(2).run(work) == [(3, pytest.approx(4.56))] * 2


class Interruption(BaseException):
    """Not an Exception, like KeyboardInterrupt."""


def test_rollback_restores_an_interrupted_window(reference):
    pool = make_pool(2.5, reference)
    pool.advance(simulated(pool))
    state = pool.state
    with pytest.raises(Interruption), pool.rollback_on_interrupt():
        pool.begin_probe()
        raise Interruption
    assert pool.state is state


def test_rollback_keeps_a_window_that_ends(reference):
    pool = make_pool(2.5, reference)
    pool.advance(simulated(pool))
    state = pool.state
    with pool.rollback_on_interrupt():
        pool.begin_probe()
    assert pool.state is not state


def test_interrupted_window_is_not_in_the_state(reference):
    pool, twin = make_pool(2.5, reference), make_pool(2.5, reference, seed=9)
    start = pool.simulator.refresh(pool.state)

    def interrupt(steps):
        if steps > 100:
            raise Interruption

    with pytest.raises(Interruption):
        pool.simulate(start, interrupt)
    twin.load_state_dict(pool.state_dict())
    expected = make_pool(2.5, reference)
    assert equal(simulated(twin).end, simulated(expected).end)


def test_state_dict_restores_the_pool(mixed, reference):
    pool, window = mixed
    pool.begin_learning_phase(window)
    pool.advance(window)
    resumed = make_pool(2.5, reference, seed=5)
    resumed.load_state_dict(pool.state_dict())
    assert equal(resumed.probe_start, pool.probe_start)
    assert equal(resumed.learning_start, pool.learning_start)
    for each in (pool, resumed):
        each.begin_probe()
        each.advance(simulated(each))
    assert equal(resumed.state, pool.state)


def test_load_state_dict_rejects_other_replicas(reference):
    state = make_pool(SOFT, reference).state_dict()
    message = (
        r"replicas of shape \(24, 3, 3\), this run has \(8, 3, 3\): resume with the same structures and n_replicas"
    )
    with pytest.raises(ValueError, match=message):
        make_pool(SOFT, reference, n_replicas=8).load_state_dict(state)


def exploding():
    """Springs that rest at 9 Å, so that all bonds break at once."""
    system = System.from_atoms(TRIATOMIC)
    return ModulePotential(Springs(system.bonds, 30.0, 9.0 * torch.ones(2)), system)


def test_simulate_rejects_a_window_without_frames(reference):
    pool = make_loop(exploding(), reference, record_every_fs=50.0).replicas
    with pytest.raises(UnusablePotentialError, match=r"^all 24 replicas failed within (\d+) fs") as caught:
        simulated(pool)
    message = str(caught.value)
    assert str(pool.simulator.detector) in message
    assert "left 0 usable frame(s): there is nothing to learn from" in message
    assert "Train the potential longer before StABlE training (start_epoch)" in message
    assert isinstance(caught.value.frame, Atoms)
    assert caught.value.frame.get_chemical_formula() == "H2O"
    assert caught.value.frame.get_distance(0, 1) > 1.5


def test_pool_repr_shows_its_size(reference):
    assert repr(make_pool(SOFT, reference)) == (
        "ReplicaPool(n_replicas=24, n_structures=10, window_steps=200, record_every=20)"
    )


def test_heated_replicas_have_the_velocities_of_learning_windows(reference):
    pool = make_pool(
        STIFF, reference, objective="margin", observables=None, learning_temperature_ratio=2.0, n_replicas=400
    )
    pool.begin_learning_phase(simulated(pool), continues=True)
    positions = pool.learning_start.positions
    pool.heat_learning_start()
    masses = pool.simulator.potential.system.masses
    temperature = kinetic_temperature(pool.learning_start.velocities, masses).mean().item()
    # 3600 momenta: a standard deviation of 2.4 %.
    assert temperature == pytest.approx(2.0 * TEMPERATURE, rel=0.08)
    assert torch.equal(pool.learning_start.positions, positions)


def test_learning_windows_run_at_their_own_temperature(reference):
    pool = make_pool(STIFF, reference, objective="margin", observables=None, learning_temperature_ratio=2.0)
    assert pool.learning_simulator.integrator.temperature_K == 2.0 * TEMPERATURE
    assert pool.simulator.integrator.temperature_K == TEMPERATURE
    assert pool.learning_simulator.forces is pool.simulator.forces, "the model is compiled once"
    hot = pool.simulate(pool.refreshed_learning_start(), lambda steps: None, learning=True)
    cold = simulated(pool)
    assert not torch.equal(hot.positions, cold.positions)
