"""The failure margin against losses and gradients that are written out with autograd."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from springs import SOFT, STIFF, TEMPERATURE, make_loop, simulated
from threaded_contexts import ThreadedContexts
from toys import TRIATOMIC, PairRepulsion, Springs, triatomic

from stable_plugin import AnyOf, BondDeviation, ClosestContact, RunawayTemperature, Schedule, System
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
    assert margin.severity(reference)[0].mean().item() == pytest.approx(0.0, abs=1e-9)
    expected = (off - off.mean()) / (0.3 - off.mean())
    torch.testing.assert_close(margin.severity(reference)[0], expected)


def test_near_failures_are_dense_beyond_and_sparse_below(reference):
    margin = margin_of(triatomic(STIFF), reference)
    # Severities of about 0, 0.6 (twice), 0.9, 1.5 and 20; every second frame is taken below 0.7.
    window = stretched(1.0, 1.19, 1.19, 1.26, 1.45, 8.0)
    found = margin.near_failures(window, torch.ones(6, 1, dtype=torch.bool), stride=2)
    assert found.positions[:, 1, 0].tolist() == pytest.approx([1.19, 1.26, 1.45])
    torch.testing.assert_close(found.margin, margin_kT(margin.severity(found.positions)[0]))
    assert found.atoms.all()
    valid = torch.tensor([True, False, True, False, True, True])[:, None]
    assert margin.near_failures(window, valid, stride=2).positions[:, 1, 0].tolist() == pytest.approx([1.45])


def test_gradient_is_that_of_the_loss(reference):
    potential = triatomic(2.0)
    margin = margin_of(potential, reference)
    positions = stretched(1.2, 1.3, 1.4, 1.6)[:, 0]
    limits = torch.tensor([0.1, 6.0, 9.0, 12.0], dtype=torch.float64)
    estimate, shortfall = margin.estimate(
        NearFailures(positions, limits, everything(positions)), torch.Generator().manual_seed(0)
    )
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
    low = NearFailures(positions, torch.tensor([1e-3, 1e-3], dtype=torch.float64), everything(positions))
    estimate, shortfall = margin_of(triatomic(STIFF), reference).estimate(low, torch.Generator())
    assert estimate.loss == 0.0 and estimate.gradients[0].item() == 0.0 and not shortfall.any()


def test_estimate_without_frames_is_zero(reference):
    estimate, shortfall = margin_of(triatomic(STIFF), reference).estimate(None, torch.Generator())
    assert estimate.loss == 0.0 and estimate.gradients[0].item() == 0.0 and len(shortfall) == 0


def test_estimate_is_over_the_frames_of_all_processes(reference):
    positions = stretched(1.2, 1.3, 1.4, 1.6)[:, 0]
    frames = NearFailures(positions, torch.tensor([0.1, 6.0, 9.0, 12.0], dtype=torch.float64), everything(positions))
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


def test_only_the_molecules_that_fail_count():
    atoms = waters()
    system = System.from_atoms(atoms)
    potential = ModulePotential(Springs(system.bonds, 10.0, torch.full((4,), 0.97)), system)
    reference = torch.tensor(atoms.positions) + torch.tensor(
        np.random.default_rng(0).normal(scale=0.02, size=(20, 6, 3))
    )
    frames = reference[:2, None].clone()
    frames[0, 0, 1] += torch.tensor([0.0, 0.3, 0.0])
    frames[1, 0, 4] += torch.tensor([0.0, 0.3, 0.0])
    found = margin_of(potential, reference).near_failures(frames, torch.ones(2, 1, dtype=torch.bool), stride=1)
    assert found.atoms.tolist() == [[True] * 3 + [False] * 3, [False] * 3 + [True] * 3]
    contacts = AnyOf([BondDeviation(0.5, None), ClosestContact(1.2, None)])
    frames = reference[:1, None].clone()
    frames[0, 0, 3:, 2] -= 1.7
    found = margin_of(potential, reference, contacts).near_failures(
        frames, torch.ones(1, 1, dtype=torch.bool), stride=1
    )
    assert found.atoms.all(), "a collision is of both molecules"


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
    return NearFailures(positions, positions[:, 0, 0], positions[:, :, 0] > 0)


def drawn(buffer, number, seed=0):
    return buffer.draw(number, torch.Generator().manual_seed(seed)).margin.tolist()


def test_buffer_prefers_frames_that_fall_short():
    buffer = FrameBuffer()
    assert buffer.draw(3, torch.Generator()) is None
    buffer.add(frames_of(*range(1, 21)), torch.Generator())
    assert buffer.n_short == 20
    taken = buffer.draw(20, torch.Generator().manual_seed(1)).margin
    buffer.update((taken - 18.0).clamp_min(0.0))
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


def test_buffer_resumes():
    buffer, other = FrameBuffer(), FrameBuffer()
    buffer.add(frames_of(1, 2, 3, 4), torch.Generator())
    buffer.update((buffer.draw(4, torch.Generator()).margin - 3.0).clamp_min(0.0))
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
