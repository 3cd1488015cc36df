"""Hypothesis strategies that several test files share."""

from __future__ import annotations

import math
import re
from itertools import product

import numpy as np
from ase import Atoms
from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

few = settings(max_examples=25, deadline=None, derandomize=True)
"""Enough examples for a property, and the same ones in every run."""

numbers = st.floats(allow_nan=True, allow_infinity=True) | st.integers(-(10**40), 10**40) | st.booleans() | st.none()
anything = numbers | st.text(max_size=5) | st.lists(st.integers(), max_size=2)
"""Values that a user may pass to a numeric argument, valid or not."""

fractions = st.floats(0.0, 1.0)


@st.composite
def cells(draw):
    """Draw three cell vectors that span a volume and are not too flat, right- or left-handed."""
    lengths = draw(arrays(float, 3, elements=st.floats(3.0, 9.0)))
    skew = np.tril(draw(arrays(float, (3, 3), elements=st.floats(-0.6, 0.6))), -1)
    cell = np.diag(lengths) + skew * lengths[:, None]
    return cell[list(draw(st.permutations([0, 1, 2])))]


@st.composite
def crystals(draw):
    """Draw atoms of several elements at any positions in any cell, periodic in some directions, at least 0.3 Å apart."""
    number, cell = draw(st.integers(2, 8)), draw(cells())
    fractional = draw(arrays(float, (number, 3), elements=st.floats(-1.5, 1.5, width=32), unique=True))
    pbc = draw(st.lists(st.booleans(), min_size=3, max_size=3))
    elements = draw(st.lists(st.sampled_from(["H", "C", "O", "Cu"]), min_size=number, max_size=number))
    atoms = Atoms(elements, positions=fractional @ cell, cell=cell, pbc=pbc)
    assume(nearest_image_distances(atoms).min() > 0.3)
    return atoms


def nearest_image_distances(atoms, n_images=4):
    """Return the distance of each pair of atoms to the nearest image, (n_pairs,), by enumeration of the images."""
    images = [range(-n_images, n_images + 1) if periodic else [0] for periodic in atoms.pbc]
    shifts = np.array(list(product(*images))) @ atoms.cell.array
    first, second = np.triu_indices(len(atoms), 1)
    vectors = atoms.positions[second] - atoms.positions[first]
    return np.linalg.norm(vectors[:, None] + shifts, axis=-1).min(axis=1)


def accepted(make, names):
    """Return what ``make`` returns, or None if it rejects one of the arguments by name."""
    try:
        return make()
    except ValueError as error:
        assert any(str(error).startswith(f"{name}=") for name in names), error
        return None


def check_argument_is_named(make, name, value, also=None):
    """Assert that ``make(name=value)`` either accepts a finite number or names the argument and its value.

    Args:
        make: Callable to test.
        name: Name of the argument.
        value: Any value.
        also: Argument that the message may name instead, if the two are inconsistent.
    """
    try:
        make(**{name: value})
    except ValueError as error:
        other = also and re.match(rf"({also})=", str(error))
        assert other or (str(error).startswith(f"{name}=") and repr(value) in str(error)), error
    else:
        assert isinstance(value, int | float | None) and value == value and value not in (10**30, math.inf)
