"""Trajectories of ASE as tensors."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule

from stable_plugin.observables import trajectory_from_atoms


def test_trajectory_from_atoms_unwraps():
    random = np.random.default_rng(0)
    cell = 6.0 * np.array([[1.0, 0.0, 0.0], [0.4, 1.0, 0.0], [-0.2, 0.3, 1.0]])
    path = np.cumsum(random.normal(scale=0.4, size=(80, 4, 3)), axis=0)
    frames = []
    for positions in path:
        atoms = Atoms("Ar4", positions=positions, cell=cell, pbc=True)
        atoms.set_velocities(positions)
        atoms.wrap()
        frames.append(atoms)
    positions, velocities = trajectory_from_atoms(frames)
    assert positions.shape == (80, 1, 4, 3)
    moved = (positions[:, 0] - positions[0, 0]).numpy()
    np.testing.assert_allclose(moved, path - path[0], atol=1e-9)
    np.testing.assert_allclose(velocities[:, 0].numpy(), path, atol=1e-9)


def test_trajectory_from_atoms_without_momenta():
    assert trajectory_from_atoms([Atoms("Ar", [[0, 0, 0]])])[1] is None


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], r"frames=\[\] is empty: pass at least one structure"),
        ([molecule("H2O"), molecule("CO2")], r"frames\[1\] is CO2, not H2O: pass frames of one simulation"),
    ],
)
def test_trajectory_from_atoms_rejects_bad_frames(frames, message):
    with pytest.raises(ValueError, match=message):
        trajectory_from_atoms(frames)
