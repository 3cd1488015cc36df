"""Fixtures shared by the tests."""

from pathlib import Path

import numpy as np
import pytest
import torch
from ase.io import read

DATA = Path(__file__).parents[1] / "recipes" / "data"


@pytest.fixture(scope="session")
def aspirin_frames():
    """Training frames of aspirin, as ASE structures; not to be changed in place."""
    return read(DATA / "aspirin_train.extxyz", ":")


@pytest.fixture(scope="session")
def aspirin_positions(aspirin_frames):
    """The same, (50, 21, 3) in Å."""
    return torch.tensor(np.stack([frame.positions for frame in aspirin_frames]))


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
