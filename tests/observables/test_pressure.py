"""The pressure against closed forms, quadrature and other codes, and its gradient in the parameters."""

from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.io import read
from observable_tools import bound, noisy_frames, water_grid
from pair_quadrature import (
    ARGON,
    KT,
    SIDE,
    TEMPERATURE_K,
    Gaussians,
    attached,
    boltzmann_weights,
    central_difference,
    grid_of_pairs,
)
from spc_fw import SPCFw
from torch import nn

from stable_plugin import Evaluator, Langevin, Pressure, Stress, System
from stable_plugin.algorithm.estimator import BoltzmannEstimator
from stable_plugin.algorithm.window_data import WindowEstimator
from stable_plugin.md.centers import MolecularCenters
from stable_plugin.md.system import stack_positions
from stable_plugin.models import Potential, find_potential
from stable_plugin.observables.pressure import VOIGT


class Spring(nn.Module):
    """A spring between two atoms, with forces from shifts of edges."""

    def __init__(self, k=2.0, length=1.5):
        super().__init__()
        self.k, self.length = nn.Parameter(torch.tensor(k, dtype=torch.float64)), length

    def stable_potential(self, system):
        return SpringPotential(self, system)


class SpringPotential(Potential):
    cutoff = 3.0

    def atomic_energies(self, positions, edges):
        flat = positions.reshape(-1, 3)
        length = (flat[edges.index[1]] - flat[edges.index[0]] + edges.shifts).norm(dim=1)
        energies = 0.25 * self.module.k * torch.where(length < self.cutoff, (length - self.module.length) ** 2, 0.0)
        zero = positions.new_zeros(flat.shape[0])
        return zero.index_add(0, edges.index[1], energies).reshape(positions.shape[:2])


OPENMM = [
    (-28.689235, -0.03494),
    (-28.836679, -0.20185),
    (-28.337237, 0.10414),
    (-28.252575, -0.07605),
    (-28.92607, -0.302),
]
"""Energies in eV and molecular pressures in GPa of frames of SPC/Fw water, printed by support/openmm_pressures.py."""


LONG_RANGED = {"height": 0.3, "width": 2.0, "cutoff": 5.0}
"""A pair that sees several images, and so the shape of the cell."""


def free_energy(strain, n=14, **model):
    """Return -kT log Z of the pair in a strained cell, up to a constant, by quadrature over n³ points."""
    potential = find_potential(Gaussians(**model), System.from_atoms(ARGON))
    frames, deformed = grid_of_pairs(n), torch.eye(3, dtype=torch.float64) + strain
    cell = (SIDE * deformed).expand(len(frames), 3, 3)
    strained = frames @ deformed
    with potential.frozen():
        energies = potential.energies(strained, potential.edges(strained, cell))
    return -KT * (torch.logsumexp(-energies / KT, dim=0) + 2 * torch.linalg.det(cell[0]).log()).item()


def mean_over_grid(observable, potential, frames):
    return boltzmann_weights(potential, frames) @ attached(observable, potential).per_frame(frames)


def strained_by(row, column):
    strain = torch.zeros(3, 3, dtype=torch.float64)
    strain[row, column] = strain[column, row] = 1.0
    return strain


def test_mean_is_minus_the_derivative_of_the_free_energy():
    potential = find_potential(Gaussians(), System.from_atoms(ARGON))
    mean = mean_over_grid(Pressure(0.0), potential, grid_of_pairs())
    step = 1e-3 / SIDE * torch.eye(3, dtype=torch.float64)
    slope = (free_energy(step) - free_energy(-step)) / 2e-3
    assert mean.item() == pytest.approx(-slope / (3 * SIDE**2) / units.GPa, rel=1e-5)
    ideal = 2 * KT / SIDE**3 / units.GPa
    assert mean.item() > 1.01 * ideal, "the repulsion is too weak to be seen"


