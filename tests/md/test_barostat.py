"""Constant pressure: distributions of the volume in closed form, the virial, and two pressures against each other."""

from math import inf, sqrt

import numpy as np
import physical_validation as pv
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk
from ase.constraints import FixAtoms
from ase.io import read
from springs import observable_gradient
from toys import PairRepulsion, SoftSpheres, Springs
from validation_units import QUIET, UNITS

from stable_plugin import (
    Density,
    Evaluator,
    Langevin,
    LindemannCriterion,
    MonteCarloBarostat,
    NonFinite,
    NoseHooverChain,
    Pressure,
    Schedule,
    StABlEConfig,
    System,
    VolumeDeviation,
)
from stable_plugin.algorithm.assembly import assemble
from stable_plugin.algorithm.estimator import BoltzmannEstimator
from stable_plugin.integrations.build import validate
from stable_plugin.md import Simulator
from stable_plugin.md.barostat import VolumeMoves
from stable_plugin.models import ModulePotential, Potential, find_potential
from stable_plugin.models.module import NoInteraction
from stable_plugin.observables.density import G_PER_CM3

TEMPERATURE_K = 300.0
KT = units.kB * TEMPERATURE_K


GRID = [[x, y, z] for x in (0, 5, 10) for y in (0, 5, 10) for z in (0, 5, 10)]


def free_atoms():
    """Return 27 atoms without interaction."""
    atoms = Atoms("Ar27", GRID, cell=[15.0] * 3, pbc=True)
    return atoms, find_potential(NoInteraction().double(), System.from_atoms(atoms)), 27


def free_molecules():
    """Return 27 diatomic molecules, of which some cross the boundary of the cell."""
    positions = np.repeat(np.array(GRID, dtype=float), 2, axis=0) + np.tile([[0, 0, -0.5], [0, 0, 0.6]], (27, 1))
    atoms = Atoms("NO" * 27, positions, cell=[15.0] * 3, pbc=True)
    system = System.from_atoms(atoms)
    return atoms, ModulePotential(Springs(system.bonds, 20.0, torch.full((27,), 1.1)), system), 27


def simulate(
    potential, atoms, pressure_GPa, n_steps, n_replicas, *, every=1, record=None, thermostat=Langevin, skip=0,
    coupling="isotropic",
):  # fmt: skip
    """Return a window of replicas that change their volume every few steps of 1 fs, after some that are left out."""
    barostat = MonteCarloBarostat(pressure_GPa, float(every), coupling)
    integrator = thermostat(TEMPERATURE_K, 1.0, barostat=barostat)
    simulator = Simulator(potential, integrator, NonFinite(), check_every_fs=float(every), block_steps=every)
    generator = torch.Generator().manual_seed(0)
    start = simulator.prepare(torch.tensor(atoms.positions).repeat(n_replicas, 1, 1), generator)
    if skip:
        start = simulator.run(start, skip, skip, generator).end
    return simulator.run(start, n_steps, record or n_steps, generator)


def volumes(window):
    return torch.linalg.det(window.cell)


@pytest.mark.parametrize("coupling", ["isotropic", "anisotropic"])
@pytest.mark.parametrize("make", [free_atoms, free_molecules])
def test_volume_of_an_ideal_gas_has_a_gamma_distribution(make, coupling):
    """V is distributed as V^N exp(-PV/kT), with N molecules, so its compressibility is 1/P."""
    atoms, potential, n_centers = make()
    pressure, n_replicas = (n_centers + 1) * KT / atoms.get_volume(), 300
    window = simulate(potential, atoms, pressure / units.GPa, 800, n_replicas, coupling=coupling)
    found = volumes(window).flatten()
    mean, variance = (n_centers + 1) * KT / pressure, (n_centers + 1) * (KT / pressure) ** 2
    assert found.mean().item() == pytest.approx(mean, abs=4 * sqrt(variance / n_replicas))
    # The kurtosis of a gamma distribution of shape k is 3 + 6 / k.
    spread = sqrt((2.0 + 6.0 / (n_centers + 1)) / n_replicas)
    assert found.var().item() == pytest.approx(variance, rel=4 * spread)
    compressibility = found.var().item() / (KT * found.mean().item())
    assert compressibility == pytest.approx(1.0 / pressure, rel=4 * spread)
    assert found.var().item() < 0.5 * mean**2 / 8, "not that of eight molecules"
    lengths = window.cell[-1].diagonal(dim1=1, dim2=2)
    assert torch.allclose(window.cell[-1], torch.diag_embed(lengths)), "angles are kept"
    assert torch.allclose(lengths, lengths[:, :1].expand(-1, 3)) == (coupling == "isotropic")


