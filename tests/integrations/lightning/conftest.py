"""Fixtures of the tests of Lightning trainings."""

import pytest
from ase.io import read
from small_training import TRAIN


@pytest.fixture(scope="module")
def frames():
    return read(TRAIN, ":10")