def test_mean_stress_is_the_derivative_of_the_free_energy_in_the_strain():
    """In a sheared cell, in which all six components differ from zero."""
    atoms = ARGON.copy()
    shear = np.eye(3) + 0.1 * np.array([[0, 1, 0.5], [1, 0.4, 0.3], [0.5, 0.3, 0]])
    atoms.set_cell(SIDE * shear, scale_atoms=True)
    potential = find_potential(Gaussians(**LONG_RANGED), System.from_atoms(atoms))
    frames = grid_of_pairs(n=8) @ torch.tensor(shear)
    mean = mean_over_grid(Stress([0.0] * 6), potential, frames)
    volume, step = atoms.get_volume(), 1e-4
    for value, (row, column) in zip(mean.tolist(), VOIGT, strict=True):
        direction = torch.tensor(shear) @ strained_by(row, column)
        above, below = (
            free_energy(torch.tensor(shear) - torch.eye(3) + s * direction, n=8, **LONG_RANGED) for s in (step, -step)
        )
        # A shear is both of its components.
        expected = (above - below) / (2 * step) / volume / units.GPa / (1 if row == column else 2)
        assert value == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert mean[3:].abs().max() > 1e-4, "the shear is too weak to be seen"


def test_pressure_is_the_mean_of_the_normal_stresses():
    copper = bulk("Cu", cubic=True) * 2
    potential = find_potential(EMT(), System.from_atoms(copper))
    frames = noisy_frames(copper, 2)
    stress = attached(Stress([0.0] * 6), potential).per_frame(frames)
    assert torch.allclose(attached(Pressure(0.0), potential).per_frame(frames)[:, 0], -stress[:, :3].mean(dim=1))
    copper.positions = frames[0].numpy()
    copper.calc = EMT()
    kinetic = len(copper) * KT / copper.get_volume()
    expected = (copper.get_stress() - kinetic * np.array([1, 1, 1, 0, 0, 0])) / units.GPa
    assert stress[0].tolist() == pytest.approx(expected.tolist(), rel=1e-9)


@pytest.mark.parametrize("name", ["height", "width"])
def test_gradient_equals_central_differences_of_the_mean(name):
    """The mean over a grid with Boltzmann weights is exact quadrature, so no sampling error is left."""
    potential = find_potential(Gaussians(), System.from_atoms(ARGON))
    frames, pressure = grid_of_pairs(), Pressure(target_GPa=0.05)
    attached(pressure, potential)

    def loss():
        mean = (boltzmann_weights(potential, frames) * pressure.per_frame(frames)[:, 0]).sum()
        return (mean.item() - 0.05) ** 2

    estimate = BoltzmannEstimator(potential, TEMPERATURE_K, chunk=1000).estimate(
        frames,
        [pressure.per_frame(frames)],
        [pressure.known_target],
        weights=boltzmann_weights(potential, frames),
        explicit=[pressure.of_frames],
    )
    assert estimate.loss == pytest.approx(loss(), rel=1e-9)
    parameters = dict(potential.module.named_parameters())
    gradient = estimate.gradients[list(parameters).index(name)].item()
    # The estimator divides the covariance by 1 - Σω², which is 1 - 4e-4 here.
    assert gradient == pytest.approx(central_difference(loss, parameters[name]), rel=2e-3)


def test_gradient_without_the_explicit_part_is_wrong():
    """The term that structural observables lack decides about this gradient."""
    potential = find_potential(Gaussians(), System.from_atoms(ARGON))
    frames, pressure = grid_of_pairs(), Pressure(target_GPa=0.05)
    attached(pressure, potential)
    arguments = frames, [pressure.per_frame(frames)], [pressure.known_target]
    estimator, weights = BoltzmannEstimator(potential, TEMPERATURE_K), boltzmann_weights(potential, frames)
    whole = estimator.estimate(*arguments, weights=weights, explicit=[pressure.of_frames])
    covariance = estimator.estimate(*arguments, weights=weights)
    assert abs(covariance.gradients[0] / whole.gradients[0] - 1) > 0.1


