"""What holds for whatever structures, cells, masses, thresholds, bins and schedules there are."""

from __future__ import annotations

import math
import re
from dataclasses import asdict
from itertools import product

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from stable_plugin import (
    AngleDistribution,
    AnyOf,
    BondDeviation,
    DistanceDistribution,
    Langevin,
    NoseHooverChain,
    RadialDistribution,
    RunawayTemperature,
    Schedule,
    System,
)
from stable_plugin.algorithm.neighborhoods import even_sample
from stable_plugin.algorithm.schedule import PhaseTracker
from stable_plugin.md.system import MIN_DISTANCE_A, check_geometry, stack_positions
from stable_plugin.runtime import checks
from stable_plugin.units import BOLTZMANN

few = settings(max_examples=25, deadline=None, derandomize=True)

numbers = st.floats(allow_nan=True, allow_infinity=True) | st.integers(-(10**40), 10**40) | st.booleans() | st.none()
anything = numbers | st.text(max_size=5) | st.lists(st.integers(), max_size=2)
shares = st.floats(0.0, 1.0)


@st.composite
def cells(draw):
    """Any three vectors that span a volume and are not too flat, right- or left-handed."""
    lengths = draw(arrays(float, 3, elements=st.floats(3.0, 9.0)))
    skew = np.tril(draw(arrays(float, (3, 3), elements=st.floats(-0.6, 0.6))), -1)
    cell = np.diag(lengths) + skew * lengths[:, None]
    return cell[list(draw(st.permutations([0, 1, 2])))]


@st.composite
def crystals(draw):
    """Atoms of several elements anywhere in any cell, that repeats in some directions, at a distance from each other."""
    number, cell = draw(st.integers(2, 8)), draw(cells())
    places = draw(arrays(float, (number, 3), elements=st.floats(-1.5, 1.5, width=32), unique=True))
    pbc = draw(st.lists(st.booleans(), min_size=3, max_size=3))
    elements = draw(st.lists(st.sampled_from(["H", "C", "O", "Cu"]), min_size=number, max_size=number))
    atoms = Atoms(elements, positions=places @ cell, cell=cell, pbc=pbc)
    assume(shortest(atoms) > 0.3)
    return atoms


def shortest(atoms):
    """Shortest distance of two atoms, over all images that can matter."""
    images = [range(-4, 5) if repeats else [0] for repeats in atoms.pbc]
    shifts = np.array(list(product(*images))) @ atoms.cell.array
    first, second = np.triu_indices(len(atoms), 1)
    vectors = atoms.positions[second] - atoms.positions[first]
    return np.linalg.norm(vectors[:, None] + shifts, axis=-1).min()


@few
@given(crystals(), st.data())
def test_structures_are_accepted_wherever_their_atoms_lie_and_refused_when_two_are_one(atoms, data):
    check_geometry(atoms, "x")
    images = data.draw(arrays(int, 3, elements=st.integers(-3, 3))) * atoms.pbc
    twice = atoms.copy()
    twice.positions[-1] = atoms.positions[0] + images @ atoms.cell.array
    twice.positions[-1] += data.draw(arrays(float, 3, elements=st.floats(-0.3, 0.3))) * MIN_DISTANCE_A
    with pytest.raises(ValueError, match=r"^x\[2\] has two atoms at the same place"):
        check_geometry(twice, "x[2]")


@few
@given(crystals())
def test_distances_are_those_of_the_nearest_image_as_far_as_is_promised(atoms):
    system = System.from_atoms(atoms, bonds=[])
    pairs = torch.combinations(torch.arange(len(atoms)), 2)
    first, second = pairs.numpy().T
    found = system.distances(torch.tensor(atoms.positions), pairs).numpy()
    images = [range(-5, 6) if repeats else [0] for repeats in atoms.pbc]
    shifts = np.array(list(product(*images))) @ atoms.cell.array
    vectors = atoms.positions[second] - atoms.positions[first]
    nearest = np.linalg.norm(vectors[:, None] + shifts, axis=-1).min(axis=1)
    within = nearest < system.minimum_image_cutoff
    np.testing.assert_allclose(found[within], nearest[within], atol=1e-9)
    assert (found >= nearest - 1e-9).all()


