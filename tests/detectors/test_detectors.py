"""Detectors by hand, combined, and written by a user."""

from math import sqrt

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from toys import Oscillators

from stable_plugin import (
    AnyOf,
    BondDeviation,
    ClosestContact,
    Detector,
    Langevin,
    NonFinite,
    RunawayTemperature,
    System,
)
from stable_plugin.md import Simulator
from stable_plugin.md.window import NEVER
from stable_plugin.models import ModulePotential
from stable_plugin.units import BOLTZMANN, FS

CHAIN = Atoms("C4", positions=[[0, 0, 0], [1.4, 0, 0], [2.8, 0, 0], [4.2, 0, 0]])
"""Four carbon atoms in a row: three bonds, two angles, one pair further apart than that."""


def chain_frames(*changes):
    """Frames of the chain, each with atoms moved as {(atom, axis): coordinate}."""
    frames = torch.tensor(CHAIN.positions).repeat(len(changes), 1, 1)
    for frame, change in zip(frames, changes, strict=True):
        for place, coordinate in change.items():
            frame[place] = coordinate
    return frames


def bound(detector, atoms=CHAIN, reference=None):
    reference = torch.tensor(atoms.positions)[None] if reference is None else reference
    detector.bind(System.from_atoms(atoms), reference)
    return detector


def at_rest(positions):
    return torch.zeros_like(positions)


def judged(detector, positions, velocities=None):
    broken, discarded = detector.classify(positions, at_rest(positions) if velocities is None else velocities)
    return broken.tolist(), discarded.tolist()


def test_bond_deviation_is_the_worst_bond_off_its_mean():
    # The first bond is 1.4 and 1.5 Å long in the reference: its mean is 1.45 Å.
    reference = chain_frames({}, {(0, 0): -0.1})
    detector = bound(BondDeviation(0.25, 1.0), reference=reference)
    positions = chain_frames({}, {(0, 0): -0.25}, {(3, 0): 3.9}, {(3, 0): 6.0})
    values = detector.measure(positions, at_rest(positions))
    assert values.tolist() == pytest.approx([0.05, 0.2, 0.3, 1.8])
    assert judged(detector, positions) == ([False, False, True, True], [False, False, False, True])


def test_a_value_on_the_threshold_is_still_stable():
    detector = bound(BondDeviation(0.5, 0.5), reference=chain_frames({(3, 0): 4.25}))
    assert judged(detector, chain_frames({(3, 0): 4.75})) == ([False], [False])


def test_without_a_discard_limit_only_nan_is_hopeless():
    detector = bound(BondDeviation(0.25, None))
    positions = chain_frames({(3, 0): 1e6}, {(3, 0): float("nan")})
    assert judged(detector, positions) == ([True, True], [False, True])


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
def test_numbers_that_are_not_finite_are_unstable(detector, value):
    bound(detector)
    positions = chain_frames({}, {})
    velocities = at_rest(positions)
    (velocities if isinstance(detector, RunawayTemperature) else positions)[1, 3, 0] = value
    if isinstance(detector, ClosestContact) and value == float("inf"):
        positions[1, 3, 0] = torch.nan  # an atom at infinity touches nothing
    broken, _ = judged(detector, positions, velocities)
    assert broken == [False, True]


def test_closest_contact_looks_at_pairs_more_than_two_bonds_apart():
    detector = bound(ClosestContact(1.2, 0.3))
    # Atom 3 comes close to atom 1 (a shared neighbour), then to atom 0.
    positions = chain_frames({}, {(3, 0): 1.5}, {(3, 0): 1.1}, {(3, 0): 0.2})
    assert detector.measure(positions, at_rest(positions)).tolist() == pytest.approx([-4.2, -1.5, -1.1, -0.2])
    assert judged(detector, positions) == ([False, False, True, True], [False, False, False, True])
    assert str(detector) == "ClosestContact(distance=1.2)"


def test_closest_contact_agrees_with_a_graph_of_bonds(aspirin_frames, aspirin_positions):
    system = System.from_atoms(aspirin_frames[0])
    adjacency = np.eye(21, dtype=bool)
    for i, j in system.bonds.tolist():
        adjacency[i, j] = adjacency[j, i] = True
    within_two = (adjacency.astype(int) @ adjacency.astype(int)) > 0
    detector = ClosestContact()
    detector.bind(system, aspirin_positions)
    found = detector.measure(aspirin_positions, at_rest(aspirin_positions))
    for value, frame in zip(found.tolist(), aspirin_frames, strict=True):
        assert value == pytest.approx(-frame.get_all_distances()[~within_two].min(), rel=1e-12)


def test_runaway_temperature_counts_all_degrees_of_freedom():
    detector = bound(RunawayTemperature(500.0, 1000.0), atoms=molecule("N2"))
    mass = 14.007
    velocities = torch.zeros(3, 2, 3, dtype=torch.float64)
    for replica, temperature in enumerate((400.0, 600.0, 1200.0)):
        # 3/2 · 2 kT of kinetic energy in one atom along x.
        velocities[replica, 0, 0] = sqrt(6 * BOLTZMANN * temperature / mass)
    assert detector.measure(velocities, velocities).tolist() == pytest.approx([400.0, 600.0, 1200.0])
    assert judged(detector, velocities, velocities) == ([False, True, True], [False, False, True])


def test_non_finite_is_hopeless_in_positions_and_velocities():
    positions = chain_frames({}, {}, {(2, 1): float("inf")})
    velocities = at_rest(positions)
    velocities[1, 0, 0] = torch.nan
    assert judged(NonFinite(), positions, velocities) == ([False, True, True], [False, True, True])