def test_molecules_and_atoms_have_the_same_mean():
    """A diatomic molecule: 2 k T less the virial of its bond, which is k T in the mean, and k T exactly."""
    system = System.from_atoms(Atoms("N2", [[0, 0, 0], [0, 0, 1.5]], cell=[12] * 3, pbc=True), bonds=[(0, 1)])
    spring = Spring()
    potential = find_potential(spring, system)
    length = torch.linspace(0.5, 2.9, 20001, dtype=torch.float64)
    weights = torch.softmax(-0.5 * spring.k.item() * (length - spring.length) ** 2 / KT + 2 * length.log(), dim=0)
    frames = torch.zeros(len(length), 2, 3, dtype=torch.float64)
    frames[:, 1, 2] = length
    atoms, molecules = (
        attached(Pressure(0.0, molecular=each), potential).per_frame(frames)[:, 0] for each in (False, True)
    )
    expected = KT / 12**3 / units.GPa
    assert torch.allclose(molecules, torch.full_like(molecules, expected), rtol=1e-6)
    assert (weights * atoms).sum().item() == pytest.approx(expected, rel=1e-4)
    assert (weights * (atoms - expected).square()).sum().sqrt() > 0.5 * expected


def test_molecular_centers_follow_images():
    water = water_grid()
    system = System.from_atoms(water)
    whole = noisy_frames(water, 3)
    images = torch.randint(-2, 3, whole.shape, generator=torch.Generator().manual_seed(0))
    offsets = images.double() @ system.cell.double()
    centers = MolecularCenters(system)
    assert centers.number == 8
    masses = torch.tensor(water.get_masses()).reshape(8, 3, 1)
    expected = (whole.reshape(3, 8, 3, 3) * masses).sum(dim=2) / masses.sum(dim=1)
    assert torch.allclose(centers(whole), expected.repeat_interleave(3, dim=1))
    assert torch.allclose(centers(whole + offsets), expected.repeat_interleave(3, dim=1) + offsets)


def test_atoms_without_molecules_are_their_own_centers():
    copper = bulk("Cu", cubic=True) * 2
    centers = MolecularCenters(System.from_atoms(copper))
    positions = noisy_frames(copper, 2)
    assert centers.number == len(copper)
    assert torch.allclose(centers(positions), positions)


def test_calculator_has_the_pressure_of_its_stress():
    copper = bulk("Cu", cubic=True) * 2
    frames = noisy_frames(copper, 2)
    pressure = attached(Pressure(0.0), find_potential(EMT(), System.from_atoms(copper)))
    for frame, found in zip(frames, pressure.per_frame(frames)[:, 0].tolist(), strict=True):
        copper.positions = frame.numpy()
        copper.calc = EMT()
        static = -np.trace(copper.get_stress(voigt=False)) / 3
        assert found == pytest.approx((static + len(copper) * KT / copper.get_volume()) / units.GPa, rel=1e-9)


def test_molecular_pressure_of_a_calculator_is_that_of_its_forces():
    """From the stress and the forces of a calculator, and from the strain derivative of the same potential."""
    from mace.calculators import MACECalculator
    from toys import tiny_mace

    water = water_grid(side=7.0)
    system = System.from_atoms(water)
    model = tiny_mace(system.numbers)
    frames = noisy_frames(water, 2)
    own, calculator = (
        attached(Pressure(0.0), find_potential(each, system)).per_frame(frames)
        for each in (model, MACECalculator(models=[model], device="cpu", default_dtype="float64"))
    )
    assert torch.allclose(own, calculator, rtol=1e-7)


