"""Fixtures of the tests of the method."""

import pytest
import torch
from springs import STIFF, simulated
from toys import TRIATOMIC, triatomic


@pytest.fixture(scope="session")
def reference():
    """Thermal frames of the stiff springs, (200, 3, 3)."""
    start = torch.tensor(TRIATOMIC.positions).repeat(20, 1, 1)
    return simulated(triatomic(STIFF), start, 1200).positions[2:].flatten(0, 1)
