"""Radial distributions against ASE, an ideal gas, and measured curves from files."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.geometry.rdf import get_rdf

from stable_plugin import RadialDistribution, System
from stable_plugin.observables import radial

NARROW = 1e-9
"""A smearing that leaves nearly every distance in its bin."""


def gas(n_frames=3, side=9.0, slant=0.25, n_atoms=60, seed=0):
    random = np.random.default_rng(seed)
    cell = side * np.array([[1.0, 0.0, 0.0], [slant, 1.0, 0.0], [-slant, slant, 1.0]])
    frames = random.uniform(-0.5, 1.5, size=(n_frames, n_atoms, 3)) @ cell
    return Atoms("CO" * (n_atoms // 2), positions=frames[0], cell=cell, pbc=True), torch.tensor(frames)


def bound(observable, atoms, frames):
    observable.bind(System.from_atoms(atoms, bonds=[]), frames)
    return observable


@pytest.mark.parametrize("pair", [None, ("C", "C"), ("C", "O"), ("O", "C")])
def test_it_is_ases_on_the_same_frames(pair, monkeypatch):
    """With bins as wide as ASE's and distances that lie clear of their edges."""
    monkeypatch.setattr(radial, "MAX_DISTANCES", 200)
    atoms, frames = gas()
    observable = bound(RadialDistribution(pair, r_max=4.0, bin_width=0.1, smearing=NARROW), atoms, frames)
    for frame, mine in zip(frames, observable.per_frame(frames), strict=True):
        there = Atoms(atoms.numbers, frame.numpy(), cell=atoms.cell, pbc=True)
        distances = there.get_all_distances(mic=True)[np.triu_indices(60, 1)]
        theirs, _ = get_rdf(there, 4.0, 40, elements=None if pair is None else [{"C": 6, "O": 8}[s] for s in pair])
        clear = np.array([(np.abs(distances - edge) > 8 * NARROW).all() for edge in np.arange(41) * 0.1])
        clear = clear[:-1] & clear[1:]
        assert clear.sum() > 20
        # ASE divides by all atoms, the central one included.
        per_pair = 60 / 59 if pair is None else (30 / 29 if pair[0] == pair[1] else 1.0)
        np.testing.assert_allclose(mine.numpy()[clear], (theirs * per_pair)[clear], rtol=1e-6)


def test_an_ideal_gas_is_flat_at_one():
    atoms, frames = gas(n_frames=60, n_atoms=100)
    g = bound(RadialDistribution(bin_width=0.25), atoms, frames).per_frame(frames).mean(dim=0)[4:]
    assert (g - 1.0).abs().max() < 0.1
    assert g.mean().item() == pytest.approx(1.0, abs=0.01)


def test_the_mean_over_sites_is_that_of_the_frame():
    atoms, frames = gas()
    observable = bound(RadialDistribution(("C", "O"), r_max=4.0), atoms, frames)
    owner = torch.arange(60) // 3
    by_site = observable.per_site(frames, owner)
    assert by_site.shape == (3, 20, 80)
    torch.testing.assert_close(by_site.mean(dim=1), observable.per_frame(frames))


def test_a_site_sees_the_pairs_that_touch_it_alone():
    atoms = Atoms("Ar4", positions=[[0, 0, 0], [0, 0, 2.0], [5, 5, 0], [5, 5, 3.0]], cell=[12.0] * 3, pbc=True)
    frames = torch.tensor(atoms.positions)[None]
    observable = bound(RadialDistribution(r_max=4.0, bin_width=0.5, smearing=0.01), atoms, frames)
    near, far = observable.per_site(frames, torch.tensor([0, 0, 1, 1]))[0]
    assert near[3:5].sum() > 0 and near[5:7].sum() == 0
    assert far[5:7].sum() > 0 and far[3:5].sum() == 0


def test_pairs_within_a_molecule_can_be_left_out():
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


def curve(path, text):
    path.write_text(text)
    return path


def test_a_measured_curve_is_interpolated_onto_the_bins(tmp_path):
    atoms, frames = gas()
    path = curve(tmp_path / "g.txt", "# r g\n0.5 0.0\n1.5 1.0\n2.5 3.0\n5.0 1.0\n")
    g = bound(RadialDistribution(r_max=4.0, bin_width=0.5, target_file=path), atoms, frames)
    assert g.centers.tolist() == pytest.approx([0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.25, 3.75])
    assert g.target.tolist() == pytest.approx([0.0, 0.25, 0.75, 1.5, 2.5, 2.8, 2.4, 2.0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 0\n3 1\n2 1\n", r"is not sorted by r"),
        ("-1 0\n3 1\n", r"holds a negative r"),
        ("1 0\n3 -1\n", r"holds a negative r or g"),
        ("1 0\n3 nan\n", r"not finite"),
        ("1 0\n", r"has 1 rows of 2 numbers"),
        ("1 0 2\n2 0 3\n", r"has 2 rows of 3 numbers"),
        ("r g\n1 0\n", r"is not a table of numbers"),
    ],
)
def test_a_file_that_is_no_such_curve_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        RadialDistribution(target_file=curve(tmp_path / "g.txt", text))


def test_what_does_not_fit_is_refused(tmp_path):
    atoms, frames = gas()
    with pytest.raises(ValueError, match=r"r_max=6 is more than the cell allows, 4\.\d\d Å"):
        bound(RadialDistribution(r_max=6.0), atoms, frames)
    short = curve(tmp_path / "g.txt", "0.5 0.0\n2.0 1.0\n")
    with pytest.raises(
        ValueError, match=r"covers r from 0\.5 to 2 Å, but the observable's bins go from .* to 3\.975 Å"
    ):
        bound(RadialDistribution(r_max=4.0, target_file=short), atoms, frames)
    with pytest.raises(ValueError, match=r"names Xe, but the system consists of C, O"):
        bound(RadialDistribution(("C", "Xe")), atoms, frames)
    slab = atoms.copy()
    slab.pbc = [True, True, False]
    with pytest.raises(ValueError, match=r"periodic in all directions.*DistanceDistribution"):
        bound(RadialDistribution(), slab, frames)
    with pytest.raises(ValueError, match=r"pair='OH' is not two elements"):
        RadialDistribution("OH")
    with pytest.raises(FileNotFoundError, match=r"target_file='.*' is not a file"):
        RadialDistribution(target_file=tmp_path / "none.txt")
    with pytest.raises(ValueError, match=r"target and target_file are both given"):
        RadialDistribution(target=[1.0], target_file=short)
    with pytest.raises(RuntimeError, match=r"has no system yet"):
        RadialDistribution().per_frame(frames)