def test_estimates_from_reweighted_frames_use_the_present_parameters():
    potential = find_potential(Gaussians(), System.from_atoms(ARGON))
    pressure = bound(Pressure(target_GPa=0.05), ARGON)
    estimator = WindowEstimator(BoltzmannEstimator(potential, TEMPERATURE_K), [pressure])
    data = estimator.collect(grid_of_pairs(n=4), 1, torch.Generator())
    before = estimator.estimate(data).mean
    with torch.no_grad():
        potential.module.height *= 1.1
    weights, _ = estimator.reweight(data)
    after = estimator.estimate(data, weights).mean
    assert after.item() == pytest.approx(
        (weights[0] * pressure.per_frame(data.positions)[:, 0]).sum().item(), rel=1e-12
    )
    assert after.item() != pytest.approx(before.item(), rel=1e-4)


def test_frames_are_measured_in_evaluation_mode():
    """Within a training step the model is in training mode, in which dropout would change the pressure."""
    potential, modes = find_potential(Gaussians(), System.from_atoms(ARGON)), []
    own = potential.energies

    def energies(positions, edges):
        modes.append(potential.module.training)
        return own(positions, edges)

    potential.energies = energies
    potential.module.train()
    attached(Pressure(0.0), potential).per_frame(grid_of_pairs(n=2))
    assert modes == [False]
    assert potential.module.training and all(each.requires_grad for each in potential.module.parameters())


@pytest.mark.parametrize("cell", [None, torch.empty(0, 3, 3)])
def test_no_frames_have_no_pressures(cell):
    pressure = attached(Pressure(1e-4), find_potential(Gaussians(), System.from_atoms(ARGON)))
    assert pressure.per_frame(torch.empty(0, 2, 3), cell).shape == (0, 1)


def test_evaluator_reports_the_pressure():
    copper = bulk("Cu", cubic=True) * 2
    starts = [copper.copy() for _ in range(2)]
    for seed, each in enumerate(starts):
        each.rattle(0.05, seed=seed)
    evaluator = Evaluator(
        starts,
        observables=[Pressure(target_GPa=0.0)],
        integrator=Langevin(TEMPERATURE_K),
        n_replicas=2,
        horizons_ps=[0.1],
        record_every_fs=20.0,
    )
    (summary,) = evaluator.evaluate(EMT()).summaries
    assert 0 < summary["observables"]["pressure"] < 20


def test_molecule_without_a_cell_has_no_pressure():
    with pytest.raises(ValueError, match=r"pbc=\[False, False, False\], but Pressure needs a volume.*set cell and pbc"):
        bound(Pressure(1e-4), Atoms("N2", [[0, 0, 0], [0, 0, 1.1]]))


@pytest.mark.parametrize("value", ["1 bar", None, float("nan")])
def test_target_must_be_a_number(value):
    with pytest.raises(ValueError, match=r"target_GPa="):
        Pressure(value)


def test_pressure_without_a_potential_says_so():
    pressure = bound(Pressure(1e-4), ARGON)
    with pytest.raises(RuntimeError, match=r"Pressure has no potential yet: call attach\(potential, temperature_K\)"):
        pressure.per_frame(torch.zeros(1, 2, 3))


def test_pressure_of_spc_fw_water_equals_that_of_openmm():
    """Ewald sums, bonds and angles of 64 molecules: the virial by autograd against finite differences of another program."""
    frames = read(Path(__file__).parents[2] / "recipes/data/water_reference.extxyz", "::40")
    potential = SPCFw(System.from_atoms(frames[0]))
    positions = stack_positions(frames, potential.system, "frames")
    with torch.no_grad():
        energies = potential.energies(positions, potential.edges(positions))
    pressures = attached(Pressure(1e-4), potential).per_frame(positions)[:, 0]
    for energy, pressure, (same_energy, same_pressure) in zip(energies, pressures, OPENMM, strict=True):
        assert energy.item() == pytest.approx(same_energy, abs=5e-6)
        assert pressure.item() == pytest.approx(same_pressure, abs=5e-5)


@pytest.mark.parametrize("value", ["1 GPa", 1.0, [1.0, 2.0], None])
def test_stress_must_have_six_components(value):
    with pytest.raises(ValueError, match=r"target_GPa=.* must be six numbers in GPa: xx, yy, zz, yz, xz, xy"):
        Stress(value)
