"""Fixtures shared by the tests."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.io import read

# Where only one family is installed, what is about the other is left out.
NEEDS = {
    "mace": [
        "test_callback.py", "test_mace_module.py", "test_mace_periodic.py", "test_mace_potential.py", "test_readme.py",
        "test_runner.py", "test_trainer_features.py", "test_killed.py", "test_processes.py",
        "test_interruption.py", "test_memory.py",
        "test_batch.py", "test_ddp.py", "test_recipe_fuzz.py", "test_recipes.py", "test_loading.py", "test_broken_files.py",
    ],
    "fairchem": [
        "test_fairchem_module.py", "test_fairchem_native.py", "test_fairchem_potential.py", "test_readme.py",
        "test_runner.py", "test_killed_fairchem.py", "test_storage_fairchem.py",
        "test_recipe_fuzz.py", "test_recipes.py", "test_loading.py", "test_broken_files.py",
    ],
}  # fmt: skip
collect_ignore = [name for family, names in NEEDS.items() if find_spec(family) is None for name in names]

DATA = Path(__file__).parents[1] / "recipes" / "data"


@pytest.fixture(scope="session")
def aspirin_frames():
    """Training frames of aspirin, as ASE structures; not to be changed in place."""
    return read(DATA / "aspirin_train.extxyz", ":")


@pytest.fixture(scope="session")
def aspirin_positions(aspirin_frames):
    """The same, (50, 21, 3) in Å."""
    return torch.tensor(np.stack([frame.positions for frame in aspirin_frames]))


@pytest.fixture(autouse=True)
def deterministic(request):
    """On several threads PyTorch adds up gradients in the order in which the threads come, unless told not to."""
    if request.node.get_closest_marker("cuda"):  # there it costs host synchronisations
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
