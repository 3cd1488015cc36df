"""SPC/Fw water with Ewald sums, written for tests: energies that other programs compute too."""

from math import inf, pi, sqrt

import torch
from ase import units

from stable_plugin.models import Potential

COULOMB = units.Hartree * units.Bohr
BOND = (1.012, 1059.162 * units.kcal / units.mol)
ANGLE = (113.24 * pi / 180.0, 75.9 * units.kcal / units.mol)
SIGMA, EPSILON = 3.165492, 0.1554253 * units.kcal / units.mol
SWITCH, CUTOFF = 5.0, 6.0
SPLITTING = 0.7
N_WAVES = 12
"""Gaussians of width 1/SPLITTING Å: both sums are converged to 1e-7 in a cell of 12 Å."""


class SPCFw(Potential):
    """Flexible water of Wu, Tepper and Voth, J. Chem. Phys. 124, 024503 (2006); Lennard-Jones forces end smoothly at 6 Å."""

    cutoff, sees_cells = inf, True

    def __init__(self, system):
        super().__init__(torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(()))]), system)
        self.n_molecules = system.n_atoms // 3
        self.charges = torch.tensor([-0.82, 0.41, 0.41], dtype=torch.float64).repeat(self.n_molecules)
        first, second = torch.combinations(torch.arange(system.n_atoms), 2).unbind(1)
        self.between = torch.stack([first, second])[:, first // 3 != second // 3]
        waves = torch.cartesian_prod(*[torch.arange(-N_WAVES, N_WAVES + 1)] * 3).double()
        self.waves = waves[waves.square().sum(1) > 0]

    def atomic_energies(self, positions, edges):
        cell = self.system.cell.to(positions).expand(len(positions), 3, 3) if edges.cell is None else edges.cell
        energies = torch.stack([self._energy(*frame) for frame in zip(positions, cell, strict=True)])
        return (energies / self.system.n_atoms)[:, None].expand(positions.shape[:2])

    def _energy(self, positions, cell):
        def separations(first, second):
            vectors = positions[second] - positions[first]
            return vectors - (vectors @ torch.linalg.inv(cell)).round().detach() @ cell

        oxygen = 3 * torch.arange(self.n_molecules)
        arms = [separations(oxygen, oxygen + hydrogen) for hydrogen in (1, 2)]
        lengths = [arm.norm(dim=1) for arm in arms]
        angle = torch.arccos((arms[0] * arms[1]).sum(1) / (lengths[0] * lengths[1]))
        bonded = sum(0.5 * BOND[1] * (each - BOND[0]).square().sum() for each in lengths)
        bonded = bonded + 0.5 * ANGLE[1] * (angle - ANGLE[0]).square().sum()

        r = separations(*self.between).norm(dim=1)
        oxygens = (self.between % 3 == 0).all(dim=0) & (r < CUTOFF)
        sixth = (SIGMA / r[oxygens]) ** 6
        x = ((r[oxygens] - SWITCH) / (CUTOFF - SWITCH)).clamp(min=0.0)
        dispersion = (4.0 * EPSILON * (sixth.square() - sixth) * (1.0 - 10.0 * x**3 + 15.0 * x**4 - 6.0 * x**5)).sum()

        first, second = self.charges[self.between]
        coulomb = (first * second * torch.erfc(SPLITTING * r) / r).sum()
        within = torch.cat([*lengths, (arms[1] - arms[0]).norm(dim=1)])
        pairs = torch.tensor([-0.82 * 0.41] * 2 * self.n_molecules + [0.41**2] * self.n_molecules, dtype=torch.float64)
        coulomb = coulomb - (pairs * torch.erf(SPLITTING * within) / within).sum()
        k = 2.0 * pi * self.waves @ torch.linalg.inv(cell).T
        square = k.square().sum(1)
        phases = positions @ k.T
        density = (self.charges @ phases.cos()).square() + (self.charges @ phases.sin()).square()
        waves = 2.0 * pi / torch.linalg.det(cell) * (torch.exp(-square / (4.0 * SPLITTING**2)) / square * density).sum()
        itself = SPLITTING / sqrt(pi) * self.charges.square().sum()
        return bonded + dispersion + COULOMB * (coulomb + waves - itself)
