"""Structural observables of molecules: closed answers, and agreement with numpy and ASE."""

from math import erf

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from observable_tools import TRIANGLE, bound, noisy_frames, water_grid
from strategies import few

from stable_plugin import AngleDistribution, BondAmplitudes, BondLengths, DistanceDistribution, System

WATER = molecule("H2O")


def brute_force_histogram(values, centers, width):
    """Return a histogram of Gaussians integrated over each bin, by plain loops."""
    half = 0.5 * (centers[1] - centers[0])
    counts = np.zeros(len(centers))
    for value in values:
        for bin_, center in enumerate(centers):
            upper, lower = ((center + side * half - value) / (width * np.sqrt(2)) for side in (1, -1))
            counts[bin_] += 0.5 * (erf(upper) - erf(lower))
    return counts


def test_bond_lengths_of_a_triangle():
    bonds = bound(BondLengths(), TRIANGLE)
    positions = torch.tensor(TRIANGLE.positions) * torch.tensor([1.0, 2.0])[:, None, None]
    assert bonds.per_frame(positions).flatten().tolist() == pytest.approx([0.8, 0.6, 1.0, 1.6, 1.2, 2.0])
    assert bonds.target.tolist() == pytest.approx([0.8, 0.6, 1.0])
    assert bonds.axis()["x"] == ["C0-C1", "C0-C2", "C1-C2"]


def test_bond_lengths_agree_with_ase(aspirin_frames, aspirin_positions):
    bonds = bound(BondLengths(), aspirin_frames[0], aspirin_positions)
    pairs = System.from_atoms(aspirin_frames[0]).bonds.tolist()
    for found, frame in zip(bonds.per_frame(aspirin_positions), aspirin_frames, strict=True):
        assert found.tolist() == pytest.approx([frame.get_distance(i, j) for i, j in pairs], rel=1e-12)


