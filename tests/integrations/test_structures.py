"""Structures in the training data of different trainers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ase.build import molecule
from observable_tools import water_grid
from torch import nn

from stable_plugin.integrations.structures import training_structures

WATER, LIQUID = molecule("H2O"), water_grid()


def test_training_structures_of_each_kind_of_data():
    def loader(items):
        return SimpleNamespace(dataset=items)

    plain, custom = nn.Linear(1, 1), nn.Linear(1, 1)
    custom.stable_structures = lambda of: (atoms for atoms in [of])
    assert training_structures(custom, WATER) == [WATER]
    assert training_structures(plain, loader([WATER, LIQUID])) == [WATER, LIQUID]
    graphs = [SimpleNamespace(to_ase_single=lambda: WATER)]
    assert training_structures(plain, loader(graphs)) == [WATER]
    for unsuitable in (loader([]), loader([1, 2]), loader([WATER, 2]), SimpleNamespace()):
        with pytest.raises(
            TypeError, match=r"no structures found in the training data \(SimpleNamespace of .*structures="
        ):
            training_structures(plain, unsuitable)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        raise AssertionError("must not be read")


@pytest.mark.parametrize("dataset", [Stream(), iter([WATER])], ids=["dataset", "iterator"])
def test_training_structures_of_a_stream_are_not_read(dataset):
    kind = type(dataset).__name__
    with pytest.raises(TypeError, match=rf"SimpleNamespace of {kind}\) can only be iterated over.*pass structures="):
        training_structures(nn.Linear(1, 1), SimpleNamespace(dataset=dataset))


def test_training_structures_of_mace_graphs():
    model = nn.Module()
    model.atomic_energies_fn, model.atomic_numbers = nn.Identity(), torch.tensor([1, 8])
    species = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    positions, cell = torch.tensor(WATER.positions), 7.0 * torch.eye(3, dtype=torch.float64)
    for pbc in (None, torch.tensor([[False] * 3]), torch.tensor([[True, True, False]])):
        graph = SimpleNamespace(node_attrs=species, positions=positions, cell=cell, pbc=pbc)
        (atoms,) = training_structures(nn.Sequential(model), SimpleNamespace(dataset=[graph]))
        assert atoms.symbols.get_chemical_formula(mode="reduce") == "OH2"
        np.testing.assert_array_equal(atoms.positions, WATER.positions)
        periodic = pbc is not None and bool(pbc.any())
        assert atoms.pbc.tolist() == ([True, True, False] if periodic else [False] * 3)
        np.testing.assert_array_equal(atoms.cell.array, cell.numpy() if periodic else np.zeros((3, 3)))


def test_training_structures_are_the_frames_of_the_data_module():
    frames = [WATER, LIQUID]
    module = SimpleNamespace(trainer=SimpleNamespace(datamodule=SimpleNamespace(train_frames=frames)))
    assert training_structures(module, SimpleNamespace(dataset=[object()])) == frames
