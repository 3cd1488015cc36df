"""What all observables have in common, as torchmetrics, and an observable of a user."""

import copy

import pytest
import torch
from ase.build import molecule
from hypothesis import example, given, settings
from observable_tools import TRIANGLE, bound, noisy_frames, water_grid
from strategies import anything, check_argument_is_named, few
from torchmetrics import Metric, MetricCollection

from stable_plugin import (
    AngleDistribution,
    BondAmplitudes,
    BondLengths,
    DistanceDistribution,
    LocalBondAmplitudes,
    LocalBondLengths,
    LocalContactAmplitudes,
    LocalContacts,
    MeanSquaredDisplacement,
    Observable,
    Pressure,
    RadialDistribution,
    System,
)
from stable_plugin.observables.base import smeared_histogram

WATER, LIQUID = molecule("H2O"), water_grid()


@pytest.mark.parametrize("make", [BondLengths, DistanceDistribution, AngleDistribution], ids=lambda cls: cls.__name__)
def test_update_is_additive_until_reset(make, aspirin_frames, aspirin_positions):
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


def test_forward_returns_the_batch_and_accumulates():
    bonds = bound(BondLengths(), TRIANGLE)
    frames = torch.tensor(TRIANGLE.positions)[None]
    assert bonds(2.0 * frames).tolist() == pytest.approx([1.6, 1.2, 2.0])
    assert bonds(4.0 * frames).tolist() == pytest.approx([3.2, 2.4, 4.0])
    assert bonds.compute().tolist() == pytest.approx([2.4, 1.8, 3.0])
    assert bonds.mean_absolute_error() == pytest.approx((1.6 + 1.2 + 2.0) / 3)


def test_compute_squeezes_a_single_value():
    bonds = bound(BondLengths(), molecule("N2"))
    bonds.update(2.0 * torch.tensor(molecule("N2").positions)[None])
    length = molecule("N2").get_distance(0, 1)
    assert bonds.compute().shape == ()
    assert bonds.compute().item() == pytest.approx(2.0 * length)
    assert bonds.mean_absolute_error() == pytest.approx(length)


def test_clone_and_collection_are_independent():
    frames = torch.tensor(TRIANGLE.positions)[None]
    bonds = bound(BondLengths(), TRIANGLE)
    collection = MetricCollection([bonds, bound(DistanceDistribution(2.0, 0.1, 0.05), TRIANGLE)], compute_groups=False)
    collection.update(frames)
    assert set(collection.compute()) == {"BondLengths", "DistanceDistribution"}
    copy = bonds.clone()
    copy.update(3.0 * frames)
    assert bonds.count == 1
    assert copy.count == 2


def test_standard_error_is_that_of_block_means():
    """The frames of one block are copies of each other, so only the number of blocks matters."""
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


def test_standard_error_of_one_block_is_nan():
    observable = BondLengths()
    frames = torch.tensor(molecule("N2").positions)[None]
    observable.bind(System.from_atoms(molecule("N2")), frames)
    observable.update(frames)
    assert observable.standard_error().isnan().all()


def test_update_accumulates_in_double_precision():
    bonds = bound(BondLengths(), TRIANGLE)
    bonds.update(torch.tensor(TRIANGLE.positions, dtype=torch.float32)[None].repeat(1000, 1, 1))
    assert bonds.compute().dtype == torch.float64
    assert bonds.compute().tolist() == pytest.approx([0.8, 0.6, 1.0], rel=1e-6)


def test_smeared_histogram_separates_frames():
    centers = torch.arange(10, dtype=torch.float64) + 0.5
    counts = smeared_histogram(torch.tensor([[2.5, 2.5], [7.5, 4.5]], dtype=torch.float64), centers, 0.01)
    expected = torch.zeros(2, 10, dtype=torch.float64)
    expected[0, 2], expected[1, 7], expected[1, 4] = 2.0, 1.0, 1.0
    assert torch.allclose(counts, expected)


def test_target_argument_overrides_the_reference():
    bonds = bound(BondLengths(target=[1.0, 1.0, 1.0]), TRIANGLE)
    assert bonds.target.tolist() == [1.0, 1.0, 1.0]
    bonds.update(torch.tensor(TRIANGLE.positions)[None])
    assert bonds.mean_absolute_error() == pytest.approx(0.2)


def test_bind_averages_the_reference(aspirin_frames, aspirin_positions):
    observable = bound(DistanceDistribution(), aspirin_frames[0], aspirin_positions)
    assert torch.allclose(observable.target, observable.per_frame(aspirin_positions).mean(dim=0), rtol=1e-12)


def test_bind_rejects_a_target_of_other_shape():
    with pytest.raises(ValueError, match=r"target of BondLengths has shape \(2,\), but the observable has \(3,\)"):
        bound(BondLengths(target=[1.0, 1.0]), TRIANGLE)


def test_name_is_in_snake_case():
    assert [cls().name for cls in (BondLengths, DistanceDistribution, AngleDistribution)] == [
        "bond_lengths",
        "distance_distribution",
        "angle_distribution",
    ]


