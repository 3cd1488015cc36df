"""Neighborhoods of the local estimator."""

import numpy as np
import pytest
import torch
from ase.build import molecule
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from observable_tools import water_grid
from strategies import few

from stable_plugin import System
from stable_plugin.md.neighborhoods import AtomsWithin, Members, Molecules, NearestMolecules, even_sample


def test_system_before_bind_raises():
    with pytest.raises(RuntimeError, match=r"Molecules has no system yet: call bind\(system\) first"):
        _ = Molecules().system


@pytest.mark.parametrize(
    ("neighborhoods", "expected"),
    [
        (Molecules(), "Molecules()"),
        (NearestMolecules(), "NearestMolecules(n=5)"),
        (AtomsWithin(6.0), "AtomsWithin(radius_A=6.0)"),
    ],
    ids=str,
)
def test_repr_shows_the_arguments(neighborhoods, expected):
    assert repr(neighborhoods) == str(neighborhoods) == expected


@pytest.mark.parametrize("neighborhoods", [Molecules(), NearestMolecules(3), AtomsWithin(3.0)], ids=str)
def test_members_scatter_is_the_transpose_of_energies(neighborhoods):
    water = water_grid()
    neighborhoods.bind(System.from_atoms(water))
    members = neighborhoods.members(torch.tensor(water.positions).repeat(2, 1, 1))
    generator = torch.Generator().manual_seed(0)
    atomic = torch.randn(2, 24, generator=generator, dtype=torch.float64)
    weights = torch.randn(len(members), generator=generator, dtype=torch.float64)
    assert (weights @ members.energies(atomic)).item() == pytest.approx(
        (members.scatter(weights) * atomic).sum().item()
    )
    chosen = torch.tensor([len(members) - 1, 0])
    assert torch.equal(members.select(chosen).energies(atomic), members.energies(atomic)[chosen])


def test_members_energies_of_overlapping_samples():
    members = Members(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 2]), 2, (1, 3))
    assert members.energies(torch.tensor([[1.0, 2.0, 4.0]])).tolist() == [3.0, 6.0]
    assert members.scatter(torch.tensor([1.0, 10.0])).tolist() == [[1.0, 11.0, 10.0]]


def test_nearest_molecules_has_n_molecules_per_site():
    water = water_grid()
    neighborhoods = NearestMolecules(3)
    neighborhoods.bind(System.from_atoms(water))
    members = neighborhoods.members(torch.tensor(water.positions)[None])
    assert members.sample.bincount().tolist() == [9] * 8


def test_nearest_molecules_rejects_too_many():
    neighborhoods = NearestMolecules(9)
    with pytest.raises(ValueError, match=r"n=9 is more than the 8 molecules of the system: pass at most that number"):
        neighborhoods.bind(System.from_atoms(water_grid()))
    with pytest.raises(ValueError, match=r"NearestMolecules\(n=9\) finds a single molecule.*: remove local"):
        neighborhoods.bind(System.from_atoms(molecule("CH4")))


@few
@given(
    arrays(float, st.integers(1, 60), elements=st.floats(0.0, 1e3)),
    st.integers(1, 20),
    st.integers(1, 5),
    st.integers(0, 99),
)
def test_even_sample_draws_evenly_from_the_bins(deviation, n_bins, per_bin, seed):
    chosen = even_sample(torch.tensor(deviation), n_bins, per_bin, torch.Generator().manual_seed(seed))
    assert len(set(chosen.tolist())) == len(chosen) and (chosen.diff() > 0).all()
    width = max(deviation.max(), torch.finfo(torch.float64).tiny) / n_bins
    bins = np.minimum((deviation / width).astype(int), n_bins - 1)
    for number in set(bins):
        assert (bins[chosen] == number).sum() == min(per_bin, (bins == number).sum())
