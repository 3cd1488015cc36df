"""Forces of the start frames, symmetries, and the smoothness of the energy at the cutoff."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isinf

import numpy as np
import torch
from torch import Tensor

from stable_plugin.evaluation.batches import energies_and_forces
from stable_plugin.evaluation.preflight.diatomics import dimer, dimers
from stable_plugin.md.neighbors import edges_within
from stable_plugin.md.system import System
from stable_plugin.models import Potential

STEP_A = 0.005
N_STEPS = 5
"""Number of points on either side of the cutoff, and their distance."""

NEAR_CUTOFF_A = 0.3
"""Atoms of a frame whose distance differs from the cutoff by no more are moved through it."""

N_PAIRS = 6


@dataclass(frozen=True)
class ForceFindings:
    """Forces of the start frames.

    Attributes:
        rms_eV_per_A: Root mean square component.
        max_eV_per_A: Largest component.
        nonfinite_frames: Numbers of the frames whose energy or forces are not finite.
    """

    rms_eV_per_A: float
    max_eV_per_A: float
    nonfinite_frames: list[int]


@dataclass(frozen=True)
class SymmetryFindings:
    """Largest changes of energies in eV and forces in eV/Å that have to be zero.

    Attributes:
        rotation: Under a rotation, (energy, force).
        translation: Under a translation.
        permutation: Under a permutation of the atoms of each element.
    """

    rotation: tuple[float, float]
    translation: tuple[float, float]
    permutation: tuple[float, float]


@dataclass(frozen=True)
class CutoffFindings:
    """Largest jumps of energy and force as two atoms move through the cutoff.

    Attributes:
        cutoff_A: The cutoff in Å.
        n_pairs: Number of pairs that were moved.
        energy_jump_eV: Largest jump of the energy.
        force_jump_eV_per_A: Largest jump of the force along their distance.
    """

    cutoff_A: float
    n_pairs: int
    energy_jump_eV: float
    force_jump_eV_per_A: float


def check_forces(potential: Potential, frames: Tensor, cell: Tensor | None = None) -> ForceFindings:
    """Return what the forces of frames are like.

    Args:
        potential: The potential.
        frames: (n_frames, n_atoms, 3) in Å.
        cell: Cells of the frames, (n_frames, 3, 3) in Å; that of the system if None.
    """
    energies, forces = energies_and_forces(potential, frames, cell)
    finite = torch.isfinite(energies) & torch.isfinite(forces).flatten(1).all(dim=1)
    kept = forces[finite] if finite.any() else torch.zeros(1)
    bad = (~finite).nonzero().squeeze(1).tolist()
    return ForceFindings(float(kept.square().mean().sqrt()), float(kept.abs().max()), bad)


def check_symmetry(
    make_potential: Callable[[System], Potential],
    system: System,
    frames: Tensor,
    seed: int,
    cell: Tensor | None = None,
) -> SymmetryFindings:
    """Return how much energies and forces change where they must not.

    Args:
        make_potential: Returns the potential of a system.
        system: The system.
        frames: (n_frames, n_atoms, 3) in Å.
        seed: Seed of the random rotation and translation.
        cell: Cells of the frames, (n_frames, 3, 3) in Å; that of the system if None.
    """
    generator = torch.Generator().manual_seed(seed)
    potential = make_potential(system)
    expected = energies_and_forces(potential, frames, cell)
    rotation = _random_rotation(generator)
    turned = make_potential(replace(system, cell=system.cell.double() @ rotation))
    rotated = energies_and_forces(turned, frames @ rotation, None if cell is None else cell.double() @ rotation)
    moved = energies_and_forces(potential, frames + torch.rand(3, generator=generator, dtype=torch.float64), cell)
    order = _permutation(system)
    permuted = energies_and_forces(potential, frames[:, order], cell)
    return SymmetryFindings(
        rotation=_difference(expected, (rotated[0], rotated[1] @ rotation.T)),
        translation=_difference(expected, moved),
        permutation=_difference((expected[0], expected[1][:, order]), permuted),
    )


def check_cutoff(
    make_potential: Callable[[System], Potential], system: System, frames: Tensor, cell: Tensor | None = None
) -> tuple[CutoffFindings | None, str]:
    """Return the jumps of energy and force at the cutoff, or why there are none.

    Pairs of atoms of the frames are moved through it, and isolated ones where no pair of a frame is near it.

    Args:
        make_potential: Returns the potential of a system.
        system: The system.
        frames: (n_frames, n_atoms, 3) in Å.
        cell: Cells of the frames, (n_frames, 3, 3) in Å; that of the system if None.
    """
    potential = make_potential(system)
    cutoff = potential.cutoff
    if isinf(cutoff):
        return None, "smoothness at the cutoff is not checked: the potential states no cutoff"
    jumps: list[tuple[float, float]] = []
    for index, frame in enumerate(frames):
        own = None if cell is None else cell[index]
        for pair, vector in _pairs_at(cutoff, system, frame, own)[: N_PAIRS - len(jumps)]:
            jumps.append(_jump(potential, frame, pair, vector, cutoff, own))
    if not jumps:
        frame = dimers(np.array([cutoff]))[0]
        isolated = make_potential(dimer((system.symbols[0], system.symbols[-1]), system))
        jumps.append(_jump(isolated, frame, (0, 1), frame[1] - frame[0], cutoff, None))
    energy, force = (max(each) for each in zip(*jumps, strict=True))
    return CutoffFindings(cutoff, len(jumps), energy, force), ""


def _pairs_at(
    cutoff: float, system: System, frame: Tensor, cell: Tensor | None
) -> list[tuple[tuple[int, int], Tensor]]:
    """Return the pairs whose distance is close to the cutoff, the closest to it first, and the vectors between them."""
    own = None if cell is None else cell[None]
    edges = edges_within(frame[None], cutoff + NEAR_CUTOFF_A, system, own)
    first, second = edges.index
    vectors = frame[second] - frame[first] + edges.shifts
    off = (vectors.norm(dim=1) - cutoff).abs()
    chosen = ((off < NEAR_CUTOFF_A) & (first < second)).nonzero().squeeze(1)
    chosen = chosen[off[chosen].argsort()][:N_PAIRS]
    return [((int(first[index]), int(second[index])), vectors[index]) for index in chosen.tolist()]


def _jump(
    potential: Potential, frame: Tensor, pair: tuple[int, int], vector: Tensor, cutoff: float, cell: Tensor | None
) -> tuple[float, float]:
    """Return the jumps of energy and force as the second atom of a pair moves through the cutoff along a vector."""
    direction = vector / vector.norm()
    steps = STEP_A * torch.arange(0.5, N_STEPS, dtype=torch.float64)
    offsets = torch.cat([-steps.flip(0), steps])
    positions = frame.repeat(len(offsets), 1, 1)
    positions[:, pair[1]] += (cutoff - vector.norm() + offsets)[:, None] * direction
    cells = None if cell is None else cell.expand(len(offsets), 3, 3)
    energies, forces = energies_and_forces(potential, positions, cells)
    along = forces[:, pair[1]] @ direction
    return _step_at_zero(offsets, energies), _step_at_zero(offsets, along)


def _step_at_zero(offsets: Tensor, values: Tensor) -> float:
    """Return the difference at zero between parabolas through the points on either side."""
    x, y = offsets.numpy(), (values - values.mean()).numpy()
    left, right = (np.polyfit(x[side], y[side], 2)[-1] for side in (x < 0, x > 0))
    return float(abs(right - left))


def _difference(expected: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor]) -> tuple[float, float]:
    energy, force = (float((one - other).abs().max()) for one, other in zip(expected, found, strict=True))
    return energy, force


def _random_rotation(generator: torch.Generator) -> Tensor:
    orthogonal = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))[0]
    rotation: Tensor = orthogonal * torch.linalg.det(orthogonal)
    return rotation


def _permutation(system: System) -> Tensor:
    """Return an order in which no atom stays where it is, if there is another one of its element."""
    order = torch.arange(system.n_atoms)
    for number in system.numbers.unique().tolist():
        members = (system.numbers == number).nonzero().squeeze(1)
        order[members] = members.roll(1)
    return order
