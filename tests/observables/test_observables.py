"""Observables by hand, against numpy and ASE, and as torchmetrics."""

from math import erf

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from torchmetrics import Metric, MetricCollection

from stable_plugin import AngleDistribution, BondLengths, DistanceDistribution, Observable, System
from stable_plugin.observables.base import smeared_histogram

TRIANGLE = Atoms("C3", positions=[[0, 0, 0], [0.8, 0, 0], [0, 0.6, 0]])
"""Sides of 0.8, 0.6 and 1.0 Å."""


def bound(observable, atoms, positions=None):
    positions = torch.tensor(atoms.positions)[None] if positions is None else positions
    observable.bind(System.from_atoms(atoms), positions)
    return observable


def smeared_by_hand(values, centres, width):
    """A histogram convolved with a Gaussian, integrated over every bin, by plain loops."""
    half = 0.5 * (centres[1] - centres[0])
    counts = np.zeros(len(centres))
    for value in values:
        for bin_, centre in enumerate(centres):
            upper, lower = ((centre + side * half - value) / (width * np.sqrt(2)) for side in (1, -1))
            counts[bin_] += 0.5 * (erf(upper) - erf(lower))
    return counts


def test_bond_lengths_by_hand():
    bonds = bound(BondLengths(), TRIANGLE)
    positions = torch.tensor(TRIANGLE.positions) * torch.tensor([1.0, 2.0])[:, None, None]
    assert bonds.per_frame(positions).flatten().tolist() == pytest.approx([0.8, 0.6, 1.0, 1.6, 1.2, 2.0])
    assert bonds.target.tolist() == pytest.approx([0.8, 0.6, 1.0])
    assert bonds.axis()["x"] == ["C0-C1", "C0-C2", "C1-C2"]


def test_bond_lengths_equal_those_of_ase(aspirin_frames, aspirin_positions):
    bonds = bound(BondLengths(), aspirin_frames[0], aspirin_positions)
    pairs = System.from_atoms(aspirin_frames[0]).bonds.tolist()
    for found, frame in zip(bonds.per_frame(aspirin_positions), aspirin_frames, strict=True):
        assert found.tolist() == pytest.approx([frame.get_distance(i, j) for i, j in pairs], rel=1e-12)


@pytest.mark.parametrize("make", [BondLengths, DistanceDistribution, AngleDistribution], ids=lambda cls: cls.__name__)
def test_updates_in_parts_equal_one_update_and_reset_forgets(make, aspirin_frames, aspirin_positions):
    observable = bound(make(), aspirin_frames[0], aspirin_positions[:5])
    assert isinstance(observable, Metric)
    observable.update(aspirin_positions)
    at_once = observable.compute()
    assert torch.allclose(at_once, observable.per_frame(aspirin_positions).mean(dim=0), rtol=1e-12)
    observable.reset()
    for part in aspirin_positions.split(7):
        observable.update(part)
    assert torch.allclose(observable.compute(), at_once, rtol=1e-12)
    observable.reset()
    observable.update(aspirin_positions[:5])
    assert torch.allclose(observable.compute(), observable.target, rtol=1e-12)
    assert observable.mean_absolute_error() == pytest.approx(0.0, abs=1e-12)


def test_calling_an_observable_gives_the_batch_and_collects_all():
    bonds = bound(BondLengths(), TRIANGLE)
    frames = torch.tensor(TRIANGLE.positions)[None]
    assert bonds(2.0 * frames).tolist() == pytest.approx([1.6, 1.2, 2.0])
    assert bonds(4.0 * frames).tolist() == pytest.approx([3.2, 2.4, 4.0])
    assert bonds.compute().tolist() == pytest.approx([2.4, 1.8, 3.0])
    assert bonds.mean_absolute_error() == pytest.approx((1.6 + 1.2 + 2.0) / 3)


def test_one_value_comes_back_without_an_axis_as_torchmetrics_has_it():
    bonds = bound(BondLengths(), molecule("N2"))
    bonds.update(2.0 * torch.tensor(molecule("N2").positions)[None])
    length = molecule("N2").get_distance(0, 1)
    assert bonds.compute().shape == ()
    assert bonds.compute().item() == pytest.approx(2.0 * length)
    assert bonds.mean_absolute_error() == pytest.approx(length)


def test_observables_work_in_a_collection_and_a_clone_is_independent():
    frames = torch.tensor(TRIANGLE.positions)[None]
    bonds = bound(BondLengths(), TRIANGLE)
    collection = MetricCollection([bonds, bound(DistanceDistribution(2.0, 0.1, 0.05), TRIANGLE)], compute_groups=False)
    collection.update(frames)
    assert set(collection.compute()) == {"BondLengths", "DistanceDistribution"}
    copy = bonds.clone()
    copy.update(3.0 * frames)
    assert bonds.count == 1
    assert copy.count == 2