def test_distance_distribution_agrees_with_brute_force(aspirin_frames, aspirin_positions):
    observable = bound(DistanceDistribution(r_max=12.0, bin_width=0.1, smearing=0.07), aspirin_frames[0])
    found = observable.per_frame(aspirin_positions[:2])
    for values, frame in zip(found, aspirin_frames, strict=False):
        distances = frame.get_all_distances()[np.triu_indices(21, k=1)]
        expected = brute_force_histogram(distances, np.arange(120) * 0.1 + 0.05, 0.07) * 100.0 / len(distances)
        np.testing.assert_allclose(values.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("smearing", [0.001, 0.01, 0.05])
def test_distance_distribution_sums_to_a_hundred(aspirin_frames, aspirin_positions, smearing):
    observable = bound(DistanceDistribution(12.0, 0.02, smearing), aspirin_frames[0])
    values = observable.per_frame(aspirin_positions)
    assert torch.allclose(values.sum(dim=1), torch.full((50,), 100.0, dtype=torch.float64), rtol=1e-6)


def test_distance_distribution_sums_within_a_bin():
    observable = bound(DistanceDistribution(), molecule("N2"))
    positions = torch.zeros(41, 2, 3, dtype=torch.float64)
    positions[:, 1, 0] = torch.linspace(1.0, 1.02, 41)
    sums = observable.per_frame(positions).sum(dim=1)
    assert torch.allclose(sums, torch.full((41,), 100.0, dtype=torch.float64), rtol=1e-6)


def test_distance_distribution_truncates_its_range():
    observable = bound(DistanceDistribution(r_max=0.9, bin_width=0.01, smearing=0.01), TRIANGLE)
    frames = torch.tensor(TRIANGLE.positions)[None]
    assert observable.per_frame(frames).sum().item() == pytest.approx(200.0 / 3)
    assert observable.per_frame(1e9 * frames).sum().item() == 0.0
    # Half of a Gaussian is beyond the end of the range.
    assert observable.per_frame(frames * 0.9).sum().item() == pytest.approx(200.0 / 3 + 50.0 / 3, rel=1e-6)


def test_distance_distribution_default_range():
    centers = DistanceDistribution().axis()["x"]
    assert len(centers) == 500
    assert centers[0] == pytest.approx(0.01)
    assert centers[-1] == pytest.approx(9.99)


def test_angle_distribution_agrees_with_ase(aspirin_frames, aspirin_positions):
    observable = bound(AngleDistribution(n_bins=90, smearing=3.0), aspirin_frames[0])
    triples = System.from_atoms(aspirin_frames[0]).angles.tolist()
    found = observable.per_frame(aspirin_positions[:2])
    for values, frame in zip(found, aspirin_frames, strict=False):
        angles = [frame.get_angle(*triple) for triple in triples]
        expected = brute_force_histogram(angles, np.arange(90) * 2.0 + 1.0, 3.0) * 100.0 / len(angles)
        np.testing.assert_allclose(values.numpy(), expected, atol=1e-5)
        assert values.sum().item() == pytest.approx(100.0, rel=1e-5)


def test_angle_distribution_of_a_right_triangle():
    observable = bound(AngleDistribution(n_bins=180, smearing=0.2), TRIANGLE)
    values = observable.per_frame(torch.tensor(TRIANGLE.positions)[None])[0]
    # 90 degrees is on the edge of two bins; the others are 36.87 and 53.13 degrees.
    assert values[[36, 53, 89, 90]].tolist() == pytest.approx([100 / 3 * 0.742, 100 / 3 * 0.742, 50 / 3, 50 / 3], 2e-2)


def test_angle_distribution_at_0_and_180_degrees():
    straight = Atoms("CO2", positions=[[0, 0, 0], [1.2, 0, 0], [-1.2, 0, 0]])
    folded = torch.tensor([[[0, 0, 0], [1.2, 0, 0], [1.2, 0, 0]]], dtype=torch.float32)
    observable = bound(AngleDistribution(), straight)
    for frames in (torch.tensor(straight.positions, dtype=torch.float32)[None], folded):
        values = observable.per_frame(frames)
        assert values.isfinite().all()
        assert values.sum().item() == pytest.approx(50.0, rel=0.05), "half of the Gaussian is beyond the range"


def test_bond_amplitudes_are_squared_deviations():
    reference, positions = noisy_frames(WATER, 6), noisy_frames(WATER, 4, seed=1)
    observable = bound(BondAmplitudes(), WATER, reference)
    bonds = System.from_atoms(WATER).bonds
    lengths, mean = (
        np.linalg.norm(frames[:, bonds[:, 0]] - frames[:, bonds[:, 1]], axis=-1)
        for frames in (positions.numpy(), reference.numpy())
    )
    np.testing.assert_allclose(observable.per_frame(positions).numpy(), (lengths - mean.mean(axis=0)) ** 2, rtol=1e-12)


@few
@given(st.integers(2, 400), st.floats(0.05, 5.0), arrays(float, (2, 3, 3), elements=st.floats(-0.4, 0.4)))
def test_angle_distribution_sums_for_any_bins(n_bins, smearing, displacements):
    frames = torch.tensor(WATER.positions + displacements)
    values = bound(AngleDistribution(n_bins, smearing), WATER, frames).per_frame(frames)
    assert values.shape == (2, n_bins) and (values >= 0).all()
    total = values.sum(dim=1)
    assert (total <= 100.0 + 1e-6).all()
    vectors = [frames[:, end] - frames[:, 0] for end in (1, 2)]
    angles = torch.rad2deg(torch.arccos(torch.nn.functional.cosine_similarity(*vectors, dim=-1)))
    inside = (angles > 6 * smearing) & (angles < 180 - 6 * smearing)
    assert (total[inside] > 100.0 - 1e-3).all()


@few
@given(st.floats(2.0, 12.0), st.floats(0.01, 0.5), st.floats(0.005, 0.5))
def test_distance_distribution_sums_for_any_bins(r_max, bin_width, smearing):
    observable = bound(DistanceDistribution(r_max, bin_width, smearing), WATER)
    total = observable.per_frame(torch.tensor(WATER.positions)[None]).sum().item()
    assert total <= 100.0 + 1e-6
    if len(observable.centers) * bin_width > 1.6 + 6 * smearing and smearing < 0.1:
        assert total == pytest.approx(100.0, abs=1e-3)


@pytest.mark.parametrize(
    ("observable", "atoms", "message"),
    [
        (
            BondLengths(),
            Atoms("Ar2", [[0, 0, 0], [0, 0, 9.0]]),
            r"BondLengths finds no bonds in the system: pass them, ",
        ),
        (AngleDistribution(), molecule("N2"), "AngleDistribution finds no bond angle.*: use another observable"),
        (
            DistanceDistribution(),
            water_grid(),
            r"DistanceDistribution is not defined for a periodic system.*: use RadialDistribution",
        ),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_bind_rejects_unsuitable_systems(observable, atoms, message):
    with pytest.raises(ValueError, match=message):
        bound(observable, atoms)


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
def test_init_names_arguments_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
