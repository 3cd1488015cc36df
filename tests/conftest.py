"""Fixtures shared by the tests."""

import logging
import warnings
from importlib.util import find_spec
from math import inf
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.io import read

from stable_plugin.runtime import threads

MISSING = [family for family in ("mace", "fairchem") if find_spec(family) is None]
"""Families of models that are not installed."""


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Skip test files that cannot be imported because they are about a family that is not installed."""
    report = yield
    if report.failed and any(
        f"No module named '{family}" in report.longreprtext or f"stable-plugin[{family}]" in report.longreprtext
        for family in MISSING
    ):
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, f"Skipped: needs one of {MISSING}")
    return report


DATA = Path(__file__).parents[1] / "recipes" / "data"


@pytest.fixture(scope="session")
def aspirin_frames():
    """Training frames of aspirin, as ASE structures; not to be changed in place."""
    return read(DATA / "aspirin_train.extxyz", ":")


@pytest.fixture(scope="session")
def aspirin_positions(aspirin_frames):
    """Return the same, (50, 21, 3) in Å."""
    return torch.tensor(np.stack([frame.positions for frame in aspirin_frames]))


@pytest.fixture(autouse=True)
def deterministic(request):
    """On several threads PyTorch adds up gradients in the order in which the threads come, unless told not to."""
    if request.node.get_closest_marker("cuda"):  # there it costs host synchronizations
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def constant_threads(monkeypatch):
    """Measure numbers of threads once per process: runs that are compared bit by bit must use the same number."""
    monkeypatch.setattr(threads, "MIN_PAUSE_S", inf)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def restored_logging():
    """Undo what a program changes in the process, so that no test depends on the ones before it."""
    root = logging.getLogger()
    handlers, level, show = root.handlers[:], root.level, warnings.showwarning
    yield
    root.handlers[:], warnings.showwarning = handlers, show
    root.setLevel(level)
