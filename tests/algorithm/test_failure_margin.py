"""The failure margin against losses and gradients that are written out with autograd."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from springs import SOFT, STIFF, TEMPERATURE, make_loop, simulated
from threaded_contexts import ThreadedContexts
from toys import TRIATOMIC, PairRepulsion, triatomic

from stable_plugin import AnyOf, BondDeviation, ClosestContact, ContactLimits, RunawayTemperature, Schedule, System
from stable_plugin.algorithm.estimator import BoltzmannEstimator
from stable_plugin.algorithm.failure_margin import FailureMargin, margin_kT, one_sided_huber
from stable_plugin.algorithm.frame_buffer import FrameBuffer, NearFailures
from stable_plugin.algorithm.reweighting import SINGLE_PROCESS
from stable_plugin.models import ModulePotential
from stable_plugin.units import BOLTZMANN

KT = BOLTZMANN * TEMPERATURE


def margin_of(potential, reference, detector=None, context=SINGLE_PROCESS):
    detector = detector or BondDeviation(0.3, None)
    detector.bind(potential.system, reference)
    return FailureMargin(BoltzmannEstimator(potential, TEMPERATURE, 4, context), detector, reference)


def stretched(*lengths):
    """Return frames of the triatomic molecule whose first bond has these lengths in Å, (n_frames, 1, 3, 3)."""
    frames = torch.tensor(TRIATOMIC.positions).repeat(len(lengths), 1, 1)
    frames[:, 1, 0] = torch.tensor(lengths)
    return frames[:, None]


def everything(frames):
    return torch.ones(frames.shape[:2], dtype=torch.bool)


def one_failure_each(positions, margin):
    """Return frames of one molecule with a failure each."""
    margin = torch.as_tensor(margin, dtype=torch.float64)
    return NearFailures(positions, torch.arange(len(positions)), margin, everything(positions))


def test_margin_grows_to_its_maximum():
    severity = torch.tensor([0.0, 0.5, 1.0, 2.0])
    torch.testing.assert_close(margin_kT(severity), torch.tensor([0.0, 3.0, 12.0, 16.0]))


def test_huber_is_one_sided_and_linear_beyond():
    shortfall = torch.tensor([-4.0, 0.0, 1.5, 3.0, 5.0], dtype=torch.float64)
    expected = torch.tensor([0.0, 0.0, 1.5**2 / 6, 1.5, 3.5], dtype=torch.float64)
    torch.testing.assert_close(one_sided_huber(shortfall), expected)


def test_severity_is_zero_at_the_reference_mean_and_one_at_the_threshold(reference):
    potential = triatomic(STIFF)
    margin = margin_of(potential, reference)
    lengths = potential.system.distances(reference, potential.system.bonds)
    off = (lengths - lengths.mean(dim=0)).abs().amax(dim=1)
    assert margin.severity(reference).mean().item() == pytest.approx(0.0, abs=1e-9)
    expected = (off - off.mean()) / (0.3 - off.mean())
    torch.testing.assert_close(margin.severity(reference), expected)


def test_near_failures_are_dense_beyond_and_sparse_below(reference):
    margin = margin_of(triatomic(STIFF), reference)
    # Severities of about 0, 0.6 (twice), 0.9, 1.5 and 20; every second frame is taken below 0.7.
    window = stretched(1.0, 1.19, 1.19, 1.26, 1.45, 8.0)
    found = margin.near_failures(window, torch.ones(6, 1, dtype=torch.bool), stride=2)
    assert found.positions[:, 1, 0].tolist() == pytest.approx([1.19, 1.26, 1.45])
    torch.testing.assert_close(found.margin, margin_kT(margin.severity(found.positions)))
    assert found.atoms.all()
    valid = torch.tensor([True, False, True, False, True, True])[:, None]
    assert margin.near_failures(window, valid, stride=2).positions[:, 1, 0].tolist() == pytest.approx([1.45])


def test_gradient_is_that_of_the_loss(reference):
    potential = triatomic(2.0)
    margin = margin_of(potential, reference)
    positions = stretched(1.2, 1.3, 1.4, 1.6)[:, 0]
    limits = torch.tensor([0.1, 6.0, 9.0, 12.0], dtype=torch.float64)
    estimate, shortfall = margin.estimate(one_failure_each(positions, limits), torch.Generator().manual_seed(0))
    drawn = torch.randperm(len(reference), generator=torch.Generator().manual_seed(0))[:32]
    above = potential.module(positions) - potential.module(reference[drawn]).mean()
    loss = one_sided_huber(limits - above / KT).mean()
    (expected,) = torch.autograd.grad(loss, potential.trainable_parameters())
    assert estimate.loss == pytest.approx(loss.item(), rel=1e-9)
    torch.testing.assert_close(shortfall, (limits - above / KT).clamp_min(0.0))
    assert shortfall.any() and not shortfall.all()
    torch.testing.assert_close(estimate.gradients[0], expected, rtol=1e-9, atol=0.0)


def test_frames_that_are_high_enough_exert_no_pull(reference):
    positions = stretched(1.2, 1.3)[:, 0]
    low = one_failure_each(positions, [1e-3, 1e-3])
    estimate, shortfall = margin_of(triatomic(STIFF), reference).estimate(low, torch.Generator())
    assert estimate.loss == 0.0 and estimate.gradients[0].item() == 0.0 and not shortfall.any()


def test_estimate_without_frames_is_zero(reference):
    estimate, shortfall = margin_of(triatomic(STIFF), reference).estimate(None, torch.Generator())
    assert estimate.loss == 0.0 and estimate.gradients[0].item() == 0.0 and len(shortfall) == 0


def test_estimate_is_over_the_frames_of_all_processes(reference):
    positions = stretched(1.2, 1.3, 1.4, 1.6)[:, 0]
    frames = one_failure_each(positions, [0.1, 6.0, 9.0, 12.0])
    few = reference[:20]  # all of them are drawn

    def of(rank, context):
        margin = margin_of(triatomic(2.0), few, context=context)
        own = [frames.select(torch.tensor([0, 1, 2])), frames.select(torch.tensor([3])), None][rank]
        return margin.estimate(own, torch.Generator())[0]

    alone, _ = margin_of(triatomic(2.0), few).estimate(frames, torch.Generator())
    for each in ThreadedContexts(3).run(of):
        assert each.loss == pytest.approx(alone.loss, rel=1e-9)
        torch.testing.assert_close(each.gradients[0], alone.gradients[0], rtol=1e-9, atol=0.0)


def waters(shift=2.8):
    """Return two water molecules."""
    atoms = molecule("H2O") + molecule("H2O")
    atoms.positions[3:, 2] += shift
    return atoms


def soft_waters():
    """Return a potential of two water molecules with atomic energies, and reference frames."""
    atoms = waters()
    noise = np.random.default_rng(0).normal(scale=0.02, size=(20, 6, 3))
    return PairRepulsion(System.from_atoms(atoms)), torch.tensor(atoms.positions) + torch.tensor(noise)


def energies_of_molecules(potential, frames):
    """Return the energies of the two molecules, (n_frames, 2) in eV."""
    return potential.atomic_energies(frames, potential.edges(frames)).unflatten(1, (2, 3)).sum(dim=2)


FIRST, SECOND = [True] * 3 + [False] * 3, [False] * 3 + [True] * 3
LONGER = torch.tensor([0.0, 0.3, 0.0])


def test_only_the_molecules_that_fail_count():
    potential, reference = soft_waters()
    frames = reference[:2, None].clone()
    frames[0, 0, 1] += LONGER
    frames[1, 0, 4] += LONGER
    found = margin_of(potential, reference).near_failures(frames, everything(frames), stride=1)
    assert found.frame.tolist() == [0, 1] and found.atoms.tolist() == [FIRST, SECOND]
    contacts = AnyOf([BondDeviation(0.5, None), ClosestContact(1.2, None)])
    frames = reference[:1, None].clone()
    frames[0, 0, 3:, 2] -= 1.7
    found = margin_of(potential, reference, contacts).near_failures(frames, everything(frames), stride=1)
    assert found.atoms.tolist() == [[True] * 6], "a collision is of both molecules"


def test_molecules_that_fail_in_one_frame_have_margins_of_their_own():
    potential, reference = soft_waters()
    frames = reference[:3, None].clone()
    frames[1, 0, 1] += LONGER
    frames[1, 0, 4] += 0.8 * LONGER
    frames[2, 0, 4] += LONGER
    margin = margin_of(potential, reference)
    found = margin.near_failures(frames, everything(frames), stride=1)
    assert len(found) == 2 and found.frame.tolist() == [0, 0, 1]
    assert found.atoms.tolist() == [FIRST, SECOND, SECOND]
    assert found.margin[0] == margin_kT(margin.severity(found.positions[:1]))[0]
    apart = reference[1].clone()
    apart[4] += 0.8 * LONGER
    assert found.margin[1] == margin_kT(margin.severity(apart[None]))[0]


def test_window_without_near_failures_gives_none():
    """By the contacts of all detectors too, which count pairs of atoms."""
    potential, reference = soft_waters()
    window = reference[:3, None]
    few = AnyOf([BondDeviation(0.5, None), ClosestContact(1.2, None), ContactLimits(300.0)])
    for found in (
        margin_of(potential, reference, few).near_failures(window, everything(window), 1, heating=1.5),
        margin_of(triatomic(STIFF), reference[:, :3], BondDeviation(0.5, None)).near_failures(
            window[:, :, :3], everything(window), 1, heating=1.5
        ),
        margin_of(potential, reference, few).near_failures(window, ~everything(window), 1, heating=1.5),
    ):
        assert len(found) == len(found.margin) == len(found.atoms) == 0


def test_loss_is_the_mean_over_all_failures():
    potential, reference = soft_waters()
    positions = reference[:2].clone()
    positions[:, 1] += LONGER
    positions[0, 4] += LONGER
    atoms = torch.tensor([FIRST, SECOND, FIRST])
    limits, frame = torch.tensor([50.0, 60.0, 70.0], dtype=torch.float64), torch.tensor([0, 0, 1])
    margin = margin_of(potential, reference)
    estimate, shortfall = margin.estimate(NearFailures(positions, frame, limits, atoms), torch.Generator())

    own, level = energies_of_molecules(potential, positions), energies_of_molecules(potential, reference).mean()
    above = torch.stack([own[0, 0], own[0, 1], own[1, 0]]) - level
    loss = one_sided_huber(limits - above / KT).mean()
    (expected,) = torch.autograd.grad(loss, potential.trainable_parameters())
    assert estimate.loss == pytest.approx(loss.item(), rel=1e-9)
    short = (limits - above / KT).detach()
    torch.testing.assert_close(shortfall, torch.stack([short[0] + short[1], short[2]]))
    torch.testing.assert_close(estimate.gradients[0], expected, rtol=1e-9, atol=0.0)


def test_thermal_energy_is_that_of_molecules_that_are_not_near_a_failure():
    """In a hot liquid, every frame has a molecule near a failure."""
    potential, reference = soft_waters()
    hot = reference[:4].clone()
    hot[:, 1] += LONGER
    hot[:, 4] -= 0.1 * LONGER
    margin, window = margin_of(potential, reference), hot[:, None]
    cold, warm = (margin.near_failures(window, everything(window), 1, heating=each) for each in (1.0, 2.0))
    with torch.no_grad():
        gain = energies_of_molecules(potential, hot)[:, 1].mean() - energies_of_molecules(potential, reference).mean()
    assert 0.0 < gain.item() / KT < 4.5
    assert (warm.margin - cold.margin).tolist() == pytest.approx([gain.item() / KT] * 4)


def test_only_the_surroundings_count_in_a_framework():
    chain = Atoms("Cu12", positions=[[2.5 * number, 0.0, 0.0] for number in range(12)])
    system = System.from_atoms(chain)
    assert system.is_extended
    potential = PairRepulsion(system)
    reference = torch.tensor(chain.positions) + torch.tensor(
        np.random.default_rng(0).normal(scale=0.02, size=(20, 12, 3))
    )
    frames = reference[:1, None].clone()
    frames[0, 0, 0, 0] += 1.5
    found = margin_of(potential, reference, ClosestContact(1.2, None)).near_failures(
        frames, torch.ones(1, 1, dtype=torch.bool), stride=1
    )
    assert found.atoms[0].tolist() == [True] * 3 + [False] * 9
    hot = torch.cat([frames, frames])
    hotter = margin_of(potential, reference, ClosestContact(1.2, None)).near_failures(
        hot, everything(hot), stride=1, heating=2.0
    )
    assert hotter.margin.tolist() == [found.margin.item()] * 2, (
        "all frames are near a failure, none tells the thermal energy"
    )


def test_detector_without_a_margin_is_refused(reference):
    with pytest.raises(ValueError, match=r"detector=RunawayTemperature.* has no part whose failures cost energy"):
        make_loop(triatomic(SOFT), reference, objective="margin", observables=None, detector=RunawayTemperature(2000.0))


def test_margin_stiffens_soft_springs_until_stable(reference):
    """No observable and no label is used: only the limits that the reference's bonds set."""
    potential = triatomic(SOFT)
    loop = make_loop(
        potential,
        reference,
        objective="margin",
        observables=None,
        check_every_fs=5.0,
        steps_per_window=20,
        schedule=Schedule(max_failures_per_ns=400.0, max_windows=20),
    )
    optimizer = torch.optim.Adam(potential.module.parameters(), lr=0.05)
    while (estimates := loop.gradient()) is not None:
        assert list(estimates) == ["margin"]
        for parameter, gradient in zip(potential.trainable_parameters(), estimates["margin"].gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    (verification,) = loop.verifications()
    assert verification.is_verified
    start = torch.tensor(TRIATOMIC.positions).repeat(64, 1, 1)
    assert simulated(triatomic(SOFT), start, 2000).unstable_fraction > 0.9
    assert simulated(potential, start, 2000).unstable_fraction == 0.0


def frames_of(*values):
    positions = torch.tensor(values, dtype=torch.float64)[:, None, None].expand(-1, 2, 3).contiguous()
    return one_failure_each(positions, positions[:, 0, 0])


def drawn(buffer, number, seed=0):
    return buffer.draw(number, torch.Generator().manual_seed(seed)).margin.tolist()


def test_buffer_prefers_frames_that_fall_short():
    buffer = FrameBuffer()
    assert buffer.draw(3, torch.Generator()) is None
    buffer.add(frames_of(*range(1, 21)), torch.Generator())
    assert buffer.n_short == 20
    taken = buffer.draw(20, torch.Generator().manual_seed(1))
    buffer.update((taken.sums(taken.margin) - 18.0).clamp_min(0.0))
    assert buffer.n_short == 2
    for seed in range(5):
        few = drawn(buffer, 6, seed)
        assert len(set(few)) == 6 and {19.0, 20.0} <= set(few)
        assert len({19.0, 20.0} & set(drawn(buffer, 2, seed))) >= 1


def test_buffer_draws_in_proportion_to_the_shortfall():
    buffer = FrameBuffer()
    buffer.add(frames_of(1, 3), torch.Generator())
    generator = torch.Generator().manual_seed(0)
    often = sum(buffer.draw(1, generator).margin.item() == 3.0 for _ in range(1000))
    assert often == pytest.approx(750, abs=4 * (1000 * 0.75 * 0.25) ** 0.5)


def test_full_buffer_drops_frames_at_random():
    buffer = FrameBuffer(max_bytes=10 * 2 * 3 * 8)
    generator = torch.Generator().manual_seed(0)
    for first in (1, 11, 21):
        buffer.add(frames_of(*range(first, first + 10)), generator)
        assert len(buffer) == 10
    kept = sorted(drawn(buffer, 10))
    assert kept[0] <= 20 < kept[-1], "old and new frames stay"


def test_buffer_keeps_the_failures_of_a_frame_together():
    """Frames 0 to 3 have 1, 2, 0 and 1 failures; shortfalls of frames are sums over them."""
    positions = torch.arange(4.0)[:, None, None].expand(-1, 2, 3).contiguous()
    frame, margins = torch.tensor([0, 1, 1, 3]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    frames = NearFailures(positions, frame, margins, torch.ones(4, 2, dtype=torch.bool))
    assert frames.sums(margins).tolist() == [1.0, 5.0, 0.0, 4.0]
    some = frames.select(torch.tensor([3, 1]))
    assert some.positions[:, 0, 0].tolist() == [3.0, 1.0]
    assert some.frame.tolist() == [1, 1, 0] and some.margin.tolist() == [2.0, 3.0, 4.0]
    masked = frames.select(torch.tensor([False, True, True, False]))
    assert masked.frame.tolist() == [0, 0] and len(masked) == 2
    twice = some.joined(frames)
    assert twice.frame.tolist() == [1, 1, 0, 2, 3, 3, 5] and len(twice) == 6


def test_buffer_resumes():
    buffer, other = FrameBuffer(), FrameBuffer()
    buffer.add(frames_of(1, 2, 3, 4), torch.Generator())
    taken = buffer.draw(4, torch.Generator())
    buffer.update((taken.sums(taken.margin) - 3.0).clamp_min(0.0))
    other.load_state_dict(buffer.state_dict())
    assert other.n_short == 1
    assert drawn(other, 3) == drawn(buffer, 3)
    empty = FrameBuffer()
    empty.load_state_dict(FrameBuffer().state_dict())
    assert len(empty) == 0


def hot_window(reference, stretch, n=3):
    """Return a window of reference frames whose bonds are longer by a factor, and one frame near a failure."""
    center = reference[:n].mean(dim=1, keepdim=True)
    return torch.cat([center + stretch * (reference[:n] - center), stretched(1.26)[:, 0]])[:, None]


def gain(margin, window, heating):
    """Return by how much heating raises the margin of the frames of a window that are near failures, (n_frames,) in kT."""
    cold, hot = (margin.near_failures(window, everything(window), 1, heating=each) for each in (1.0, heating))
    assert torch.equal(hot.positions, cold.positions)
    return hot.margin - cold.margin


def test_margin_of_hot_frames_has_their_thermal_energy_in_it(reference):
    potential, few = triatomic(STIFF), reference[:50]
    window = hot_window(few, 1.02)
    with torch.no_grad():
        energies = potential.module(window[:3, 0]).mean() - potential.module(few).mean()
    assert 0.0 < energies.item() / KT < 1.5
    assert gain(margin_of(potential, few), window, 2.0).tolist() == pytest.approx([energies.item() / KT])


def test_thermal_energy_is_at_most_that_of_equipartition(reference):
    """Half a kT for each of the three vibrations of a molecule of three atoms, or the six modes of two that move."""
    potential = triatomic(STIFF)
    window = hot_window(reference, 1.08)
    assert gain(margin_of(potential, reference), window, 1.4).tolist() == pytest.approx([0.5 * 0.4 * 3] * 2)
    fixed = replace(potential.system, fixed=torch.tensor([False, False, True]))
    held = ModulePotential(potential.module, fixed)
    assert gain(margin_of(held, reference), window, 1.4).tolist() == pytest.approx([0.5 * 0.4 * 6] * 2)


def test_colder_or_missing_frames_leave_the_margin(reference):
    margin = margin_of(triatomic(STIFF), reference)
    at_rest = torch.cat([torch.tensor(TRIATOMIC.positions)[None, None], stretched(1.26)])
    assert gain(margin, at_rest, 1.4).tolist() == [0.0]
    assert gain(margin, stretched(1.26), 1.4).tolist() == [0.0]


def test_learning_windows_are_hotter_and_probes_are_not(reference):
    loop = make_loop(
        triatomic(SOFT),
        reference,
        objective="margin",
        observables=None,
        steps_per_window=1,
        learning_temperature_ratio=1.3,
    )
    while len(loop.windows) < 3:
        loop.gradient()
    temperatures = {record.phase: record.temperature_K for record in loop.windows}
    assert temperatures == {"probe": TEMPERATURE, "learn": pytest.approx(1.3 * TEMPERATURE)}
    assert [record.observable_loss is None for record in loop.windows] == [r.phase == "learn" for r in loop.windows]
