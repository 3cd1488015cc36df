"""Wasserstein distances against scipy and known shifts, and levels from the reference itself."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from scipy.stats import wasserstein_distance

from stable_plugin import Evaluator, PowerSpectrum, RadialDistribution, System
from stable_plugin.evaluation.distributions import DistributionTest, Frames
from stable_plugin.evaluation.page import render
from stable_plugin.evaluation.simulation import ReplicaTrajectories
from stable_plugin.evaluation.verdict import judge
from stable_plugin.evaluation.wasserstein import circular_wasserstein, curve_wasserstein, wasserstein
from stable_plugin.evaluation.wording import distribution_distance, stability


def correlated(n_frames, n_values, random, memory=0.9):
    """Return unit normal values of an autoregressive process, (n_frames, n_values)."""
    noise = random.normal(size=(n_frames, n_values))
    values = np.zeros_like(noise)
    values[0] = noise[0]
    for frame in range(1, n_frames):
        values[frame] = memory * values[frame - 1] + np.sqrt(1 - memory**2) * noise[frame]
    return values


def ethane_frames(n_frames, seed=0):
    random = np.random.default_rng(seed)
    atoms = molecule("C2H6")
    noise = 0.03 * correlated(n_frames, 24, random).reshape(n_frames, 8, 3)
    return atoms, torch.tensor(atoms.positions + noise)


def simulated(positions, n_replicas=4, cell=None, velocities=None):
    """Return frames as the trajectories of replicas, 10 fs apart."""
    n_frames = len(positions) // n_replicas
    kept = positions[: n_frames * n_replicas].unflatten(0, (n_frames, n_replicas))
    return ReplicaTrajectories(
        positions=kept,
        velocities=torch.zeros_like(kept) if velocities is None else velocities,
        valid=torch.ones(n_frames, n_replicas, dtype=torch.bool),
        times_ps=0.01 * torch.arange(1, n_frames + 1, dtype=torch.float64),
        failed_ps=torch.full((n_replicas,), torch.inf, dtype=torch.float64),
        last_positions=kept[-1],
        last_velocities=torch.zeros_like(kept[-1]),
        cell=None if cell is None else cell.expand(n_frames, n_replicas, 3, 3),
    )


def test_wasserstein_of_a_shift_is_the_shift():
    values = np.random.default_rng(0).normal(1.4, 0.02, size=500)
    assert wasserstein(values, values + 0.1) == pytest.approx(0.1)
    x = np.linspace(0.0, 6.0, 601)
    peak = np.exp(-0.5 * ((x - 2.8) / 0.05) ** 2)
    assert curve_wasserstein(x, peak, 3.0 * np.roll(peak, 10)) == pytest.approx(0.1, rel=1e-6)
    assert curve_wasserstein(x, peak, np.roll(peak, 200)) == pytest.approx(2.0, rel=1e-6)
    assert np.isnan(curve_wasserstein(x, peak, 0.0 * peak))


def test_circular_wasserstein_goes_the_shorter_way():
    random = np.random.default_rng(1)
    trans = random.normal(180.0, 8.0, size=400)
    assert circular_wasserstein(trans, trans + 5.0) == pytest.approx(5.0)
    assert circular_wasserstein(np.array([175.0]), np.array([-175.0])) == pytest.approx(10.0)
    assert circular_wasserstein(np.array([10.0]), np.array([350.0, 30.0])) == pytest.approx(20.0)
    narrow, other = random.normal(60.0, 10.0, size=300), random.normal(80.0, 15.0, size=250)
    assert circular_wasserstein(narrow, other) == pytest.approx(wasserstein_distance(narrow, other))


def test_stretched_bond_differs_by_its_shift():
    atoms, reference = ethane_frames(800)
    system = System.from_atoms(atoms)
    moved = reference.clone()
    direction = torch.tensor(atoms.positions[1] - atoms.positions[0]) / atoms.get_distance(0, 1)
    moved[:, atoms.positions[:, 2] < 0] += 0.1 * direction * (1.0 if atoms.positions[1, 2] < 0 else -1.0)
    found = DistributionTest(system, reference).coordinates(Frames(moved, None))["bonds"]
    bond = (0, 1)
    expected = wasserstein_distance(
        *(system.distances(frames, torch.tensor([bond])).flatten().numpy() for frames in (moved, reference))
    )
    assert found.value == pytest.approx(expected)
    assert found.value == pytest.approx(0.1, abs=2e-3)
    assert (found.exceeded, found.where, found.unit) == (True, "C0-C1", "Å")


def test_bent_angle_is_named():
    atoms = molecule("H2O")
    random = np.random.default_rng(3)
    frames = torch.tensor(atoms.positions + 0.02 * correlated(800, 9, random).reshape(800, 3, 3))
    bent = frames.clone()
    bent[:, 1, 1:] = (bent[:, 1, 1:] - bent[:, 0, 1:]) @ torch.tensor(
        [[np.cos(0.2), -np.sin(0.2)], [np.sin(0.2), np.cos(0.2)]]
    ) + bent[:, 0, 1:]
    found = DistributionTest(System.from_atoms(atoms), frames).coordinates(Frames(bent, None))
    assert set(found) == {"bonds", "angles"}
    assert found["angles"].value == pytest.approx(np.degrees(0.2), rel=0.02)
    assert found["angles"].exceeded
    assert found["angles"].where == "H1-O0-H2"
    assert not found["bonds"].exceeded


@pytest.mark.parametrize("seed", range(4))
def test_halves_of_the_reference_stay_within_its_level(seed):
    atoms, frames = ethane_frames(1600, seed)
    half = len(frames) // 2
    found = DistributionTest(System.from_atoms(atoms), frames[:half]).coordinates(Frames(frames[half:], None))
    assert set(found) == {"bonds", "angles", "dihedrals"}
    assert not any(each.exceeded for each in found.values()), found
    assert all(each.reference_level > 0 for each in found.values())


def test_level_is_exceeded_by_one_block_of_twenty():
    atoms = molecule("N2")
    system = System.from_atoms(atoms)
    random = np.random.default_rng(5)
    exceeded = []
    for _ in range(200):
        lengths = 1.1 + 0.03 * random.normal(size=450)
        frames = torch.zeros(450, 2, 3, dtype=torch.float64)
        frames[:, 1, 0] = torch.tensor(lengths)
        found = DistributionTest(system, frames[:400]).coordinates(Frames(frames[400:], None))
        exceeded.append(found["bonds"].exceeded)
    assert 0.01 < np.mean(exceeded) < 0.11


def test_short_reference_or_simulation_is_not_judged():
    atoms, frames = ethane_frames(60)
    system = System.from_atoms(atoms)
    few = DistributionTest(system, frames[:30]).coordinates(Frames(frames[30:], None))["bonds"]
    assert few.value > 0
    assert (few.reference_level, few.exceeded) == (None, None)
    short = DistributionTest(system, frames).coordinates(Frames(frames[:3], None))["bonds"]
    assert short.exceeded is None
    none = DistributionTest(system, frames).coordinates(Frames(frames[:0], None))["bonds"]
    assert none.value is None


def test_equilibration_and_failed_frames_are_left_out():
    atoms, frames = ethane_frames(400)
    trajectories = simulated(frames)
    spoiled = trajectories.positions.clone()
    spoiled[:10] *= 3.0  # the first 0.1 ps
    spoiled[50:, 2] *= 3.0
    valid = trajectories.valid.clone()
    valid[50:, 2] = False
    test = DistributionTest(System.from_atoms(atoms), frames)
    run = ReplicaTrajectories(**{**vars(trajectories), "positions": spoiled, "valid": valid})
    assert test.compare(run, 1.0, [])["bonds"]["value"] < 0.02
    everything = DistributionTest(System.from_atoms(atoms), frames, equilibration_fraction=0.0)
    assert everything.compare(run, 1.0, [])["bonds"]["value"] > 0.1


def test_radial_distribution_and_cells_of_replicas():
    random = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.arange(3)] * 3), axis=-1).reshape(-1, 3) * 4.0 + 1.0
    atoms = Atoms("Ar27", grid, cell=[12.0] * 3, pbc=True)
    reference = torch.tensor(grid + random.normal(scale=0.1, size=(80, 27, 3)))
    g = RadialDistribution(r_max=5.0)
    system = System.from_atoms(atoms)
    g.bind(system, reference)
    wider = torch.eye(3, dtype=torch.float64) * 12.3
    run = simulated(reference * 12.3 / 12.0, cell=wider)
    found = DistributionTest(system, reference).compare(run, 0.2, [g])["radial_distribution"]
    assert found["value"] == pytest.approx(0.1, rel=0.1)  # the peak at 4 Å is at 4.1 Å
    assert found["exceeded"]
    same = DistributionTest(system, reference).compare(simulated(reference), 0.2, [g])["radial_distribution"]
    assert not same["exceeded"]


def test_power_spectrum_of_another_frequency():
    def oscillation(period_fs, n_frames, n_replicas=1):
        time = 2.0 * torch.arange(n_frames, dtype=torch.float64)[:, None] + 7.0 * torch.arange(n_replicas)
        velocities = torch.zeros(n_frames, n_replicas, 2, 3, dtype=torch.float64)
        velocities[..., 0, 0] = torch.cos(2 * torch.pi * time / period_fs)
        velocities[..., 1, 0] = -velocities[..., 0, 0]
        noise = torch.randn(velocities.shape, generator=torch.Generator().manual_seed(n_frames), dtype=torch.float64)
        return torch.zeros_like(velocities), velocities + 0.1 * noise

    system = System.from_atoms(molecule("N2"))
    trajectory = oscillation(20.0, 4000)  # 1668 per cm
    spectrum = PowerSpectrum(interval_fs=2.0, max_lag_ps=0.4)
    spectrum.bind(system, *trajectory)
    test = DistributionTest(system, trajectory[0][:, 0] + torch.eye(3)[:2].double(), None, trajectory)

    def run(period_fs):
        positions, velocities = oscillation(period_fs, 800, 4)
        return simulated((positions + torch.eye(3)[:2].double()).flatten(0, 1), velocities=velocities)

    shifted = test.compare(run(19.0), 8.0, [], [spectrum])["power_spectrum"]
    moved = 1e15 / 2.99792458e10 * (1 / 19.0 - 1 / 20.0)
    assert shifted["value"] == pytest.approx(moved, rel=0.1)
    assert (shifted["exceeded"], shifted["unit"]) == (True, "1/cm")
    assert not test.compare(run(20.0), 8.0, [], [spectrum])["power_spectrum"]["exceeded"]


def test_report_shows_distances_and_levels():
    from fabricated_report import fabricated

    report, _ = fabricated(control=None)
    angle = {"value": 12.0, "unit": "degrees", "reference_level": 0.8, "exceeded": True, "where": "O2-C4-H6"}
    bond = {"value": 0.004, "unit": "Å", "reference_level": 0.01, "exceeded": False, "where": "C0-C1"}
    report["after"]["observables_w1"] = {"angles": angle, "bonds": bond}
    report["extended"] = None
    html = render(report, [], {})
    assert "Angles, Wasserstein-1 / degrees" in html
    assert "0.004, within 0.01" in html
    assert (
        "Distributions that differ from the reference (Wasserstein-1): angles 12 at O2-C4-H6, above 0.8 degrees."
        in html
    )
    report["after"]["verdict"] = judge(0, 1e6, "bonds").as_dict()
    assert stability(report).startswith("Holds: ")
    assert stability(report).endswith(" But its structure is off the reference: angles.")
    unknown = bond | {"reference_level": None, "exceeded": None}
    assert distribution_distance({"observables_w1": {"bonds": unknown}}, "bonds") == "0.004"


def test_evaluator_refuses_an_equilibration_of_everything():
    with pytest.raises(ValueError, match="equilibration_fraction=1"):
        Evaluator([molecule("CH4")] * 4, equilibration_fraction=1.0)