class NearestNeighborSprings(PairRepulsion):
    """Springs of stiffness k between nearest neighbors of a crystal: U = ½ k Σ (r - r0)²."""

    def __init__(self, system, stiffness, length):
        super().__init__(system, cutoff=1.2 * length)
        self.stiffness, self.length = stiffness, length

    def atomic_energies(self, positions, edges):
        flat = positions.reshape(-1, 3)
        lengths = torch.linalg.vector_norm(flat[edges.index[1]] - flat[edges.index[0]] + edges.shifts, dim=-1)
        energies = 0.25 * self.stiffness * (lengths - self.length).square()
        return torch.zeros_like(flat[:, 0]).index_add(0, edges.index[1], energies).reshape(positions.shape[:2])


def test_volume_of_a_harmonic_crystal_fluctuates_by_its_compressibility():
    """U = N k r0² (ΔV/V)² / 3 with six bonds per atom, so the variance of V is 3 kT V² / (2 N k r0²)."""
    atoms = bulk("Ar", "fcc", a=3.6, cubic=True) * (2, 2, 2)
    length, stiffness = 3.6 / sqrt(2.0), 40.0
    potential = NearestNeighborSprings(System.from_atoms(atoms, bonds=[]), stiffness, length)
    window = simulate(potential, atoms, 0.0, 1500, 24, every=10, record=100, skip=500)
    found = volumes(window)
    expected = 1.5 * KT / (len(atoms) * stiffness * length**2)
    relative = (found / atoms.get_volume()).log()
    by_replica = relative.var(dim=0)
    error = by_replica.std().item() / sqrt(24)
    assert by_replica.mean().item() == pytest.approx(expected, abs=4 * error + 0.05 * expected)
    assert error < 0.1 * expected
    assert relative.mean().item() == pytest.approx(0.0, abs=0.003), "expansion of an anharmonic crystal"


def test_lengths_of_a_harmonic_crystal_fluctuate_by_its_elastic_constants():
    """U = N k r0² Σ (e_i + e_j)² / 4 over the pairs of axes, so var e_i = 3 kT / (2 N k r0²) and cov = -1/3 of that."""
    atoms = bulk("Ar", "fcc", a=3.6, cubic=True) * (2, 2, 2)
    length, stiffness = 3.6 / sqrt(2.0), 40.0
    potential = NearestNeighborSprings(System.from_atoms(atoms, bonds=[]), stiffness, length)
    settings = {"every": 10, "record": 100, "skip": 1000, "coupling": "anisotropic"}
    window = simulate(potential, atoms, 0.0, 4000, 24, **settings)
    strains = (window.cell.diagonal(dim1=2, dim2=3) / atoms.cell[0, 0]).log()
    strains = strains - strains.mean(dim=0)
    products = torch.einsum("tri,trj->rij", strains, strains) / (len(strains) - 1)
    expected = KT / (len(atoms) * stiffness * length**2) * (2.0 * torch.eye(3) - 0.5)
    error = products.std(dim=0) / sqrt(24)
    assert bool(((products.mean(dim=0) - expected).abs() < 4 * error + 0.05 * expected.abs()).all())
    assert error.max() < 0.15 * expected.max()


@pytest.mark.parametrize("coupling", ["isotropic", "anisotropic"])
def test_move_keeps_directions_and_fractional_coordinates(coupling):
    atoms = Atoms("Ar27", GRID, cell=[[15, 0, 0], [4, 14, 0], [-3, 2, 16]], pbc=True)
    potential = find_potential(NoInteraction().double(), System.from_atoms(atoms, bonds=[]))
    generator = torch.Generator().manual_seed(0)
    state = Simulator(potential, Langevin(TEMPERATURE_K), NonFinite()).prepare(
        torch.tensor(atoms.positions).repeat(50, 1, 1), generator
    )
    moves = VolumeMoves(MonteCarloBarostat(0.0, coupling=coupling), potential.system, KT, 1.0)
    moved, log_volume = moves.propose(state, torch.ones(50, dtype=torch.bool), generator)
    stretched = moved.cell.norm(dim=2) / state.cell.norm(dim=2)
    assert torch.allclose(moved.cell, stretched[:, :, None] * state.cell, rtol=1e-12)
    assert ((stretched - 1.0).abs() > 1e-9).sum(dim=1).tolist() == [3 if coupling == "isotropic" else 1] * 50
    inside = [each.positions @ torch.linalg.inv(each.cell) for each in (state, moved)]
    assert torch.allclose(*inside, rtol=0, atol=1e-12)
    assert torch.allclose(
        log_volume, 28 * (torch.linalg.det(moved.cell) / torch.linalg.det(state.cell)).log(), atol=1e-9
    )


