"""The whole loop on springs that are far too soft: it finds them failing and makes them stiffer."""

import io
from dataclasses import asdict
from math import nan

import pytest
import torch
from ase import Atoms
from springs import SOFT, STIFF, TEMPERATURE, adam, make_loop, optimizer_step, simulated
from toys import TRIATOMIC, Springs, as_potential, flat, tiny_mace, triatomic

from stable_plugin import (
    BondDeviation,
    BondLengths,
    DistanceDistribution,
    Langevin,
    NoseHooverChain,
    Schedule,
    System,
)
from stable_plugin.algorithm.estimator import BoltzmannEstimator
from stable_plugin.algorithm.replica_pool import UnusablePotentialError
from stable_plugin.algorithm.reweighting import reweight
from stable_plugin.algorithm.schedule import PhaseTracker
from stable_plugin.models import ModulePotential


def spied(loop):
    """The windows that the loop simulates from now on, as they come."""
    windows, run = [], loop.simulator.run

    def watched(*arguments):
        windows.append(run(*arguments))
        return windows[-1]

    loop.simulator.run = watched
    return windows


@pytest.mark.parametrize(("kind", "lr"), [(torch.optim.Adam, 0.1), (torch.optim.SGD, 30.0)])
def test_a_spring_that_is_too_soft_is_made_stiffer_until_it_is_stable(kind, lr, reference):
    potential = triatomic(SOFT)
    loop = make_loop(potential, reference)
    optimizer = kind(potential.module.parameters(), lr=lr)
    losses = []
    while (estimate := optimizer_step(loop, optimizer)) is not None:
        losses.append(estimate.loss)
        assert len(losses) < 200
    assert loop.phase == "done"
    assert loop.gradient() is None, "done stays done"
    assert potential.module.stiffness > 2.0
    assert losses[-1] < 0.1 * losses[0]
    assert loop.windows[-1].observable_loss < 0.1 * loop.windows[0].observable_loss
    assert loop.windows[0].unstable_fraction >= 0.5
    assert loop.windows[-1].unstable_fraction == 0.0
    # With random numbers that the loop has not seen.
    before, after = (simulated(springs, reference[:40], 400) for springs in (triatomic(SOFT), potential))
    assert before.unstable_fraction > 0.6
    assert after.unstable_fraction < 0.25


def test_reweighted_steps_are_counted_with_their_effective_share(reference):
    potential = triatomic(SOFT)
    loop = make_loop(potential, reference)
    optimizer = adam(potential)
    shares = []
    for step in range(8):
        estimate = optimizer_step(loop, optimizer)
        shares.append(estimate.ess_fraction)
        assert loop.windows[-1].ess_fraction == estimate.ess_fraction
        assert loop.windows[-1].steps == step % 4 + 1
    assert len(loop.windows) == 2
    assert [share == pytest.approx(1.0, abs=1e-12) for share in shares] == [True, False, False, False] * 2
    assert shares[0] > shares[1] > shares[2] > shares[3] > 0
    assert loop.md_steps == 2 * 24 * 200
    assert loop.simulated_ps == pytest.approx(0.2)


def test_a_sample_whose_effective_share_is_spent_is_simulated_anew(reference):
    potential = triatomic(SOFT)
    loop = make_loop(potential, reference, min_ess_fraction=0.95, steps_per_window=50)
    optimizer = adam(potential)
    shares = [optimizer_step(loop, optimizer).ess_fraction for _ in range(12)]
    assert all(0.95 <= share <= 1.0 + 1e-12 for share in shares)
    used = [entry.steps for entry in loop.windows if entry.steps]
    assert len(used) > 2
    assert 1 < max(used) < 50
    assert sum(used) == 12


def test_one_step_per_window_never_reweights(reference):
    potential = triatomic(SOFT)
    loop = make_loop(potential, reference, steps_per_window=1)
    optimizer = adam(potential, lr=0.01)
    shares = [optimizer_step(loop, optimizer).ess_fraction for _ in range(3)]
    assert shares == pytest.approx([1.0] * 3)
    assert [entry.steps for entry in loop.windows] == [1, 1, 1]