def test_the_standard_error_is_that_of_the_means_of_blocks():
    """Frames of one block are copies of each other: only the number of blocks counts."""
    system = System.from_atoms(molecule("N2"))
    lengths = torch.tensor([1.0, 1.3, 1.1, 1.2], dtype=torch.float64)
    observable = BondLengths(target=[1.1])
    observable.bind(system, torch.tensor(molecule("N2").positions)[None])
    for length in lengths:
        block = torch.zeros(5, 2, 3, dtype=torch.float64)
        block[:, 1, 2] = length
        observable.update(block)
        observable.update(block[:0])
    assert observable.compute().item() == pytest.approx(1.15)
    assert observable.standard_error().item() == pytest.approx(lengths.std().item() / 2.0)


def test_one_block_has_no_standard_error():
    observable = BondLengths()
    frames = torch.tensor(molecule("N2").positions)[None]
    observable.bind(System.from_atoms(molecule("N2")), frames)
    observable.update(frames)
    assert observable.standard_error().isnan().all()


def test_single_precision_frames_are_averaged_in_double():
    bonds = bound(BondLengths(), TRIANGLE)
    bonds.update(torch.tensor(TRIANGLE.positions, dtype=torch.float32)[None].repeat(1000, 1, 1))
    assert bonds.compute().dtype == torch.float64
    assert bonds.compute().tolist() == pytest.approx([0.8, 0.6, 1.0], rel=1e-6)


def test_distances_equal_a_histogram_convolved_with_a_gaussian(aspirin_frames, aspirin_positions):
    observable = bound(DistanceDistribution(r_max=12.0, bin_width=0.1, smearing=0.07), aspirin_frames[0])
    found = observable.per_frame(aspirin_positions[:2])
    for values, frame in zip(found, aspirin_frames, strict=False):
        distances = frame.get_all_distances()[np.triu_indices(21, k=1)]
        expected = smeared_by_hand(distances, np.arange(120) * 0.1 + 0.05, 0.07) * 100.0 / len(distances)
        np.testing.assert_allclose(values.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("smearing", [0.001, 0.01, 0.05])
def test_distances_sum_to_a_hundred_inside_the_range(aspirin_frames, aspirin_positions, smearing):
    observable = bound(DistanceDistribution(12.0, 0.02, smearing), aspirin_frames[0])
    values = observable.per_frame(aspirin_positions)
    assert torch.allclose(values.sum(dim=1), torch.full((50,), 100.0, dtype=torch.float64), rtol=1e-6)


def test_distances_sum_to_a_hundred_wherever_in_its_bin_a_distance_lies():
    observable = bound(DistanceDistribution(), molecule("N2"))
    positions = torch.zeros(41, 2, 3, dtype=torch.float64)
    positions[:, 1, 0] = torch.linspace(1.0, 1.02, 41)
    sums = observable.per_frame(positions).sum(dim=1)
    assert torch.allclose(sums, torch.full((41,), 100.0, dtype=torch.float64), rtol=1e-6)


def test_distances_beyond_the_range_are_left_out():
    observable = bound(DistanceDistribution(r_max=0.9, bin_width=0.01, smearing=0.01), TRIANGLE)
    frames = torch.tensor(TRIANGLE.positions)[None]
    assert observable.per_frame(frames).sum().item() == pytest.approx(200.0 / 3)
    assert observable.per_frame(1e9 * frames).sum().item() == 0.0
    # Half of a Gaussian lies beyond the end of the range.
    assert observable.per_frame(frames * 0.9).sum().item() == pytest.approx(200.0 / 3 + 50.0 / 3, rel=1e-6)


def test_the_default_range_is_the_published_one():
    centres = DistanceDistribution().axis()["x"]
    assert len(centres) == 500
    assert centres[0] == pytest.approx(0.01)
    assert centres[-1] == pytest.approx(9.99)


def test_angles_equal_those_of_ase(aspirin_frames, aspirin_positions):
    observable = bound(AngleDistribution(n_bins=90, smearing=3.0), aspirin_frames[0])
    triples = System.from_atoms(aspirin_frames[0]).angles.tolist()
    found = observable.per_frame(aspirin_positions[:2])
    for values, frame in zip(found, aspirin_frames, strict=False):
        angles = [frame.get_angle(*triple) for triple in triples]
        expected = smeared_by_hand(angles, np.arange(90) * 2.0 + 1.0, 3.0) * 100.0 / len(angles)
        np.testing.assert_allclose(values.numpy(), expected, atol=1e-5)
        assert values.sum().item() == pytest.approx(100.0, rel=1e-5)


def test_a_right_angle_is_found_in_its_bin():
    observable = bound(AngleDistribution(n_bins=180, smearing=0.2), TRIANGLE)
    values = observable.per_frame(torch.tensor(TRIANGLE.positions)[None])[0]
    # 90 degrees lies on the edge of two bins; the others are 36.87 and 53.13 degrees.
    assert values[[36, 53, 89, 90]].tolist() == pytest.approx([100 / 3 * 0.742, 100 / 3 * 0.742, 50 / 3, 50 / 3], 2e-2)


def test_straight_and_folded_angles_are_finite():
    straight = Atoms("CO2", positions=[[0, 0, 0], [1.2, 0, 0], [-1.2, 0, 0]])
    folded = torch.tensor([[[0, 0, 0], [1.2, 0, 0], [1.2, 0, 0]]], dtype=torch.float32)
    observable = bound(AngleDistribution(), straight)
    for frames in (torch.tensor(straight.positions, dtype=torch.float32)[None], folded):
        values = observable.per_frame(frames)
        assert values.isfinite().all()
        assert values.sum().item() == pytest.approx(50.0, rel=0.05), "half of the Gaussian lies beyond the range"


def test_a_smeared_histogram_keeps_frames_apart():
    centres = torch.arange(10, dtype=torch.float64) + 0.5
    counts = smeared_histogram(torch.tensor([[2.5, 2.5], [7.5, 4.5]], dtype=torch.float64), centres, 0.01)
    expected = torch.zeros(2, 10, dtype=torch.float64)
    expected[0, 2], expected[1, 7], expected[1, 4] = 2.0, 1.0, 1.0
    assert torch.allclose(counts, expected)


def test_a_given_target_replaces_that_of_the_reference():
    bonds = bound(BondLengths(target=[1.0, 1.0, 1.0]), TRIANGLE)
    assert bonds.target.tolist() == [1.0, 1.0, 1.0]
    bonds.update(torch.tensor(TRIANGLE.positions)[None])
    assert bonds.mean_absolute_error() == pytest.approx(0.2)


def test_the_target_is_the_mean_over_the_reference(aspirin_frames, aspirin_positions):
    observable = bound(DistanceDistribution(), aspirin_frames[0], aspirin_positions)
    assert torch.allclose(observable.target, observable.per_frame(aspirin_positions).mean(dim=0), rtol=1e-12)


def test_a_target_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"target of BondLengths has shape \(2,\), but the observable has \(3,\)"):
        bound(BondLengths(target=[1.0, 1.0]), TRIANGLE)


