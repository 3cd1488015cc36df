"""What all detectors have in common, their combination, and a detector of a user."""

import copy
import pickle

import pytest
import torch
from ase.build import bulk, molecule
from detector_tools import at_rest, bound, chain_frames, classified, water_box
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from strategies import accepted, anything, check_argument_is_named, few
from toys import Oscillators

from stable_plugin import (
    AnyOf,
    BondDeviation,
    BondLengths,
    ClosestContact,
    CoordinationNumber,
    Detector,
    IntermolecularContact,
    Langevin,
    LindemannCriterion,
    NonFinite,
    ObservableDeviation,
    RunawayTemperature,
    System,
)
from stable_plugin.md import Simulator
from stable_plugin.md.window import NEVER
from stable_plugin.models import ModulePotential
from stable_plugin.units import FS

WATER = molecule("H2O")


def test_classify_counts_the_threshold_as_stable():
    detector = bound(BondDeviation(0.5, 0.5), reference=chain_frames({(3, 0): 4.25}))
    assert classified(detector, chain_frames({(3, 0): 4.75})) == ([False], [False])


def test_classify_without_limit_discards_nan_only():
    detector = bound(BondDeviation(0.25, None))
    positions = chain_frames({(3, 0): 1e6}, {(3, 0): float("nan")})
    assert classified(detector, positions) == ([True, True], [False, True])


@pytest.mark.parametrize(
    "detector",
    [
        BondDeviation(),
        BondDeviation(0.25, None),
        ClosestContact(),
        NonFinite(),
        RunawayTemperature(1000.0),
        AnyOf([ClosestContact(), BondDeviation()]),
    ],
    ids=str,
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_classify_reports_nonfinite_numbers(detector, value):
    bound(detector)
    positions = chain_frames({}, {})
    velocities = at_rest(positions)
    (velocities if isinstance(detector, RunawayTemperature) else positions)[1, 3, 0] = value
    if isinstance(detector, ClosestContact) and value == float("inf"):
        positions[1, 3, 0] = torch.nan  # an atom at infinity has no close contact
    unstable, _ = classified(detector, positions, velocities)
    assert unstable == [False, True]


@few
@given(st.floats(0.01, 2.0), st.floats(0.01, 2.0), arrays(float, (6, 3, 3), elements=st.floats(-1.0, 1.0)))
def test_classify_is_monotonic_in_the_threshold(one, other, displacements):
    reference = torch.tensor(WATER.positions)[None]
    frames = reference + torch.tensor(displacements)
    frames[0, 1, 1] = torch.nan
    flags = {}
    for threshold in sorted((one, other)):
        detector = bound(BondDeviation(threshold, discard=threshold), WATER, reference)
        unstable, discarded = detector.classify(frames, at_rest(frames))
        assert unstable[0] and discarded[0]
        assert (unstable == discarded).all()
        flags[threshold] = unstable
    assert (flags[max(one, other)] <= flags[min(one, other)]).all()


def test_check_reference_names_the_worst_frame():
    frames = chain_frames({}, {}, {(3, 0): 4.9}, {(3, 0): 4.6})
    detector = bound(BondDeviation(0.25))
    message = (
        r"^2 of 4 reference frames are unstable according to BondDeviation\(threshold=0\.25, discard=3\.0\): frame 2 "
        r"measures 0\.7 Å\. Remove those frames, or raise the threshold\."
    )
    with pytest.raises(ValueError, match=message):
        detector.check_reference(frames)
    with pytest.raises(ValueError, match=message):
        AnyOf([bound(ClosestContact()), detector]).check_reference(frames)
    detector.check_reference(frames[:2])


def test_check_reference_ranks_nan_first():
    frames = chain_frames({(3, 0): 4.9}, {(3, 0): float("nan")})
    with pytest.raises(ValueError, match=r"2 of 2 reference frames.*frame 1 measures nan"):
        bound(BondDeviation(0.25)).check_reference(frames)


def test_check_reference_without_unit():
    with pytest.raises(ValueError, match=r"frame 0 measures 1\. Remove"):
        NonFinite().check_reference(torch.full((1, 2, 3), torch.nan))


@pytest.mark.parametrize(
    "detector",
    [
        BondDeviation(),
        ClosestContact(),
        RunawayTemperature(500.0),
        LindemannCriterion(threshold=1.0),
        CoordinationNumber(distance=3.0),
    ],
    ids=lambda detector: type(detector).__name__,
)
def test_measure_before_bind_raises(detector):
    with pytest.raises(RuntimeError, match=rf"{type(detector).__name__} has no .*call bind\(system, reference\) first"):
        detector.measure(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BondDeviation(threshold=float("nan")), "threshold=nan"),
        (lambda: BondDeviation(0.5, 0.25), r"discard=0\.25 is out of range.*>= 0\.5.*not be less than the threshold"),
        (lambda: ClosestContact(0.3, 1.2), "discard"),
        (lambda: RunawayTemperature(0.0), r"threshold=0\.0"),
        (lambda: AnyOf([]), r"detectors=\[\] is empty: pass at least one"),
    ],
)
def test_init_names_arguments_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("kind", "name"),
    [(BondDeviation, "threshold"), (BondDeviation, "discard"), (RunawayTemperature, "threshold")],
    ids=lambda each: getattr(each, "__name__", each),
)
@settings(few, max_examples=15)
@given(value=anything)
@example(value=float("nan"))
@example(value=10**30)
@example(value="1")
def test_init_names_any_invalid_argument(kind, name, value):
    check_argument_is_named(kind, name, value, also="discard" if name == "threshold" else None)