def test_gradients_are_those_of_the_estimator_on_the_sample(reference):
    """The second one with the weights that the changed parameters give to the frames of the first."""
    potential = triatomic(SOFT)
    observables = [BondLengths(), DistanceDistribution(4.0, 0.1, 0.1)]
    loop = make_loop(potential, reference, observables=observables)
    estimator = BoltzmannEstimator(potential, TEMPERATURE, chunk=1000)
    windows = spied(loop)
    optimizer = adam(potential, lr=0.3)
    sampled = None
    for _ in range(2):
        weights_before = potential.module.log_k.detach().clone()
        found = optimizer_step(loop, optimizer)
        weights_after = potential.module.log_k.detach().clone()
        with torch.no_grad():
            potential.module.log_k.copy_(weights_before)
            positions = windows[0].frames()
            energies = estimator.energies(positions)
            sampled = energies if sampled is None else sampled
        values = [observable.per_frame(positions) for observable in observables]
        expected = estimator.estimate(
            positions,
            values,
            [observable.target for observable in observables],
            weights=reweight(energies, sampled, TEMPERATURE),
        )
        assert found.loss == pytest.approx(expected.loss, rel=1e-10)
        assert torch.allclose(flat(found.gradients), flat(expected.gradients), rtol=1e-9)
        with torch.no_grad():
            potential.module.log_k.copy_(weights_after)
    assert len(windows) == 1


def frames_of(loop):
    return {tuple(frame.flatten().tolist()) for frame in loop._structures}


def begin_afresh(loop, state, flags):
    """Whether the flagged replicas rest in start frames with velocities of their own."""
    frames = frames_of(loop)
    return all(
        (tuple(positions.flatten().tolist()) in frames) == flag
        for positions, flag in zip(state.positions, flags.tolist(), strict=True)
    )


def test_learning_windows_start_where_the_failed_one_did_under_the_weights_of_now(reference):
    potential = triatomic(SOFT)
    loop = make_loop(potential, reference, steps_per_window=1)
    windows = spied(loop)
    optimizer = adam(potential, lr=0.05)
    energies = []
    for _ in range(3):
        energies.append(loop.simulator.refresh(loop.replicas.learning_start).energies)
        optimizer_step(loop, optimizer)
    assert [entry.phase for entry in loop.windows] == ["simulate", "learn", "learn"]
    for before, after, now in zip(windows, windows[1:], energies[1:], strict=False):
        stable = ~before.unstable
        assert torch.equal(after.start.positions[stable], before.start.positions[stable])
        assert torch.equal(after.start.velocities[stable], before.start.velocities[stable])
        assert torch.equal(after.start.energies, now)
        # What failed begins afresh: a replica that cannot be saved would fail in every window.
        assert before.unstable.any()
        assert not torch.equal(after.start.velocities[before.unstable], before.start.velocities[before.unstable])
        assert begin_afresh(loop, after.start, torch.ones_like(before.unstable))
    assert not torch.equal(windows[1].end.positions, windows[2].end.positions), "the noise is new"


def test_stable_replicas_go_on_and_unstable_ones_begin_afresh(reference):
    loop = make_loop(
        triatomic(2.5),
        reference,
        schedule=Schedule(max_unstable_fraction=1.0, min_unstable_fraction=0.99, stable_ps=0.4),
    )
    windows = spied(loop)
    loop.simulation_phase()
    assert loop.phase == "done"
    assert len(windows) == 4
    flagged = [window.unstable for window in windows]
    assert any(0 < flags.sum() < 24 for flags in flagged[:-1])
    for before, after, flags in zip(windows, windows[1:], flagged, strict=False):
        for mine, end in zip(after.start.tensors(), before.end.tensors(), strict=True):
            assert torch.equal(mine[~flags], end[~flags])
        assert begin_afresh(loop, after.start, flags)
        assert torch.equal(after.start.forces, loop.simulator.refresh(after.start).forces)
    # The share is that since the phase began, not that of one window.
    ever = torch.stack(flagged).cummax(dim=0).values.double().mean(dim=1)
    assert [entry.unstable_fraction for entry in loop.windows] == pytest.approx(ever.tolist())
    assert ever[-1] > ever[0]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_simulation_phase_begins_with_a_share_of_replicas_rewound(share, reference):
    schedule = Schedule(max_unstable_fraction=1.0, min_unstable_fraction=0.9, stable_ps=0.2)
    loop = make_loop(triatomic(STIFF), reference, rewind_fraction=share, schedule=schedule)
    windows = spied(loop)
    loop.simulation_phase()
    assert [window.unstable_fraction for window in windows] == [0.0, 0.0]
    loop.phases = PhaseTracker(schedule)
    loop.simulation_phase()
    start = windows[2].start.positions
    assert torch.equal(start, windows[1].end.positions) == (share == 0.0)
    assert any(torch.equal(start, earlier.start.positions) for earlier in windows[:2]) == (share == 1.0)