def soft_spheres():
    """Return a dense liquid of soft spheres, whose neighbor lists have skins."""
    atoms = bulk("Ar", "fcc", a=3.4, cubic=True) * (2, 2, 2)
    return atoms, PairRepulsion(System.from_atoms(atoms, bonds=[]), strength=0.8, cutoff=3.0)


@pytest.fixture(scope="module")
def liquid():
    """Return windows of soft spheres at two pressures in GPa."""
    atoms, potential = soft_spheres()
    settings = {"every": 5, "record": 150, "skip": 1500}
    return potential, {pressure: simulate(potential, atoms, pressure, 3000, 40, **settings) for pressure in (0.8, 1.0)}


def test_mean_virial_is_the_pressure_of_the_barostat(liquid):
    potential, windows = liquid
    pressure = Pressure(0.0, molecular=False)
    pressure.bind(potential.system, windows[0.8].positions[0])
    pressure.attach(potential, TEMPERATURE_K)
    for expected, window in windows.items():
        found = pressure.per_frame(window.frames(), window.frame_cells()).reshape(len(window.positions), -1)
        by_replica = found.mean(dim=0)
        error = by_replica.std().item() / sqrt(len(by_replica))
        assert by_replica.mean().item() == pytest.approx(expected, abs=3.5 * error)
        assert error < 0.05 * expected


def test_volumes_at_two_pressures_have_the_ratio_of_the_ensemble(liquid):
    """The logarithm of the ratio of two distributions of V is linear, with the slope (P2 - P1) / kT."""
    potential, windows = liquid

    def as_claimed_at(pressure, claimed=None):
        window = windows[pressure]
        with torch.no_grad():
            energies = BoltzmannEstimator(potential, TEMPERATURE_K).energies(window.frames(), window.frame_cells())
        return pv.data.SimulationData(
            units=UNITS,
            system=pv.data.SystemData(natoms=32, nconstraints=0, ndof_reduction_tra=0, ndof_reduction_rot=0),
            ensemble=pv.data.EnsembleData(
                "NPT", natoms=32, pressure=(claimed or pressure) * units.GPa, temperature=TEMPERATURE_K
            ),
            observables=pv.data.ObservableData(
                potential_energy=energies.numpy(),
                kinetic_energy=np.zeros(len(energies)),
                total_energy=energies.numpy(),
                volume=torch.linalg.det(window.frame_cells()).numpy(),
            ),
        )

    right = pv.ensemble.check(as_claimed_at(0.8), as_claimed_at(1.0), **QUIET)
    assert np.abs(right).max() < 3.5, "in standard errors"
    wrong = pv.ensemble.check(as_claimed_at(0.8), as_claimed_at(1.0, claimed=1.3), **QUIET)
    assert np.abs(wrong).max() > 3.5


class Balloon(Potential):
    """Free atoms in a cell that resists changes of its volume: U = a (V / 100 Å³ - 1)²."""

    cutoff, sees_cells = inf, True

    def __init__(self, system):
        module = torch.nn.Module()
        module.strength = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        super().__init__(module, system)

    def atomic_energies(self, positions, edges):
        cell = self.system.cell.expand(len(positions), 3, 3) if edges.cell is None else edges.cell
        energies = self.module.strength * (torch.linalg.det(cell) / 100.0 - 1.0).square()
        return 0.5 * energies[:, None].expand(positions.shape[:2]) + 0.0 * positions.sum(-1)