@pytest.mark.parametrize(
    ("observable", "atoms"),
    [
        (BondLengths(), WATER),
        (BondAmplitudes(), WATER),
        (AngleDistribution(), WATER),
        (DistanceDistribution(), WATER),
        (LocalBondLengths(), LIQUID),
        (LocalBondAmplitudes(), LIQUID),
        (LocalContacts(), LIQUID),
        (LocalContactAmplitudes(), LIQUID),
        (RadialDistribution(), LIQUID),
    ],
    ids=lambda value: type(value).__name__,
)
def test_axis_has_one_x_per_value(observable, atoms):
    bound(observable, atoms, noisy_frames(atoms, 5))
    axis = observable.axis()
    assert observable.per_frame(noisy_frames(atoms, 3, seed=1)).shape == (3, len(axis["x"]))
    assert axis["kind"] in ("curve", "bars")
    assert axis["xlabel"] and axis["ylabel"]


@pytest.mark.parametrize(
    "observable",
    [BondLengths(), DistanceDistribution(), AngleDistribution(), RadialDistribution()],
    ids=lambda observable: observable.name,
)
def test_observable_before_bind_raises(observable):
    with pytest.raises(RuntimeError, match=rf"{type(observable).__name__} has no system yet: call bind\(system, ref"):
        observable.update(torch.zeros(1, 3, 3))
    with pytest.raises(RuntimeError, match=rf"{type(observable).__name__} has no target yet: call bind\(system, ref"):
        observable.mean_absolute_error()


@pytest.mark.parametrize(
    "observable", [LocalBondLengths(), LocalContacts(), RadialDistribution()], ids=lambda o: o.name
)
def test_per_site_before_bind_raises(observable):
    with pytest.raises(RuntimeError, match=rf"{type(observable).__name__} has no system yet: call bind\(system, ref"):
        observable.per_site(noisy_frames(LIQUID, 2), torch.zeros(24, dtype=torch.long))


@pytest.mark.parametrize(
    ("kind", "name", "also"),
    [
        (DistanceDistribution, "r_max", "bin_width|smearing"),
        (DistanceDistribution, "bin_width", "bin_width|r_max"),
        (DistanceDistribution, "smearing", None),
        (RadialDistribution, "r_max", None),
        (RadialDistribution, "bin_width", None),
        (RadialDistribution, "smearing", None),
        (AngleDistribution, "n_bins", None),
        (AngleDistribution, "smearing", None),
        (Pressure, "target_GPa", None),
    ],
    ids=lambda each: getattr(each, "__name__", each),
)
@settings(few, max_examples=15)
@given(value=anything)
@example(value=float("nan"))
@example(value=10**30)
@example(value="1")
def test_init_names_any_invalid_argument(kind, name, also, value):
    check_argument_is_named(kind, name, value, also)


@pytest.mark.parametrize(
    ("observable", "expected"),
    [
        (BondLengths(), "BondLengths()"),
        (DistanceDistribution(5.0), "DistanceDistribution(r_max=5.0, bin_width=0.02, smearing=0.01)"),
        (
            RadialDistribution(("O", "H"), target_file=None, sync_on_compute=False),
            "RadialDistribution(pair=('O', 'H'), bin_width=0.05, smearing=0.03, intramolecular=True, "
            "r_min=0.0, sync_on_compute=False)",
        ),
        (LocalContacts(target=[3.0]), "LocalContacts(target=[3.0])"),
        (
            MeanSquaredDisplacement(1.0, max_lag_ps=0.5),
            "MeanSquaredDisplacement(interval_fs=1.0, max_lag_ps=0.5, remove_drift=True)",
        ),
        (BondLengths(target=torch.ones(3)), "BondLengths(target=Tensor(3,))"),
    ],
    ids=lambda value: "" if isinstance(value, str) else value.name,
)
def test_repr_shows_the_arguments(observable, expected):
    assert repr(observable) == expected
    assert repr(copy.deepcopy(observable)) == expected
    assert repr(observable.clone()) == expected


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), "1", [], [1.0, 0.0], [[1.0]]])
def test_scale_must_be_positive(scale):
    with pytest.raises(ValueError, match=r"scale=.* is not a number|scale=.* is out of range"):
        BondLengths(scale=scale)


def test_scale_has_the_shape_of_the_observable():
    with pytest.raises(ValueError, match=r"scale of BondLengths has shape \(2,\), but the observable has \(3,\)"):
        bound(BondLengths(scale=[1.0, 2.0]), TRIANGLE)


class RadiusOfGyration(Observable):
    """Radius of gyration without masses: the least that a user has to write."""

    def per_frame(self, positions):
        centered = positions - positions.mean(dim=1, keepdim=True)
        return centered.square().sum(dim=-1).mean(dim=1, keepdim=True).sqrt()


def test_user_observable_needs_per_frame_only():
    observable = bound(RadiusOfGyration(), molecule("N2"))
    length = molecule("N2").get_distance(0, 1)
    assert observable.target.tolist() == pytest.approx([length / 2])
    observable.update(2.0 * torch.tensor(molecule("N2").positions)[None])
    assert observable.compute().item() == pytest.approx(length)
    assert observable.name == "radius_of_gyration"
    assert observable.axis() == {"kind": "bars", "x": [0], "xlabel": "value", "ylabel": "radius_of_gyration"}
