"""Heat of vaporization and heat capacity against quadrature, with their gradients in the parameters."""

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk, molecule
from observable_tools import bound, water_grid
from pair_quadrature import (
    ARGON,
    KT,
    TEMPERATURE_K,
    Gaussians,
    attached,
    boltzmann_weights,
    central_difference,
    grid_of_pairs,
)
from torch import nn
from toys import tiny_mace

from stable_plugin import HeatCapacity, HeatOfVaporization, System
from stable_plugin.algorithm.estimator import BoltzmannEstimator
from stable_plugin.algorithm.window_data import WindowEstimator
from stable_plugin.config import mean_squared_error
from stable_plugin.models import Potential, find_potential
from stable_plugin.observables.gas_phase import GasPhase, PureLiquid

SIDE, LENGTH = 3.6, 1.4
KJ_PER_MOL = units.kJ / units.mol
DIMER = Atoms("N2", [[0, 0, 0], [0, 0, LENGTH]], cell=[SIDE] * 3, pbc=True)
LIQUID = System.from_atoms(DIMER, bonds=[(0, 1)])


class Dimer(nn.Module):
    """A bond, and a Gaussian attraction of atoms to each other and to images of each other."""

    def __init__(self, k=8.0, depth=0.5):
        super().__init__()
        self.k = nn.Parameter(torch.tensor(k, dtype=torch.float64))
        self.depth = nn.Parameter(torch.tensor(depth, dtype=torch.float64))

    def stable_potential(self, system):
        return DimerPotential(self, system)

    def bond(self, length):
        return 0.5 * self.k * (length - LENGTH) ** 2

    def pair(self, distance):
        return -self.depth * torch.exp(-((distance / 1.6) ** 2))


class DimerPotential(Potential):
    cutoff = 3.4

    def atomic_energies(self, positions, edges):
        flat = positions.reshape(-1, 3)
        length = (flat[edges.index[1]] - flat[edges.index[0]] + edges.shifts).norm(dim=1)
        bonded = torch.where(length < 1.25 * LENGTH, self.module.bond(length), 0.0)
        zero = positions.new_zeros(flat.shape[0])
        energies = 0.5 * (bonded + self.module.pair(length))
        return zero.index_add(0, edges.index[1], energies).reshape(positions.shape[:2])


def bond_lengths():
    return torch.linspace(0.8 * LENGTH, 1.2 * LENGTH, 24, dtype=torch.float64)


def exact_gas(model):
    """Return the mean energy of a dimer in vacuum by quadrature."""
    length = bond_lengths()
    with torch.no_grad():
        energies = model.bond(length) + model.pair(length)
    weights = torch.softmax(-energies / KT + 2 * length.log(), dim=0)
    return (weights @ energies).item()


def dimers():
    """Return frames of the liquid of one molecule, and the logarithms of their weights in the quadrature."""
    length, number = bond_lengths(), 60
    height = 1 - (2 * torch.arange(number, dtype=torch.float64) + 1) / number
    angle = np.pi * (1 + 5**0.5) * torch.arange(number, dtype=torch.float64)
    radius = (1 - height**2).sqrt()
    directions = torch.stack([radius * angle.cos(), radius * angle.sin(), height], dim=1)
    vectors = (length[:, None, None] * directions).reshape(-1, 3)
    frames = torch.stack([torch.zeros_like(vectors), vectors], dim=1)
    return frames, 2 * length.log().repeat_interleave(number)


def liquid_weights(potential, frames, log_volume):
    with potential.frozen():
        energies = potential.energies(frames, potential.edges(frames))
    return torch.softmax(-energies / KT + log_volume, dim=0)


def exact_heat(potential, frames, log_volume):
    with torch.no_grad():
        energies = potential.energies(frames, potential.edges(frames))
    liquid = liquid_weights(potential, frames, log_volume) @ energies
    return (exact_gas(potential.module) - liquid.item() + KT) / KJ_PER_MOL