@pytest.mark.parametrize(
    "observable", [BondLengths(), DistanceDistribution(), AngleDistribution()], ids=lambda o: o.name
)
def test_an_observable_that_was_not_bound_says_so(observable):
    with pytest.raises(RuntimeError, match=rf"{type(observable).__name__} has no system yet: call bind"):
        observable.update(torch.zeros(1, 3, 3))
    with pytest.raises(RuntimeError, match=rf"{type(observable).__name__} has no target yet: call bind"):
        observable.mean_absolute_error()


def test_systems_that_offer_nothing_to_look_at_are_refused():
    apart = Atoms("Ar2", positions=[[0, 0, 0], [0, 0, 9.0]])
    with pytest.raises(ValueError, match="BondLengths finds no bonds"):
        bound(BondLengths(), apart)
    with pytest.raises(ValueError, match="AngleDistribution finds no bond angle"):
        bound(AngleDistribution(), molecule("N2"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DistanceDistribution(bin_width=0.0), "bin_width=0"),
        (lambda: DistanceDistribution(r_max=0.03), r"r_max=0\.03 .*>= 0\.04"),
        (lambda: DistanceDistribution(smearing=-1.0), r"smearing=-1"),
        (lambda: AngleDistribution(n_bins=1), "n_bins=1"),
        (lambda: AngleDistribution(smearing=0.0), "smearing=0"),
    ],
)
def test_settings_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_names_are_those_of_logs():
    assert [cls().name for cls in (BondLengths, DistanceDistribution, AngleDistribution)] == [
        "bond_lengths",
        "distance_distribution",
        "angle_distribution",
    ]


class RadiusOfGyration(Observable):
    """All that a user has to write."""

    def per_frame(self, positions):
        centred = positions - positions.mean(dim=1, keepdim=True)
        return centred.square().sum(dim=-1).mean(dim=1, keepdim=True).sqrt()


def test_an_observable_of_the_users_own_needs_only_its_values():
    observable = bound(RadiusOfGyration(), molecule("N2"))
    length = molecule("N2").get_distance(0, 1)
    assert observable.target.tolist() == pytest.approx([length / 2])
    observable.update(2.0 * torch.tensor(molecule("N2").positions)[None])
    assert observable.compute().item() == pytest.approx(length)
    assert observable.name == "radius_of_gyration"
    assert observable.axis() == {"kind": "bars", "x": [0], "xlabel": "value", "ylabel": "radius_of_gyration"}