def course(loop, optimizer, n_steps):
    """What n optimizer steps leave behind."""
    gradients, losses = [], []
    for _ in range(n_steps):
        estimate = optimizer_step(loop, optimizer)
        if estimate is None:
            break
        gradients.append(flat(estimate.gradients))
        losses.append((estimate.loss, estimate.ess_fraction))
    rounds = [{**asdict(entry), "wall_s": 0.0} for entry in loop.windows]
    return gradients, losses, rounds, loop.replicas.state.tensors(), flat(loop.potential.module.parameters())


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("integrator", [Langevin(TEMPERATURE, 0.5, 20.0), NoseHooverChain(TEMPERATURE, 0.5)])
@pytest.mark.parametrize("saved_after", [0, 2, 4, 24])
def test_a_loop_that_is_resumed_goes_on_bit_for_bit(saved_after, integrator, reference):
    """Before anything, in the midst of a sample, at its end, and before a simulation phase that rewinds replicas."""

    def fresh(seed):
        potential = triatomic(SOFT)
        return make_loop(potential, reference, integrator=integrator, seed=seed, rewind_fraction=0.5), adam(potential)

    loop, optimizer = fresh(seed=0)
    course(loop, optimizer, saved_after)
    state = {
        "loop": loop.state_dict(),
        "module": loop.potential.module.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    saved = through_a_file(state)
    expected = course(loop, optimizer, 9)
    if saved_after in (0, 24):
        assert "simulate" in [entry.phase for entry in loop.windows[len(saved["loop"]["windows"]) :]]

    resumed, its_optimizer = fresh(seed=99)
    resumed.potential.module.load_state_dict(saved["module"])
    its_optimizer.load_state_dict(saved["optimizer"])
    resumed.load_state_dict(saved["loop"])
    found = course(resumed, its_optimizer, 9)
    assert found[1] == expected[1]
    assert found[2] == expected[2]
    for mine, other in zip([*found[0], *found[3], found[4]], [*expected[0], *expected[3], expected[4]], strict=True):
        assert torch.equal(mine, other)


def test_a_state_in_memory_does_not_change_when_the_loop_goes_on(reference):
    """Whenever it is taken: in the midst of a simulation phase or of a sample."""
    potential = triatomic(2.5)
    loop = make_loop(
        potential, reference, schedule=Schedule(max_unstable_fraction=0.75, min_unstable_fraction=0.1, stable_ps=0.4)
    )
    optimizer = adam(potential)
    taken = []

    def snapshot(progress=None):
        state = loop.state_dict()
        taken.append((state, through_a_file(state)))

    loop.on_progress = snapshot
    for _ in range(7):
        optimizer_step(loop, optimizer)
        snapshot()
    assert {state["phases"]["name"] for state, _ in taken} >= {"simulate", "learn"}
    assert max(state["phases"]["stable_ps"] for state, _ in taken) > 0.15

    def leaves(value):
        if isinstance(value, dict):
            return [leaf for key in sorted(value) for leaf in leaves(value[key])]
        if isinstance(value, (list, tuple)):
            return [leaf for entry in value for leaf in leaves(entry)]
        return [value]

    for state, copy in taken:
        for mine, other in zip(leaves(state), leaves(copy), strict=True):
            assert torch.equal(mine, other) if isinstance(mine, torch.Tensor) else mine == other


def test_an_interrupted_window_is_simulated_again_as_it_was(reference):
    """What is saved while a window runs is the state before it."""
    loop = make_loop(triatomic(SOFT), reference)
    saved = []

    def interrupt(progress):
        if progress.window_ps > 0.04:
            saved.append(through_a_file(loop.state_dict()))
            raise KeyboardInterrupt

    loop.on_progress = interrupt
    with pytest.raises(KeyboardInterrupt):
        loop.gradient()
    resumed = make_loop(triatomic(SOFT), reference, seed=5)
    resumed.load_state_dict(saved[0])
    expected = make_loop(triatomic(SOFT), reference).gradient()
    assert torch.equal(flat(resumed.gradient().gradients), flat(expected.gradients))


def test_a_state_of_other_replicas_is_refused(reference):
    state = make_loop(triatomic(SOFT), reference).state_dict()
    other = make_loop(triatomic(SOFT), reference, n_replicas=8)
    with pytest.raises(ValueError, match=r"replicas of shape \(24, 3, 3\), this run has \(8, 3, 3\)"):
        other.load_state_dict(state)


def test_the_same_seed_gives_the_same_course_and_another_does_not(reference):
    def first_gradient(seed):
        return flat(make_loop(triatomic(SOFT), reference, seed=seed).gradient().gradients)

    assert torch.equal(first_gradient(3), first_gradient(3))
    assert not torch.equal(first_gradient(3), first_gradient(4))


def test_progress_is_told_with_growing_times(reference):
    potential = triatomic(SOFT)
    loop = make_loop(potential, reference, steps_per_window=1)
    told = []
    loop.on_progress = told.append
    course(loop, adam(potential), 2)
    times = [entry.simulated_ps for entry in told]
    assert times == sorted(set(times))
    assert times[-1] == pytest.approx(loop.simulated_ps) == pytest.approx(0.2)
    assert told[-1].window_ps == pytest.approx(0.1)
    assert [told[0].phase, told[-1].phase] == ["simulate", "learn"]
    assert told[0].unstable_fraction is None
    assert told[-1].unstable_fraction == loop.windows[0].unstable_fraction
    assert told[-1].ess_fraction == 1.0


def test_replicas_take_the_structures_in_turn(reference):
    start = make_loop(triatomic(SOFT), reference).replicas.state.positions
    assert torch.equal(start, reference[:10].repeat(3, 1, 1)[:24])


def test_a_single_replica_learns_from_its_frames_over_time(reference):
    estimate = make_loop(
        triatomic(SOFT), reference, n_replicas=1, schedule=Schedule(max_unstable_fraction=0.1)
    ).gradient()
    assert flat(estimate.gradients).abs().max() > 0


def test_the_loop_runs_on_a_mace_model(aspirin_frames, aspirin_positions):
    system = System.from_atoms(aspirin_frames[0])
    potential = as_potential(tiny_mace(system.numbers), system)
    loop = make_loop(
        potential,
        aspirin_positions,
        integrator=Langevin(800.0, 1.0, 1.0),
        detector=BondDeviation(0.25, 5.0),
        n_replicas=3,
        window_ps=0.05,
        record_every_fs=5.0,
    )
    optimizer = torch.optim.SGD(potential.module.parameters(), lr=1e-4)
    before = flat(potential.module.parameters())
    shares = [optimizer_step(loop, optimizer).ess_fraction for _ in range(2)]
    assert shares[0] == pytest.approx(1.0)
    assert 0.3 <= shares[1] < 1.0
    assert not torch.equal(flat(potential.module.parameters()), before)
    assert all(parameter.requires_grad for parameter in potential.module.parameters())


def exploding():
    """Springs that rest at 9 Å: every bond flies apart at once."""
    system = System.from_atoms(TRIATOMIC)
    return ModulePotential(Springs(system.bonds, 30.0, 9.0 * torch.ones(2)), system)


def test_a_potential_that_fails_everywhere_at_once_is_called_unusable(reference):
    loop = make_loop(exploding(), reference, record_every_fs=50.0)
    with pytest.raises(UnusablePotentialError, match=r"all 24 replicas broke down within (\d+) fs") as caught:
        loop.gradient()
    message = str(caught.value)
    assert "left 0 usable frame(s)" in message
    assert "start_epoch" in message
    assert isinstance(caught.value.frame, Atoms)
    assert caught.value.frame.get_chemical_formula() == "H2O"
    assert caught.value.frame.get_distance(0, 1) > 1.5
    assert loop.windows == []


def test_weights_that_are_not_numbers_are_called_unusable_and_give_no_gradient(reference):
    potential = triatomic(SOFT)
    loop = make_loop(potential, reference)
    loop.gradient()
    with torch.no_grad():
        potential.module.log_k.fill_(nan)
    with pytest.raises(UnusablePotentialError, match="all 24 replicas broke down within 0 fs") as caught:
        loop.gradient()
    assert torch.tensor(caught.value.frame.positions).isfinite().all()


def test_replicas_that_are_not_finite_count_as_unstable(reference):
    """Weights under which a stretched bond has no energy: who starts stretched fails at step zero."""
    stretched = reference[:4].clone()
    stretched[:2, 0] = 0.0
    stretched[:2, 1] *= 1.2 / stretched[:2, 1].norm(dim=-1, keepdim=True)
    potential = triatomic(STIFF)
    loop = make_loop(potential, reference, stretched, n_replicas=4)
    potential.module.breaks_at = 1.19
    estimate = loop.gradient()
    assert loop.windows[0].unstable_fraction >= 0.5
    assert loop.phase == "learn"
    assert flat(estimate.gradients).isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_replicas": 0}, "n_replicas=0"),
        ({"steps_per_window": 0}, "steps_per_window=0"),
        ({"min_ess_fraction": 0.0}, r"min_ess_fraction=0\.0"),
        ({"min_ess_fraction": 1.1}, r"min_ess_fraction=1\.1"),
        ({"rewind_fraction": -0.1}, r"rewind_fraction=-0\.1"),
        ({"chunk": 0}, "chunk=0"),
        ({"observables": []}, r"observables=\[\] is empty"),
        ({"window_ps": 0.1003}, r"window_ps=0\.1003 ps is not a whole number of timesteps of 0\.5 fs"),
        ({"record_every_fs": 10.2}, r"record_every_fs=10\.2 fs is not a whole number"),
        ({"record_every_fs": 12.0}, r"record_every=24 steps is not a multiple of the 10 steps between two checks"),
        ({"record_every_fs": 100.0, "n_replicas": 1}, "record_every_fs=100 gives fewer than two frames per window"),
        ({"record_every_fs": 200.0}, "record_every_fs=200 gives fewer than two frames per window"),
        ({"detector": BondDeviation(0.01)}, r"reference frames are broken by BondDeviation\(threshold=0\.01\)"),
        ({"observables": [BondLengths(target=[1.0])]}, "target of BondLengths has shape"),
    ],
)
def test_settings_that_cannot_work_are_named_before_anything_is_simulated(changes, message, reference):
    with pytest.raises(ValueError, match=message):
        make_loop(triatomic(SOFT), reference, **changes)


def test_too_few_reference_frames_are_named(reference):
    with pytest.raises(ValueError, match=r"reference holds 1 frame\(s\): .* need at least 2"):
        make_loop(triatomic(SOFT), reference[:1])


def test_broken_start_structures_are_refused(reference):
    broken = reference.clone()
    broken[3, 1] *= 3.0
    with pytest.raises(ValueError, match=r"1 of 10 .*frames are broken .*frame 3 measures"):
        make_loop(triatomic(SOFT), reference, broken[:10])


def test_a_potential_that_is_stable_to_begin_with_is_left_alone(reference):
    loop = make_loop(triatomic(STIFF), reference, detector=BondDeviation(0.9))
    assert loop.gradient() is None
    assert [entry.phase for entry in loop.windows] == ["simulate", "simulate"]
    assert [entry.unstable_fraction for entry in loop.windows] == [0.0, 0.0]