def test_volume_follows_the_energy_of_the_cell():
    """V is distributed as V² exp(-(U(V) + PV)/kT) with two atoms: mean density and its gradient by quadrature."""
    atoms = Atoms("Ar2", [[0, 0, 0], [2, 2, 2]], cell=[4.5] * 3, pbc=True)
    potential = Balloon(System.from_atoms(atoms, bonds=[]))
    density = Density()
    density.bind(potential.system, torch.zeros(1, 2, 3))
    window = simulate(potential, atoms, 0.1, 800, 3000)
    found = density.per_frame(window.frames(), window.frame_cells())
    estimate = BoltzmannEstimator(potential, TEMPERATURE_K, 1000).estimate(
        window.frames(), [found], [density.known_target], lambda values, _: values.sum(), cell=window.frame_cells()
    )

    volume = np.linspace(0.5, 500.0, 100_000)
    slope = (volume / 100.0 - 1.0) ** 2
    log_weight = 2.0 * np.log(volume) - (0.3 * slope + 0.1 * units.GPa * volume) / KT
    weight = np.exp(log_weight - log_weight.max())
    exact = atoms.get_masses().sum() / volume / G_PER_CM3
    mean = np.average(exact, weights=weight)
    gradient = -(np.average(exact * slope, weights=weight) - mean * np.average(slope, weights=weight)) / KT
    assert found.mean().item() == pytest.approx(mean, abs=4 * found.std().item() / sqrt(3000))
    assert found.std().item() < 0.5 * mean
    assert estimate.gradients[0].item() == pytest.approx(gradient, rel=0.2)


@pytest.mark.parametrize("thermostat", [Langevin, NoseHooverChain])
def test_energies_and_forces_belong_to_the_new_cells(thermostat):
    atoms, potential = soft_spheres()
    window = simulate(potential, atoms, 1.0, 40, 3, every=4, record=4, thermostat=thermostat)
    cells = volumes(window)
    assert (cells.diff(dim=0) != 0.0).any(dim=0).all(), "every replica has a volume of its own"
    simulator = Simulator(potential, thermostat(TEMPERATURE_K, 1.0), NonFinite(), check_every_fs=1.0)
    fresh = simulator.refresh(window.end)
    torch.testing.assert_close(fresh.forces, window.end.forces)
    torch.testing.assert_close(fresh.energies, window.end.energies)


def test_equal_seeds_give_equal_volumes():
    atoms, potential = soft_spheres()
    one, other = (simulate(potential, atoms, 1.0, 20, 2) for _ in range(2))
    torch.testing.assert_close(one.cell, other.cell, rtol=0.0, atol=0.0)


def test_replicas_that_stopped_keep_their_cells():
    atoms, potential = soft_spheres()
    simulator = Simulator(
        potential, Langevin(TEMPERATURE_K, 1.0, barostat=MonteCarloBarostat(1.0, 1.0)), NonFinite(), check_every_fs=1.0
    )
    generator = torch.Generator().manual_seed(0)
    start = simulator.prepare(torch.tensor(atoms.positions).repeat(2, 1, 1), generator)
    window = simulator.run(start, 20, 20, generator, active=torch.tensor([True, False]))
    assert not torch.equal(window.end.cell[0], start.cell[0])
    torch.testing.assert_close(window.end.cell[1], start.cell[1], rtol=0.0, atol=0.0)
    torch.testing.assert_close(window.end.positions[1], start.positions[1], rtol=0.0, atol=0.0)


def test_barostat_names_what_it_cannot_be_used_with():
    barostat = MonteCarloBarostat(1.0)
    atoms, _ = soft_spheres()
    with pytest.raises(ValueError, match=r"barostat=1\.0 is not a barostat: pass MonteCarloBarostat\(pressure_GPa\)"):
        Langevin(300.0, barostat=1.0)
    with pytest.raises(ValueError, match=r"pressure_GPa='1 bar' is out of range: pass a finite number"):
        MonteCarloBarostat("1 bar")
    with pytest.raises(ValueError, match="every_fs=0"):
        MonteCarloBarostat(1.0, every_fs=0.0)
    with pytest.raises(ValueError, match=r"coupling='cubic' is not a coupling: pass one of isotropic, anisotropic\."):
        MonteCarloBarostat(1.0, coupling="cubic")
    slab = atoms.copy()
    slab.pbc = [True, True, False]
    held = atoms.copy()
    held.set_constraint(FixAtoms([0]))
    for frame, message in (
        (slab, r"needs a volume, but pbc=\[True, True, False\]"),
        (held, r"structures have FixAtoms"),
    ):
        system = System.from_atoms(frame, bonds=[]).with_fixed([frame], [frame])
        with pytest.raises(ValueError, match=message):
            Simulator(PairRepulsion(system), Langevin(300.0, barostat=barostat), NonFinite())
        with pytest.raises(ValueError, match=message):
            Evaluator([frame], integrator=Langevin(300.0, barostat=barostat))
        with pytest.raises(ValueError, match=message):
            validate(StABlEConfig(structures=[frame] * 2, integrator=Langevin(300.0, barostat=barostat)))