@few
@given(crystals(), st.permutations([0, 1, 2]), st.data())
def test_bonds_do_not_depend_on_the_images_that_atoms_lie_in_nor_on_the_order_of_the_cells_vectors(atoms, order, data):
    images = data.draw(arrays(int, (len(atoms), 3), elements=st.integers(-3, 3))) * atoms.pbc
    order = list(order)
    moved = Atoms(
        atoms.numbers, atoms.positions + images @ atoms.cell.array, cell=atoms.cell.array[order], pbc=atoms.pbc[order]
    )
    first, second = System.from_atoms(atoms), System.from_atoms(moved)
    assert first.bonds.tolist() == second.bonds.tolist()
    assert first.is_extended == second.is_extended
    assert first.molecules.tolist() == second.molecules.tolist()
    assert first.minimum_image_cutoff == pytest.approx(second.minimum_image_cutoff)


@few
@given(crystals(), st.data())
def test_what_comes_of_a_structure_goes_back_to_it(atoms, data):
    masses = data.draw(arrays(float, len(atoms), elements=st.floats(0.5, 300.0)))
    atoms.set_masses(masses)
    system = System.from_atoms(atoms)
    back = system.atoms(torch.tensor(atoms.positions))
    np.testing.assert_array_equal(back.positions, atoms.positions)
    np.testing.assert_array_equal(back.get_masses(), masses)
    assert back.get_chemical_symbols() == atoms.get_chemical_symbols() and (back.pbc == atoms.pbc).all()
    assert stack_positions([back], system, "back").shape == (1, len(atoms), 3)


@few
@given(st.floats() | st.integers(-5, 5))
@example(0.0)
@example(math.nan)
def test_masses_are_positive_and_finite_or_refused(mass):
    atoms = molecule("H2O")
    atoms.set_masses([16.0, mass, 1.0])
    if math.isfinite(mass) and mass > 0:
        assert System.from_atoms(atoms).masses[1] == mass
    else:
        with pytest.raises(ValueError, match="without a mass"):
            System.from_atoms(atoms)


@few
@given(arrays(float, 3, elements=st.floats(0.5, 300.0)), st.floats(1.0, 2000.0), st.integers(0, 2**63 - 2))
def test_thermal_velocities_scale_with_temperature_over_mass(masses, temperature_K, seed):
    def drawn(masses, temperature_K):
        generator = torch.Generator().manual_seed(seed)
        return Langevin(temperature_K).initial_velocities((4, 3, 3), torch.tensor(masses), generator)

    scale = np.sqrt(BOLTZMANN * temperature_K / masses)[:, None]
    unit = drawn(np.full(3, BOLTZMANN * 300.0), 300.0)
    np.testing.assert_allclose(drawn(masses, temperature_K).numpy(), unit.numpy() * scale, rtol=1e-9)


ALONE = [
    *((Langevin, name) for name in ("temperature_K", "timestep_fs", "friction_per_ps")),
    *((NoseHooverChain, name) for name in ("temperature_K", "timestep_fs", "relaxation_fs", "chain_length")),
    *(
        (Schedule, name)
        for name in (
            "max_unstable_fraction",
            "min_unstable_fraction",
            "stable_ps",
            "lr_patience",
            "lr_cut",
            "max_lr_cuts",
            "max_windows",
        )
    ),
    *((DistanceDistribution, name) for name in ("r_max", "bin_width", "smearing")),
    *((RadialDistribution, name) for name in ("r_max", "bin_width", "smearing")),
    *((AngleDistribution, name) for name in ("n_bins", "smearing")),
    *((BondDeviation, name) for name in ("threshold", "discard")),
    (RunawayTemperature, "threshold"),
]


TOGETHER = {"threshold": "discard", "bin_width": "r_max", "timestep_fs": "relaxation_fs", "r_max": "smearing|bin_width"}
"""What may be named instead, as the two do not fit."""


@pytest.mark.parametrize(("kind", "name"), ALONE, ids=lambda each: getattr(each, "__name__", each))
@settings(few, max_examples=15)
@given(value=anything)
@example(value=math.nan)
@example(value=10**30)
@example(value="1")
def test_an_argument_that_makes_no_sense_is_named_with_its_value(kind, name, value):
    try:
        kind(**{name: value})
    except ValueError as error:
        assert re.match(rf"({name}|{TOGETHER.get(name, name)})=", str(error)), error
        assert repr(value) in str(error) or re.match(rf"({TOGETHER.get(name)}|floor|bin_width)=", str(error)), error
    else:
        assert isinstance(value, int | float | None) and value == value and value not in (10**30, math.inf)


def accepted(make, names):
    """What was made, or None if one of the arguments was refused by name."""
    try:
        return make()
    except ValueError as error:
        assert any(str(error).startswith(f"{name}=") for name in names), error
        return None