@few
@given(anything, anything)
def test_init_accepts_discard_from_the_threshold_up(threshold, discard):
    detector = accepted(lambda: BondDeviation(threshold, discard), ("threshold", "discard"))
    if detector is not None and discard is not None:
        assert discard >= threshold


@pytest.mark.parametrize(
    ("detector", "expected"),
    [
        (BondDeviation(), "BondDeviation(threshold=0.25, discard=3.0)"),
        (BondDeviation(0.5, discard=None), "BondDeviation(threshold=0.5)"),
        (ClosestContact(1.0), "ClosestContact(distance=1.0, discard_distance=0.3)"),
        (NonFinite(), "NonFinite()"),
        (
            AnyOf([RunawayTemperature(900), NonFinite()]),
            "AnyOf(detectors=[RunawayTemperature(threshold=900), NonFinite()])",
        ),
        (
            ObservableDeviation(BondLengths(target=[1.0] * 9), n_samples=8),
            "ObservableDeviation(observable=BondLengths(target=[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, ...]), "
            "threshold=3.0, n_samples=8, norm='mean', overlapping=True)",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_repr_shows_the_arguments(detector, expected):
    assert repr(detector) == expected
    assert repr(copy.deepcopy(detector)) == expected
    assert repr(pickle.loads(pickle.dumps(detector))) == expected


def test_any_of_is_unstable_with_any_detector():
    detector = bound(AnyOf([BondDeviation(0.25, 1.0), ClosestContact(1.2, 0.3)]))
    bond_off, contact, far_off = {(3, 0): 4.5}, {(0, 0): 0.0, (3, 0): 1.0, (2, 0): 2.4}, {(3, 0): 6.0}
    positions = chain_frames({}, bond_off, contact, far_off)
    assert classified(detector.detectors[0], positions)[0] == [False, True, True, True]
    assert classified(detector.detectors[1], positions)[0] == [False, False, True, False]
    assert classified(detector, positions) == ([False, True, True, True], [False, False, False, True])
    assert str(detector) == "BondDeviation(threshold=0.25) or ClosestContact(distance=1.2)"


@few
@given(st.floats(0.05, 1.0), st.floats(10.0, 3000.0), arrays(float, (5, 3, 3), elements=st.floats(-0.5, 0.5)))
def test_any_of_is_the_union_of_its_detectors(threshold, temperature_K, values):
    detectors = [BondDeviation(threshold), RunawayTemperature(temperature_K)]
    either = bound(AnyOf(detectors), WATER)
    frames = torch.tensor(WATER.positions)[None] + torch.tensor(values)
    velocities = 0.2 * torch.tensor(values).flip(0)
    found = either.classify(frames, velocities)[0]
    assert (found == sum(d.classify(frames, velocities)[0].int() for d in detectors).bool()).all()
    assert ((either.measure(frames, velocities) > 1.0) == found).all()


def test_any_of_measures_above_one_where_unstable():
    detector = bound(AnyOf([BondDeviation(0.25, None), ClosestContact(1.2, None)]))
    shifts = torch.linspace(-3.6, 0.6, 43)
    positions = chain_frames(*({(3, 0): 4.2 + float(shift), (2, 0): 2.8 + float(shift) / 2} for shift in shifts))
    values = detector.measure(positions, at_rest(positions))
    unstable, _ = classified(detector, positions)
    assert {True, False} == set(unstable)
    assert (values > 1.0).tolist() == unstable


def test_any_of_ranks_shorter_contacts_higher():
    detector = bound(AnyOf([ClosestContact(1.2)]))
    positions = chain_frames({(3, 0): 2.4}, {(3, 0): 1.2}, {(3, 0): 0.6})
    assert detector.measure(positions, at_rest(positions)).tolist() == pytest.approx([0.0, 1.0, 1.5])


def test_any_of_restores_the_state_of_its_detectors():
    reference = torch.tensor(WATER.positions) + 0.05 * torch.randn(
        6, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    averaging = ObservableDeviation(BondLengths(), threshold=0.2, n_samples=3)
    both = bound(AnyOf([BondDeviation(threshold=0.5), averaging]), WATER, reference)
    both.reset(2)
    both.classify(reference[:2], at_rest(reference[:2]))
    state = both.state_dict()
    stretched = 3.0 * reference[2:4]
    expected = [tensor.clone() for tensor in both.classify(stretched, at_rest(stretched))]
    values = both.measure(stretched, at_rest(stretched))
    both.load_state_dict(state)
    repeated = both.classify(stretched, at_rest(stretched))
    assert all(torch.equal(mine, other) for mine, other in zip(repeated, expected, strict=True))
    assert torch.equal(both.measure(stretched, at_rest(stretched)), values)
    assert expected[0].all()


def test_any_of_checks_the_reference_with_each_detector():
    frames = torch.tensor(WATER.positions).repeat(3, 1, 1)
    both = bound(AnyOf([BondDeviation(0.5), ObservableDeviation(BondLengths(), threshold=0.2)]), WATER)
    both.check_reference(frames)
    with pytest.raises(ValueError, match="3 of 6 reference frames"):
        both.check_reference(torch.cat([frames, 3.0 * frames]))


def test_offending_atoms_of_each_detector():
    atoms = water_box()
    frames = torch.tensor(atoms.positions).repeat(3, 1, 1)
    frames[1, 4, 0] += 1.0
    frames[2, 7, 1] = torch.nan
    bonds = bound(BondDeviation(0.25), atoms)
    assert bonds.offending_atoms(frames, at_rest(frames))[1:] == [(3, 4), (6, 7)]
    velocities = at_rest(frames)
    velocities[0, 11] = 3.0
    hot = bound(RunawayTemperature(1000.0), atoms)
    assert hot.offending_atoms(frames, velocities)[0] == (11,)
    either = AnyOf([hot, bonds])
    assert either.offending_atoms(frames, velocities) == [(11,), (3, 4), (6, 7)]
    assert NonFinite().offending_atoms(frames, velocities) == [(), (), ()]


@pytest.mark.parametrize(
    ("detector", "atoms", "message"),
    [
        (
            BondDeviation(),
            bulk("Ar", cubic=True),
            r"BondDeviation\(.*\) finds no bonds in the system: pass them, System\.from_atoms\(\.\.\., bonds=",
        ),
        (ClosestContact(), WATER, r"ClosestContact\(.*\) finds no pair .*: use another detector"),
        (IntermolecularContact(), molecule("CH4"), r"finds no two molecules.*use ClosestContact"),
        (IntermolecularContact(), bulk("Cu", cubic=True) * 2, r"finds no two molecules.*LindemannCriterion"),
        (CoordinationNumber(4.0), water_box(), r"distance=4 is more than the cell allows, 3\.20 Å.*pass a smaller"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Detector) else "",
)
def test_bind_rejects_unsuitable_systems(detector, atoms, message):
    with pytest.raises(ValueError, match=message):
        bound(detector, atoms)


class Height(Detector):
    """Largest z coordinate in Å: the least that a user has to write."""

    unit = "Å"

    def measure(self, positions, velocities):
        return positions[..., 2].amax(dim=1)


def test_user_detector_stops_replicas_in_the_simulator():
    system = System.from_atoms(molecule("N2"))
    potential = ModulePotential(Oscillators(0.0), system)
    detector = AnyOf([Height(1.0, 2.0), NonFinite()])
    simulator = Simulator(potential, Langevin(300.0, 1.0, 0.0), detector, check_every_fs=1.0)
    positions = torch.zeros(2, 2, 3, dtype=torch.float64)
    positions[:, 0, 0] = 1.0
    velocities = torch.zeros_like(positions)
    velocities[1, 0, 2] = 0.0999 / FS
    start = simulator.prepare(positions, torch.Generator(), velocities)
    window = simulator.run(start, 30, 1, torch.Generator())
    # 0.0999 · 11 > 1 and 0.0999 · 21 > 2.
    assert window.unstable_step.tolist() == [NEVER, 11]
    assert window.valid[:, 1].tolist() == [step < 21 for step in range(1, 31)]
    assert str(detector).startswith("Height(threshold=1) or NonFinite")
    assert repr(detector.detectors[0]) == "Height(threshold=1.0, discard=2.0)"