def heat_of_vaporization(potential, seed=0, n_replicas=256):
    heat = HeatOfVaporization(10.0, n_replicas=n_replicas, timestep_fs=2.0, seed=seed)
    heat.bind(LIQUID, torch.tensor(DIMER.positions)[None])
    heat.attach(potential, TEMPERATURE_K, chunk=10000)
    return heat


def test_heat_of_vaporization_equals_quadrature():
    potential = find_potential(Dimer(), LIQUID)
    frames, log_volume = dimers()
    expected = exact_heat(potential, frames, log_volume)
    heat = heat_of_vaporization(potential)
    found = liquid_weights(potential, frames, log_volume) @ heat.per_frame(frames)
    error = heat._gas.standard_error() / KJ_PER_MOL
    assert abs(found.item() - expected) < 3 * error < 0.2
    assert expected > KT / KJ_PER_MOL + 20 * error, "the images attract too weakly to be seen"


def test_gradient_of_the_heat_equals_central_differences_of_quadrature():
    """The liquid is exact, and what its gas phase, which is simulated, adds is right within its standard error."""
    frames, log_volume = dimers()
    potential = find_potential(Dimer(), LIQUID)
    expected = central_difference(lambda: exact_heat(potential, frames, log_volume), potential.module.depth)
    found = []
    for seed in range(4):
        heat = heat_of_vaporization(potential, seed, n_replicas=64)
        estimate = BoltzmannEstimator(potential, TEMPERATURE_K, 10000).estimate(
            frames,
            [heat.per_frame(frames)],
            [torch.zeros(1)],
            loss=lambda mean, _: mean.sum(),
            weights=liquid_weights(potential, frames, log_volume),
            explicit=[heat.of_frames],
        )
        found.append(estimate.gradients[1].item())
    error = np.std(found, ddof=1) / len(found) ** 0.5
    assert abs(np.mean(found) - expected) < 3 * error
    assert abs(expected) > 5 * error, "the test could not see a wrong gradient"


def test_gas_phase_follows_the_parameters(monkeypatch):
    """A small change is followed by the weights of the same frames, a large one by new frames."""
    potential, simulated = find_potential(Dimer(), LIQUID), []
    original = GasPhase._simulate

    def counted(self):
        simulated.append(self)
        return original(self)

    monkeypatch.setattr(GasPhase, "_simulate", counted)
    gas = heat_of_vaporization(potential)._gas
    for factor, times in ((1.0, 1), (1.1, 1), (12.0, 2)):
        with torch.no_grad():
            potential.module.k.fill_(8.0 * factor)
            found = gas.mean_energy().item()
        assert len(simulated) == times
        assert found == pytest.approx(exact_gas(potential.module), abs=4 * gas.standard_error())


def test_molecules_that_dissociate_are_reported(caplog):
    potential = find_potential(Dimer(k=1e-3, depth=0.0), LIQUID)
    heat_of_vaporization(potential, n_replicas=4).per_frame(dimers()[0][:1])
    assert "of 4 molecules dissociate in the gas phase" in caplog.text


def test_gas_phase_of_a_model_is_a_molecule_of_its_liquid():
    """With a real model: the energy of a molecule far from its images is that of the molecule without a cell."""
    water = water_grid(side=7.0)
    system = System.from_atoms(water)
    model = tiny_mace(system.numbers)
    heat = HeatOfVaporization(44.0, n_replicas=4)
    heat.bind(system, torch.tensor(water.positions)[None])
    heat.attach(find_potential(model, system), TEMPERATURE_K)
    single = water[:3]
    single.pbc = False
    alone = find_potential(model, System.from_atoms(single))
    gas = heat._gas.potential
    whole = heat._starts
    assert gas.system.symbols == ("O", "H", "H") and len(gas.system.bonds) == 2
    assert torch.allclose(gas.energies(whole, gas.edges(whole)), alone.energies(whole, alone.edges(whole)))