@few
@given(anything, anything, anything, anything)
def test_checks_return_what_is_in_range_and_name_what_is_not(value, above, least, most):
    bounds = {
        name: bound
        for name, bound in (("above", above), ("least", least), ("most", most))
        if isinstance(bound, float) and math.isfinite(bound)
    }
    plain = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63
    inside = plain and all(
        {"above": value > bound, "least": value >= bound, "most": value <= bound}[name]
        for name, bound in bounds.items()
    )
    found = accepted(lambda: checks.number("x", value, **bounds), ["x"])
    if not isinstance(value, float) or abs(value) < 2**63 or not math.isfinite(value):
        assert (found is not None) == inside
    whole = isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**63
    assert (accepted(lambda: checks.count("x", value), ["x"]) is not None) == whole


@few
@given(st.floats(1e-3, 10.0), st.integers(1, 10**9), st.floats(0.0, 0.4))
def test_durations_are_whole_numbers_of_steps_or_refused(timestep_fs, n_steps, off):
    assert checks.steps("x", n_steps * timestep_fs, timestep_fs) == n_steps
    assume(off > 1e-3 and n_steps < 1000)
    with pytest.raises(ValueError, match=r"^x=.* is not a whole number of timesteps"):
        checks.steps("x", (n_steps + off) * timestep_fs, timestep_fs)


WATER = molecule("H2O")


@few
@given(st.floats(0.01, 2.0), st.floats(0.01, 2.0), arrays(float, (6, 3, 3), elements=st.floats(-1.0, 1.0)))
def test_a_higher_threshold_calls_no_more_replicas_unstable(one, other, displacements):
    system, rest = System.from_atoms(WATER), torch.tensor(WATER.positions)[None]
    frames = rest + torch.tensor(displacements)
    frames[0, 1, 1] = torch.nan
    verdicts = {}
    for threshold in sorted((one, other)):
        detector = BondDeviation(threshold, discard=threshold)
        detector.bind(system, rest)
        broken, discarded = detector.classify(frames, torch.zeros_like(frames))
        assert broken[0] and discarded[0]
        assert (broken == discarded).all()
        verdicts[threshold] = broken
    assert (verdicts[max(one, other)] <= verdicts[min(one, other)]).all()


@few
@given(st.floats(0.05, 1.0), st.floats(10.0, 3000.0), arrays(float, (5, 3, 3), elements=st.floats(-0.5, 0.5)))
def test_any_of_several_detectors_is_their_union(threshold, temperature_K, values):
    system, rest = System.from_atoms(WATER), torch.tensor(WATER.positions)[None]
    detectors = [BondDeviation(threshold), RunawayTemperature(temperature_K)]
    either = AnyOf(detectors)
    either.bind(system, rest)
    frames, velocities = rest + torch.tensor(values), 0.2 * torch.tensor(values).flip(0)
    found = either.classify(frames, velocities)[0]
    assert (found == sum(d.classify(frames, velocities)[0].int() for d in detectors).bool()).all()
    assert ((either.measure(frames, velocities) > 1.0) == found).all()


@few
@given(anything, anything)
def test_thresholds_are_numbers_and_discard_limits_no_tighter(threshold, discard):
    detector = accepted(lambda: BondDeviation(threshold, discard), ("threshold", "discard"))
    if detector is not None and discard is not None:
        assert discard >= threshold


@few
@given(st.integers(2, 400), st.floats(0.05, 5.0), arrays(float, (2, 3, 3), elements=st.floats(-0.4, 0.4)))
def test_angle_distributions_are_percent_whatever_their_bins(n_bins, smearing, displacements):
    system, frames = System.from_atoms(WATER), torch.tensor(WATER.positions + displacements)
    observable = AngleDistribution(n_bins, smearing)
    observable.bind(system, frames)
    values = observable.per_frame(frames)
    assert values.shape == (2, n_bins) and (values >= 0).all()
    total = values.sum(dim=1)
    assert (total <= 100.0 + 1e-6).all()
    vectors = [frames[:, end] - frames[:, 0] for end in (1, 2)]
    angles = torch.rad2deg(torch.arccos(torch.nn.functional.cosine_similarity(*vectors, dim=-1)))
    inside = (angles > 6 * smearing) & (angles < 180 - 6 * smearing)
    assert (total[inside] > 100.0 - 1e-3).all()


@few
@given(st.floats(2.0, 12.0), st.floats(0.01, 0.5), st.floats(0.005, 0.5))
def test_distance_distributions_count_every_pair_once_whatever_their_bins(r_max, bin_width, smearing):
    frames = torch.tensor(WATER.positions)[None]
    observable = DistanceDistribution(r_max, bin_width, smearing)
    observable.bind(System.from_atoms(WATER), frames)
    total = observable.per_frame(frames).sum().item()
    assert total <= 100.0 + 1e-6
    if len(observable.centres) * bin_width > 1.6 + 6 * smearing and smearing < 0.1:
        assert total == pytest.approx(100.0, abs=1e-3)