def test_changed_integrator_keeps_its_barostat():
    integrator = Langevin(300.0, barostat=MonteCarloBarostat(1.0))
    assert integrator.changed(temperature_K=500.0).barostat is integrator.barostat


def test_training_follows_the_density():
    atoms, _ = soft_spheres()
    positions = torch.tensor(atoms.positions)[None]
    config = StABlEConfig(
        objective="boltzmann", n_replicas=6, window_ps=0.1, record_every_fs=10.0, check_every_fs=10.0,
        integrator=Langevin(TEMPERATURE_K, 2.0, barostat=MonteCarloBarostat(1.0, every_fs=10.0)), detector=NonFinite(),
        observables=Density(target_g_per_cm3=8.0), schedule=Schedule(max_observable_loss=1e-6),
    )  # fmt: skip
    potential = SoftSpheres().stable_potential(System.from_atoms(atoms, bonds=[]))
    positions = positions.repeat(2, 1, 1)
    loop = assemble(potential, positions, positions, config)
    estimate = observable_gradient(loop)
    assert estimate is not None
    assert estimate.gradients[0].item() > 0.0, "a weaker repulsion makes it denser"
    restored = assemble(potential, positions, positions, config)
    restored.load_state_dict(loop.state_dict())
    torch.testing.assert_close(
        observable_gradient(restored).gradients, observable_gradient(loop).gradients, rtol=0.0, atol=0.0
    )


def test_evaluation_records_the_cells_of_the_frames(tmp_path):
    atoms, _ = soft_spheres()
    settings = {"integrator": Langevin(TEMPERATURE_K, 2.0, barostat=MonteCarloBarostat(1.0)), "horizons_ps": [0.4]}
    settings |= {"n_replicas": 3, "record_every_fs": 50.0, "check_every_fs": 10.0}
    assert "VolumeDeviation(threshold=0.2)" in str(Evaluator([atoms], **settings).detector)
    evaluator = Evaluator([atoms], detector=NonFinite(), **settings)
    evaluation = evaluator.evaluate(SoftSpheres(), trajectories=tmp_path)
    written = [read(tmp_path / f"stable_replica{replica:02d}.extxyz", ":") for replica in range(3)]
    found = [frame.get_masses().sum() / frame.get_volume() / G_PER_CM3 for frames in written for frame in frames]
    assert len(set(np.round(found, 6))) > 12
    target = atoms.get_masses().sum() / atoms.get_volume() / G_PER_CM3
    difference = evaluation.summaries[0]["observables"]["density"]
    assert difference == pytest.approx(abs(np.mean(found) - target), rel=1e-5)


def test_volume_deviation_flags_a_cell_that_runs_away():
    atoms, potential = soft_spheres()
    detector = VolumeDeviation(0.2)
    positions = torch.tensor(atoms.positions)[None]
    detector.bind(potential.system, positions)
    simulator = Simulator(
        potential, Langevin(TEMPERATURE_K, 1.0, barostat=MonteCarloBarostat(0.0, 1.0)), detector, check_every_fs=1.0
    )
    generator = torch.Generator().manual_seed(0)
    window = simulator.run(simulator.prepare(positions, generator), 1000, 1000, generator, stop_unstable=True)
    assert window.stopped.all(), "soft spheres without pressure evaporate"
    assert torch.linalg.det(window.end.cell[0]).item() / atoms.get_volume() == pytest.approx(1.2, abs=0.15)
    with pytest.raises(ValueError, match=r"needs a volume"):
        detector.bind(System.from_atoms(Atoms("Ar2", [[0, 0, 0], [0, 0, 4]])), torch.zeros(1, 2, 3))
    with pytest.raises(RuntimeError, match=r"no reference yet"):
        VolumeDeviation().measure(positions, positions)


def test_sites_of_a_crystal_scale_with_the_cell():
    atoms, potential = soft_spheres()
    reference = torch.tensor(atoms.positions)[None]
    detector = LindemannCriterion(0.3)
    detector.bind(potential.system, reference)
    moved, cell = 1.1 * reference, 1.1 * torch.tensor(atoms.cell.array)[None]
    moved[0, 0, 0] += 1.0
    share = 1.0 / len(atoms)
    assert detector.measure(moved, moved, cell).item() == pytest.approx(share * (1.0 - share))
