"""Structures and shortcuts that the tests of several observables share."""

import numpy as np
import torch
from ase import Atoms
from ase.build import molecule

from stable_plugin import System

TRIANGLE = Atoms("C3", positions=[[0, 0, 0], [0.8, 0, 0], [0, 0.6, 0]])
"""Sides of 0.8, 0.6 and 1.0 Å."""


def bound(observable, atoms, positions=None):
    """Return the observable after binding it to the atoms, by default with their positions as the reference."""
    observable.bind(System.from_atoms(atoms), torch.tensor(atoms.positions)[None] if positions is None else positions)
    return observable


def water_grid(side=9.0):
    """Return eight water molecules of one orientation in a cubic box."""
    box = Atoms(cell=[side] * 3, pbc=True)
    for corner in np.ndindex(2, 2, 2):
        water = molecule("H2O")
        water.translate(np.array(corner) * side / 2 + 1.0)
        box += water
    return box


def noisy_frames(atoms, n_frames, seed=0, scale=0.05):
    """Return frames with Gaussian noise, (n_frames, n_atoms, 3)."""
    noise = np.random.default_rng(seed).normal(scale=scale, size=(n_frames, len(atoms), 3))
    return torch.tensor(atoms.positions + noise)