@few
@given(st.integers(0, 2**31), arrays(int, (8, 3), elements=st.integers(-2, 2)), st.permutations([0, 1, 2]))
def test_radial_distributions_see_neither_images_nor_the_order_of_the_cells_vectors(seed, images, order):
    random = np.random.default_rng(seed)
    cell = np.diag([7.0, 8.0, 9.0]) + random.uniform(-0.5, 0.5, (3, 3))
    atoms = Atoms("Cu8", positions=random.uniform(size=(8, 3)) @ cell, cell=cell, pbc=True)
    assume(shortest(atoms) > 0.1)
    moved = Atoms("Cu8", positions=atoms.positions + images @ cell, cell=cell[list(order)], pbc=True)
    curves = []
    for each in (atoms, moved):
        observable = RadialDistribution(r_max=3.0)
        observable.bind(System.from_atoms(each, bonds=[]), torch.tensor(each.positions)[None])
        curves.append(observable.target)
    torch.testing.assert_close(*curves, atol=1e-9, rtol=1e-9)


@st.composite
def schedules(draw):
    trigger = draw(st.floats(0.01, 1.0))
    return Schedule(
        max_unstable_fraction=trigger,
        min_unstable_fraction=draw(st.floats(0.0, 0.99)) * trigger,
        stable_ps=draw(st.floats(0.1, 3.0)),
        lr_patience=draw(st.integers(1, 4)),
        lr_cut=draw(st.floats(0.01, 1.0)),
        max_lr_cuts=draw(st.integers(0, 3)),
        max_windows=draw(st.none() | st.integers(1, 12)),
    )


def step(phases, share):
    if phases.name == "simulate":
        return phases.after_simulation_window(share, 0.4)
    return phases.after_learning_window(share)


@settings(few, max_examples=100)
@given(schedules(), st.lists(shares, min_size=1, max_size=40))
def test_schedules_end_for_a_reason_and_never_cut_too_often(schedule, outcomes):
    phases, stable = PhaseTracker(schedule), 0.0
    for share in outcomes:
        was = phases.name
        after = step(phases, share)
        assert phases.lr_cuts <= schedule.max_lr_cuts
        assert schedule.lr_cut**schedule.max_lr_cuts * (1 - 1e-9) <= phases.lr_factor <= 1.0
        used_up = schedule.max_windows is not None and phases.learning_windows >= schedule.max_windows
        if was == "simulate":
            stable += 0.4
            assert (after == "learn") if share >= schedule.max_unstable_fraction else True
            if after == "done":
                assert share <= schedule.min_unstable_fraction and stable >= schedule.stable_ps * (1 - 1e-6)
        else:
            assert (after == "done") == used_up
            if not used_up and share <= schedule.min_unstable_fraction:
                assert after == "simulate"
        if after != "simulate":
            stable = 0.0
        if after == "done":
            break
    # Where every window is stable, training ends.
    for _ in range(50 if phases.name != "done" else 0):
        if step(phases, 0.0) == "done":
            break
    assert phases.name == "done"


@few
@given(schedules(), st.lists(shares, max_size=20), st.lists(shares, min_size=1, max_size=20))
def test_a_schedule_that_was_saved_goes_on_as_it_would_have(schedule, before, after):
    whole = PhaseTracker(schedule)
    for share in before:
        if whole.name != "done":
            step(whole, share)
    resumed = PhaseTracker(schedule)
    resumed.load_state_dict(whole.state_dict())
    for share in after:
        if whole.name != "done":
            assert step(whole, share) == step(resumed, share)
    assert asdict(whole) == asdict(resumed)


@few
@given(
    arrays(float, st.integers(1, 60), elements=st.floats(0.0, 1e3)),
    st.integers(1, 20),
    st.integers(1, 5),
    st.integers(0, 99),
)
def test_even_samples_take_so_many_of_every_bin(deviation, n_bins, per_bin, seed):
    chosen = even_sample(torch.tensor(deviation), n_bins, per_bin, torch.Generator().manual_seed(seed))
    assert len(set(chosen.tolist())) == len(chosen) and (chosen.diff() > 0).all()
    width = max(deviation.max(), torch.finfo(torch.float64).tiny) / n_bins
    bins = np.minimum((deviation / width).astype(int), n_bins - 1)
    for number in set(bins):
        assert (bins[chosen] == number).sum() == min(per_bin, (bins == number).sum())