def test_any_of_is_alarmed_by_each_of_its_detectors():
    detector = bound(AnyOf([BondDeviation(0.25, 1.0), ClosestContact(1.2, 0.3)]))
    bond_off, contact, far_off = {(3, 0): 4.5}, {(0, 0): 0.0, (3, 0): 1.0, (2, 0): 2.4}, {(3, 0): 6.0}
    positions = chain_frames({}, bond_off, contact, far_off)
    assert judged(detector.detectors[0], positions)[0] == [False, True, True, True]
    assert judged(detector.detectors[1], positions)[0] == [False, False, True, False]
    assert judged(detector, positions) == ([False, True, True, True], [False, False, False, True])
    assert str(detector) == "BondDeviation(threshold=0.25) or ClosestContact(distance=1.2)"


def test_any_of_measures_above_one_exactly_where_it_is_alarmed():
    detector = bound(AnyOf([BondDeviation(0.25, None), ClosestContact(1.2, None)]))
    shifts = torch.linspace(-3.6, 0.6, 43)
    positions = chain_frames(*({(3, 0): 4.2 + float(shift), (2, 0): 2.8 + float(shift) / 2} for shift in shifts))
    values = detector.measure(positions, at_rest(positions))
    broken, _ = judged(detector, positions)
    assert {True, False} == set(broken)
    assert (values > 1.0).tolist() == broken


def test_any_of_calls_a_shorter_contact_worse():
    detector = bound(AnyOf([ClosestContact(1.2)]))
    positions = chain_frames({(3, 0): 2.4}, {(3, 0): 1.2}, {(3, 0): 0.6})
    assert detector.measure(positions, at_rest(positions)).tolist() == pytest.approx([0.0, 1.0, 1.5])


def test_reference_frames_that_are_broken_are_refused_and_named():
    frames = chain_frames({}, {}, {(3, 0): 4.9}, {(3, 0): 4.6})
    detector = bound(BondDeviation(0.25))
    message = (
        r"2 of 4 reference frames are broken by BondDeviation\(threshold=0\.25\): frame 2 measures 0\.7 Å\. "
        r"Remove those frames, or raise the threshold\."
    )
    with pytest.raises(ValueError, match=message):
        detector.check_reference(frames)
    with pytest.raises(ValueError, match=message):
        AnyOf([bound(ClosestContact()), detector]).check_reference(frames)
    detector.check_reference(frames[:2])


def test_a_reference_frame_that_is_nan_is_the_worst():
    frames = chain_frames({(3, 0): 4.9}, {(3, 0): float("nan")})
    with pytest.raises(ValueError, match=r"2 of 2 reference frames.*frame 1 measures nan"):
        bound(BondDeviation(0.25)).check_reference(frames)


def test_unit_less_values_end_their_sentence_without_a_gap():
    with pytest.raises(ValueError, match=r"frame 0 measures 1\. Remove"):
        NonFinite().check_reference(torch.full((1, 2, 3), torch.nan))


@pytest.mark.parametrize(
    "detector", [BondDeviation(), ClosestContact(), RunawayTemperature(500.0)], ids=lambda d: type(d).__name__
)
def test_a_detector_that_was_not_bound_says_so(detector):
    with pytest.raises(RuntimeError, match=rf"{type(detector).__name__} has no .*call bind\(system, reference\)"):
        detector.measure(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3))


def test_systems_without_bonds_or_distant_pairs_are_refused():
    with pytest.raises(ValueError, match="BondDeviation finds no bonds"):
        bound(BondDeviation(), atoms=Atoms("Ar2", positions=[[0, 0, 0], [0, 0, 9.0]]))
    with pytest.raises(ValueError, match="ClosestContact finds no pair"):
        bound(ClosestContact(), atoms=molecule("H2O"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BondDeviation(threshold=float("nan")), "threshold=nan"),
        (lambda: BondDeviation(0.5, 0.25), r"discard=0\.25 is out of range.*>= 0\.5.*wider than the threshold"),
        (lambda: ClosestContact(0.3, 1.2), "discard"),
        (lambda: RunawayTemperature(0.0), r"threshold=0\.0"),
        (lambda: AnyOf([]), r"detectors=\[\] is empty"),
    ],
)
def test_limits_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class Height(Detector):
    """How high the highest atom flies, in Å: all that a user has to write."""

    unit = "Å"

    def measure(self, positions, velocities):
        return positions[..., 2].amax(dim=1)


def test_a_detector_of_the_users_own_works_in_the_simulator():
    system = System.from_atoms(molecule("N2"))
    potential = ModulePotential(Oscillators(0.0), system)
    simulator = Simulator(
        potential, Langevin(300.0, 1.0, 0.0), AnyOf([Height(1.0, 2.0), NonFinite()]), check_every_fs=1.0
    )
    positions = torch.zeros(2, 2, 3, dtype=torch.float64)
    positions[:, 0, 0] = 1.0
    velocities = torch.zeros_like(positions)
    velocities[1, 0, 2] = 0.0999 / FS
    start = simulator.prepare(positions, torch.Generator(), velocities)
    window = simulator.run(start, 30, 1, torch.Generator())
    # 0.0999 · 11 > 1 and 0.0999 · 21 > 2.
    assert window.unstable_step.tolist() == [NEVER, 11]
    assert window.valid[:, 1].tolist() == [step < 21 for step in range(1, 31)]
    assert str(simulator.detector).startswith("Height(threshold=1) or NonFinite")
