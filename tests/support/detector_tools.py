"""Structures and shortcuts that the tests of several detectors share."""

import numpy as np
import torch
from ase import Atoms
from ase.build import molecule

from stable_plugin import System

CHAIN = Atoms("C4", positions=[[0, 0, 0], [1.4, 0, 0], [2.8, 0, 0], [4.2, 0, 0]])
"""Four carbon atoms in a row: three bonds, two angles, and one pair of atoms more than two bonds apart."""


def chain_frames(*changes):
    """Return one frame of the chain per argument, each a dict {(atom, axis): coordinate} of changed coordinates."""
    frames = torch.tensor(CHAIN.positions).repeat(len(changes), 1, 1)
    for frame, change in zip(frames, changes, strict=True):
        for index, coordinate in change.items():
            frame[index] = coordinate
    return frames


def water_box(n_side=2, side=6.4, slant=0.0, seed=0):
    """Return a periodic box of n_side³ water molecules on a grid, with random orientations."""
    random = np.random.default_rng(seed)
    cell = side * np.array([[1.0, 0.0, 0.0], [slant, 1.0, 0.0], [0.0, -slant, 1.0]])
    box = Atoms(cell=cell, pbc=True)
    for corner in np.ndindex(n_side, n_side, n_side):
        water = molecule("H2O")
        water.rotate(random.uniform(0, 360), random.normal(size=3))
        water.translate((np.array(corner) + 0.3) / n_side @ cell - water.positions[0])
        box += water
    return box


def bound(detector, atoms=CHAIN, reference=None):
    """Return the detector after binding it to the atoms, by default with their positions as the reference."""
    detector.bind(System.from_atoms(atoms), torch.tensor(atoms.positions)[None] if reference is None else reference)
    return detector


def at_rest(positions):
    return torch.zeros_like(positions)


def classified(detector, positions, velocities=None):
    """Return the flags of the detector as two lists."""
    unstable, discarded = detector.classify(positions, at_rest(positions) if velocities is None else velocities)
    return unstable.tolist(), discarded.tolist()
