"""Radial distribution functions: agreement with ASE, the ideal gas, and curves from files."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.geometry.rdf import get_rdf
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from strategies import few, nearest_image_distances

from stable_plugin import RadialDistribution, System
from stable_plugin.config import mean_squared_error
from stable_plugin.observables import radial

NARROW = 1e-9
"""Smearing so small that each distance stays in its bin."""


def gas(n_frames=3, side=9.0, slant=0.25, n_atoms=60, seed=0):
    """Return an ideal gas in a slanted cell, and its frames, not wrapped."""
    random = np.random.default_rng(seed)
    cell = side * np.array([[1.0, 0.0, 0.0], [slant, 1.0, 0.0], [-slant, slant, 1.0]])
    frames = random.uniform(-0.5, 1.5, size=(n_frames, n_atoms, 3)) @ cell
    return Atoms("CO" * (n_atoms // 2), positions=frames[0], cell=cell, pbc=True), torch.tensor(frames)


def bound(observable, atoms, frames):
    observable.bind(System.from_atoms(atoms, bonds=[]), frames)
    return observable


@pytest.mark.parametrize("pair", [None, ("C", "C"), ("C", "O"), ("O", "C")])
def test_radial_distribution_agrees_with_ase(pair, monkeypatch):
    """Compared in bins with no distance close to an edge, where rounding decides the bin."""
    monkeypatch.setattr(radial, "MAX_DISTANCES", 200)
    atoms, frames = gas()
    observable = bound(RadialDistribution(pair, r_max=4.0, bin_width=0.1, smearing=NARROW), atoms, frames)
    for frame, found in zip(frames, observable.per_frame(frames), strict=True):
        periodic = Atoms(atoms.numbers, frame.numpy(), cell=atoms.cell, pbc=True)
        distances = periodic.get_all_distances(mic=True)[np.triu_indices(60, 1)]
        expected, _ = get_rdf(periodic, 4.0, 40, elements=None if pair is None else [{"C": 6, "O": 8}[s] for s in pair])
        clear = np.array([(np.abs(distances - edge) > 8 * NARROW).all() for edge in np.arange(41) * 0.1])
        clear = clear[:-1] & clear[1:]
        assert clear.sum() > 20
        # ASE normalizes by all atoms, including the central one.
        normalization = 60 / 59 if pair is None else (30 / 29 if pair[0] == pair[1] else 1.0)
        np.testing.assert_allclose(found.numpy()[clear], (expected * normalization)[clear], rtol=1e-6)


def test_radial_distribution_of_an_ideal_gas_is_one():
    atoms, frames = gas(n_frames=60, n_atoms=100)
    g = bound(RadialDistribution(bin_width=0.25), atoms, frames).per_frame(frames).mean(dim=0)[4:]
    assert (g - 1.0).abs().max() < 0.1
    assert g.mean().item() == pytest.approx(1.0, abs=0.01)


def test_r_min_leaves_out_the_bins_below():
    atoms, frames = gas()
    whole = bound(RadialDistribution(r_max=4.0, bin_width=0.25), atoms, frames)
    upper = bound(RadialDistribution(r_min=1.5, r_max=4.0, bin_width=0.25), atoms, frames)
    torch.testing.assert_close(upper.centers, whole.centers[6:])
    torch.testing.assert_close(upper.target, whole.target[6:])
    with pytest.raises(ValueError, match=r"r_max=1\.6.*1\.75"):
        RadialDistribution(r_min=1.5, r_max=1.6, bin_width=0.125)
    with pytest.raises(ValueError, match=r"bin_width=0\.05 is more than half of the range, from 9 to 4\.\d\d Å"):
        bound(RadialDistribution(r_min=9.0), atoms, frames)


def test_per_site_averages_to_per_frame():
    atoms, frames = gas()
    observable = bound(RadialDistribution(("C", "O"), r_max=4.0), atoms, frames)
    site_index = torch.arange(60) // 3
    by_site = observable.per_site(frames, site_index)
    assert by_site.shape == (3, 20, 80)
    torch.testing.assert_close(by_site.mean(dim=1), observable.per_frame(frames))


def test_per_site_counts_pairs_of_the_site_only():
    atoms = Atoms("Ar4", positions=[[0, 0, 0], [0, 0, 2.0], [5, 5, 0], [5, 5, 3.0]], cell=[12.0] * 3, pbc=True)
    frames = torch.tensor(atoms.positions)[None]
    observable = bound(RadialDistribution(r_max=4.0, bin_width=0.5, smearing=0.01), atoms, frames)
    near, far = observable.per_site(frames, torch.tensor([0, 0, 1, 1]))[0]
    assert near[3:5].sum() > 0 and near[5:7].sum() == 0
    assert far[5:7].sum() > 0 and far[3:5].sum() == 0


def test_intramolecular_pairs_can_be_excluded():
    atoms = molecule("H2O")
    other = molecule("H2O")
    other.positions += [0.0, 0.0, 3.0]
    atoms += other
    atoms.set_cell([12.0] * 3)
    atoms.pbc = True
    frames = torch.tensor(atoms.positions)[None]
    system = System.from_atoms(atoms)
    within, between = (RadialDistribution(("O", "H"), intramolecular=flag) for flag in (True, False))
    for observable in (within, between):
        observable.bind(system, frames)
    near = within.centers < 1.5
    assert within.target[near].sum() > 10
    assert between.target[near].sum() == 0
    assert between.name == "intermolecular_radial_distribution_O_H"


def curve_file(path, text):
    path.write_text(text)
    return path


def test_target_file_is_interpolated(tmp_path):
    atoms, frames = gas()
    path = curve_file(tmp_path / "g.txt", "# r g\n0.5 0.0\n1.5 1.0\n2.5 3.0\n5.0 1.0\n")
    g = bound(RadialDistribution(r_max=4.0, bin_width=0.5, target_file=path), atoms, frames)
    assert g.centers.tolist() == pytest.approx([0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.25, 3.75])
    assert g.target.tolist() == pytest.approx([0.0, 0.25, 0.75, 1.5, 2.5, 2.8, 2.4, 2.0])


def test_target_columns_are_chosen(tmp_path):
    atoms, frames = gas()
    path = curve_file(tmp_path / "g.txt", "0 9 0\n5 9 5\n")
    g = bound(RadialDistribution(r_max=4.0, bin_width=1.0, target_file=path, target_columns=[0, 2]), atoms, frames)
    assert g.target.tolist() == pytest.approx([0.5, 1.5, 2.5, 3.5])
    with pytest.raises(ValueError, match=r"has 3 column\(s\), of which target_columns=\[0, 3\] does not choose two"):
        RadialDistribution(target_file=path, target_columns=[0, 3])
    with pytest.raises(ValueError, match=r"target_columns=\[0\] does not choose two or three"):
        RadialDistribution(target_file=path, target_columns=[0])


def test_errors_of_a_measured_curve_weigh_the_loss(tmp_path):
    atoms, frames = gas()
    path = curve_file(tmp_path / "g.txt", "0 1 9 0.0\n2 1 9 0.0\n5 1 9 0.3\n")
    arguments = {"r_max": 4.0, "bin_width": 1.0, "target_file": path, "target_columns": [0, 1, 3]}
    g = bound(RadialDistribution(**arguments), atoms, frames)
    expected = [0.02, 0.02, (0.02**2 + 0.05**2) ** 0.5, (0.02**2 + 0.15**2) ** 0.5]
    assert g.scale.tolist() == pytest.approx(expected)
    # Off by one standard deviation in every bin.
    assert mean_squared_error(g.scaled(g.target + g.scale), g.scaled(g.target)).item() == pytest.approx(1.0)
    g.bind(g.system, frames)
    assert g.scale.tolist() == pytest.approx(expected), "bound once more"
    coarse = bound(RadialDistribution(**arguments, scale=0.1), atoms, frames)
    assert coarse.scale.tolist() == pytest.approx([0.1, 0.1, 0.0125**0.5, 0.0325**0.5])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 0\n3 1\n2 1\n", r"is not in ascending order of r: sort its rows"),
        ("-1 0\n3 1\n", r"contains a negative r, g\(r\) or error: remove"),
        ("1 0\n3 -1\n", r"contains a negative r, g\(r\) or error: remove"),
        ("1 0\n3 nan\n", r"contains numbers that are not finite: remove"),
        ("1 0\n", r"has 1 rows of numbers: use at least two rows"),
        ("1 0 2\n2 0 3\n", r"has 3 column\(s\), of which target_columns=None does not choose two"),
        ("r g\n1 0\n", r"is not a table of numbers .*: use columns r and g\(r\)"),
    ],
)
def test_target_file_rejects_other_contents(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        RadialDistribution(target_file=curve_file(tmp_path / "g.txt", text))


def test_radial_distribution_rejects_bad_input(tmp_path):
    atoms, frames = gas()
    with pytest.raises(ValueError, match=r"r_max=6 is more than the cell allows, 4\.\d\d Å.*pass a smaller r_max"):
        bound(RadialDistribution(r_max=6.0), atoms, frames)
    short = curve_file(tmp_path / "g.txt", "0.5 0.0\n2.0 1.0\n")
    with pytest.raises(
        ValueError,
        match=r"covers r from 0\.5 to 2 Å, but the bins of the observable range from .* to 3\.975 Å: set r_max",
    ):
        bound(RadialDistribution(r_max=4.0, target_file=short), atoms, frames)
    with pytest.raises(ValueError, match=r"pair=.* contains Xe, but the system consists of C, O: pass two of these"):
        bound(RadialDistribution(("C", "Xe")), atoms, frames)
    slab = atoms.copy()
    slab.pbc = [True, True, False]
    with pytest.raises(
        ValueError, match=r"pbc=\[True, True, False\], but.*periodic in all directions.*use DistanceDistribution"
    ):
        bound(RadialDistribution(), slab, frames)
    with pytest.raises(ValueError, match=r"pair='OH' is not a pair of elements: pass for instance"):
        RadialDistribution("OH")
    with pytest.raises(FileNotFoundError, match=r"target_file='.*' is not a file: pass a text file"):
        RadialDistribution(target_file=tmp_path / "none.txt")
    with pytest.raises(ValueError, match=r"target=\[1\.0\] and target_file='.*' exclude each other: remove one"):
        RadialDistribution(target=[1.0], target_file=short)


@few
@given(st.integers(0, 2**31), arrays(int, (8, 3), elements=st.integers(-2, 2)), st.permutations([0, 1, 2]))
def test_radial_distribution_ignores_images_and_axes(seed, images, order):
    random = np.random.default_rng(seed)
    cell = np.diag([7.0, 8.0, 9.0]) + random.uniform(-0.5, 0.5, (3, 3))
    atoms = Atoms("Cu8", positions=random.uniform(size=(8, 3)) @ cell, cell=cell, pbc=True)
    assume(nearest_image_distances(atoms).min() > 0.1)
    moved = Atoms("Cu8", positions=atoms.positions + images @ cell, cell=cell[list(order)], pbc=True)
    curves = [
        bound(RadialDistribution(r_max=3.0), each, torch.tensor(each.positions)[None]).target for each in (atoms, moved)
    ]
    torch.testing.assert_close(*curves, atol=1e-9, rtol=1e-9)
