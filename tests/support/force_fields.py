"""A small force field of sound shape, which can be given a hole."""

import torch
from torch import nn

from stable_plugin.md.internal_coordinates import angles
from stable_plugin.models import Potential

DISSOCIATION, STEEPNESS, BENDING = 4.0, 2.0, 4.0
"""Morse bonds in eV and 1/Å, harmonic angles in eV/rad²."""

RADII = {1: 1.0, 6: 1.4, 8: 1.4, 29: 2.2}
"""Contacts repel each other by 0.5 (r / d)^12 eV, with the sum of half of these in Å."""


class ForceField(nn.Module):
    """Morse bonds and harmonic angles with the values of one frame at rest, and repulsion of all other atoms.

    Args:
        frame: ASE structure at rest.
        hole: Atoms of a bond, an angle or a contact; none if empty.
        at: Value of that coordinate at the bottom of a Gaussian hole, in Å or degrees.
        width: Its standard deviation.
        depth: Its depth in eV.
    """

    def __init__(self, frame, hole=(), at=0.0, width=0.1, depth=3.0):
        super().__init__()
        self.rest = nn.Parameter(torch.tensor(frame.positions), requires_grad=False)
        self.hole, self.at, self.width, self.depth = hole, at, width, depth

    def stable_potential(self, system):
        return FieldPotential(self, system)


class FieldPotential(Potential):
    @property
    def cutoff(self):
        return float("inf")

    def atomic_energies(self, positions, edges):
        field, system = self.module, self.system
        energy = torch.zeros(len(positions), dtype=positions.dtype)
        bonds, triples = system.bonds, system.angles
        if len(bonds) > 0:
            stretch = system.distances(positions, bonds) - system.distances(field.rest, bonds)
            energy = energy + (DISSOCIATION * (1 - torch.exp(-STEEPNESS * stretch)).square()).sum(-1)
        if len(triples) > 0:
            bend = torch.deg2rad(angles(system, positions, triples) - angles(system, field.rest, triples))
            energy = energy + (0.5 * BENDING * bend.square()).sum(-1)
        pairs = _contacts(system)
        radii = torch.tensor([RADII[int(number)] for number in system.numbers], dtype=positions.dtype)
        ratio = radii[pairs].mean(dim=1) / system.distances(positions, pairs)
        energy = energy + 0.5 * (ratio**12).sum(-1)
        if field.hole:
            energy = energy - field.depth * torch.exp(-0.5 * ((self._value(positions) - field.at) / field.width) ** 2)
        return torch.cat([energy[:, None], energy.new_zeros(len(energy), system.n_atoms - 1)], dim=1)

    def _value(self, positions):
        atoms = torch.tensor([self.module.hole])
        if atoms.shape[1] == 3:
            return angles(self.system, positions, atoms)[:, 0]
        return self.system.distances(positions, atoms)[:, 0]


def _contacts(system):
    """Return all pairs of atoms that are more than two bonds apart."""
    near = torch.cat([system.bonds, system.angles[:, [0, 2]]]).sort(dim=1).values
    known = {tuple(pair) for pair in near.tolist()}
    pairs = torch.combinations(torch.arange(system.n_atoms))
    return torch.tensor([pair for pair in pairs.tolist() if tuple(pair) not in known], dtype=torch.long).reshape(-1, 2)