def test_heat_capacity_of_a_harmonic_crystal():
    """Dulong and Petit: 3 R per mole of atoms, within the standard error."""
    copper, k = bulk("Cu", cubic=True), 5.0
    system = System.from_atoms(copper)

    class Wells(nn.Module):
        def __init__(self):
            super().__init__()
            self.k = nn.Parameter(torch.tensor(k, dtype=torch.float64))

        def forward(self, positions):
            return 0.5 * self.k * (positions - torch.tensor(copper.positions)).square().sum(dim=(1, 2)) - 4e3

    from stable_plugin.models.module import ModulePotential

    capacity = HeatCapacity(25.0)
    capacity.bind(system, torch.tensor(copper.positions)[None])
    capacity.attach(ModulePotential(Wells(), system), TEMPERATURE_K)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        noise = torch.randn(40, 4, 3, generator=generator, dtype=torch.float64)
        capacity.update(torch.tensor(copper.positions) + (KT / k) ** 0.5 * noise)
    gas_constant = 1000 * units.kB / KJ_PER_MOL
    error = capacity.standard_error().item()
    assert abs(capacity.compute().item() - 3 * gas_constant) < 3 * error
    # The variance of a sample variance of a chi-square with 12 degrees of freedom: 2 / n, and 12 / n for its excess kurtosis.
    expected = gas_constant * 1.5 * ((2 + 12 / 12) / 2000) ** 0.5
    assert error == pytest.approx(expected, rel=0.3)


@pytest.mark.parametrize("name", ["height", "width"])
def test_gradient_of_the_heat_capacity_equals_central_differences(name):
    potential = find_potential(Gaussians(height=0.3), System.from_atoms(ARGON))
    frames, capacity = grid_of_pairs(n=14), attached(HeatCapacity(20.0, scale=5.0), potential)
    estimator = WindowEstimator(BoltzmannEstimator(potential, TEMPERATURE_K, 1000), [capacity])
    data = estimator.collect(frames, 1, torch.Generator())

    def loss():
        means = boltzmann_weights(potential, frames) @ capacity.per_frame(frames)
        return mean_squared_error(capacity.of_means(means) / 5.0, torch.tensor([4.0])).item()

    estimate = estimator.estimate(data, [boltzmann_weights(potential, frames)])
    parameters = dict(potential.module.named_parameters())
    gradient = estimate.gradients[list(parameters).index(name)].item()
    assert estimate.loss == pytest.approx(loss(), rel=1e-9)
    # The estimator divides the covariance by 1 - Σω², which is 1 - 4e-4 here, and half of it cancels the explicit part.
    assert gradient == pytest.approx(central_difference(loss, parameters[name]), rel=5e-3)


def test_mixtures_have_no_heat_of_vaporization():
    mixture = water_grid(side=7.0)
    methane = molecule("CH4")
    methane.translate([3.0, 3.0, 12.0])
    mixture.set_cell([7.0, 7.0, 16.0])
    with pytest.raises(ValueError, match=r"one kind of molecules, but the system has 8 H2O, 1 CH4: leave"):
        bound(HeatOfVaporization(44.0), mixture + methane)


@pytest.mark.parametrize(
    ("atoms", "message"),
    [
        (bulk("Cu", cubic=True), r"one kind of molecules, but the system has 1 framework"),
        (molecule("H2O"), r"pbc=\[False, False, False\], but HeatOfVaporization needs a liquid"),
    ],
)
def test_only_liquids_have_a_heat_of_vaporization(atoms, message):
    with pytest.raises(ValueError, match=message):
        bound(HeatOfVaporization(44.0), atoms)


def test_charged_molecules_have_no_heat_of_vaporization():
    water = water_grid(side=7.0)
    water.info["charge"] = 1
    with pytest.raises(ValueError, match=r"neutral molecules, but the system has charge=1"):
        bound(HeatOfVaporization(44.0), water)


def test_molecules_with_atoms_in_another_order_are_not_started_from():
    water = water_grid(side=7.0)
    reordered = water[[2, 0, 1, *range(3, 24)]]
    liquid = PureLiquid(System.from_atoms(reordered))
    assert liquid.number == 8 and len(liquid.atoms) == 1


@pytest.mark.parametrize("make", [HeatOfVaporization, HeatCapacity])
def test_target_must_be_a_number(make):
    with pytest.raises(ValueError, match="target_"):
        make("44 kJ/mol")
