"""Published criteria by name: closed answers, and the radial distributions of Fu et al. from numpy's histograms."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.units import kB
from detector_tools import at_rest, bound, water_box

from stable_plugin import BondDeviation, BondLengths, Evaluator, Langevin, ObservableDeviation, StABlEConfig, System
from stable_plugin.cli import _parse, main
from stable_plugin.defaults import find_detector
from stable_plugin.detectors import PUBLISHED, published_detector

SIDE_A = 12.43
N_FRAMES = 10


@pytest.fixture(scope="module")
def water():
    return water_box(n_side=4, side=SIDE_A)


@pytest.fixture(scope="module")
def liquid(water):
    random = np.random.default_rng(0)
    return torch.tensor(water.positions + random.normal(scale=0.1, size=(2 * N_FRAMES, len(water), 3)))


@pytest.fixture(scope="module")
def gas(water):
    return torch.tensor(np.random.default_rng(1).uniform(0, SIDE_A, size=(N_FRAMES, len(water), 3)))


def published_rdf(atoms, frames, pair):
    """Return g(r) with the conventions of Fu et al.: ordered pairs, an atom in its own density, 500 bins up to 6 Å."""
    edges = np.linspace(1e-6, 6.0, 501)
    first, second = (np.array(atoms.symbols) == symbol for symbol in pair)
    counts = np.zeros(500)
    for frame in frames.numpy():
        distances = Atoms(atoms.numbers, frame, cell=atoms.cell, pbc=True).get_all_distances(mic=True)
        counts += np.histogram(distances[first][:, second], edges)[0]
    density = len(frames) * first.sum() * second.sum() / atoms.get_volume()
    return counts / (density * 4.0 / 3.0 * np.pi * np.diff(edges**3))


def looks(detector, frames):
    """Return the value of one replica after each of the frames."""
    return [detector.measure(frame[None], at_rest(frame[None])).item() for frame in frames]


@pytest.mark.parametrize(("name", "interval_fs"), [("mdsim", 100.0), ("stable", 1000.0)])
def test_water_criterion_agrees_with_numpy(water, liquid, gas, name, interval_fs):
    criterion = published_detector(name, System.from_atoms(water), 300.0)
    bound(criterion, water, liquid)
    criterion.set_check_interval(interval_fs)
    for one in criterion.detectors:
        one.reset(1)
        pair = one.observable.pair
        expected = 6.0 * np.abs(published_rdf(water, gas, pair) - published_rdf(water, liquid, pair)).mean()
        values = looks(one, gas)
        assert values[:-1] == [0.0] * (N_FRAMES - 1)
        assert values[-1] == pytest.approx(expected, rel=2e-3)  # their bins start at 1e-6 Å
        assert one.threshold == 3.0


@pytest.mark.parametrize("name", ["mdsim", "stable"])
def test_water_criterion_fires_for_a_gas_of_atoms(water, liquid, gas, name):
    criterion = bound(published_detector(name, System.from_atoms(water), 300.0), water, liquid)
    criterion.set_check_interval(1000.0)
    criterion.reset(2)
    for one, other in zip(gas, liquid[:N_FRAMES], strict=True):
        frames = torch.stack([one, other])
        unstable, _ = criterion.classify(frames, at_rest(frames))
    assert unstable.tolist() == [True, False]


def test_bin_average_does_not_fire_for_a_gas_of_atoms(water, liquid, gas):
    criterion = bound(published_detector("stable", System.from_atoms(water), 300.0), water, liquid)
    for one in criterion.detectors:
        average = ObservableDeviation(one.observable, 3.0, n_samples=N_FRAMES, min_samples=N_FRAMES)
        assert looks(bound(average, water, liquid), gas)[-1] < 3.0


def test_stable_looks_at_consecutive_windows(water, liquid, gas):
    criterion = bound(published_detector("stable", System.from_atoms(water), 300.0), water, liquid).detectors[0]
    sliding = bound(published_detector("mdsim", System.from_atoms(water), 300.0), water, liquid).detectors[0]
    for each in (criterion, sliding):
        each.set_check_interval(1000.0)
    frames = torch.cat([liquid[:N_FRAMES], gas])
    values, sliding_values = looks(criterion, frames), looks(sliding, frames)
    assert len(set(values[N_FRAMES - 1 : -1])) == 1
    assert values[-1] == pytest.approx(sliding_values[-1])
    assert len(set(sliding_values)) == N_FRAMES + 2


def test_stable_is_tighter_in_training(water):
    aspirin, system = molecule("C2H6"), System.from_atoms(water)
    ethane = System.from_atoms(aspirin)
    assert published_detector("stable", ethane, 500.0, training=True).threshold == 0.25
    assert published_detector("stable", ethane, 500.0).threshold == 0.5
    assert str(published_detector("stable", system, 300.0, training=True)) == "IntermolecularContact(distance=1.2)"
    assert published_detector("mdsim", ethane, 500.0, training=True).threshold == 0.5


def test_mdsim_takes_all_atoms_of_a_crystal_alike():
    crystal = bulk("NaCl", "rocksalt", a=5.64, cubic=True) * 3
    detector = published_detector("mdsim", System.from_atoms(crystal), 520.0)
    assert (detector.threshold, detector.n_samples, detector.interval_fs) == (1.0, 80, 12.5)
    bound(detector, crystal)
    edges = np.linspace(1e-6, 6.0, 501)
    counts, _ = np.histogram(crystal.get_all_distances(mic=True), edges)
    expected = counts / (len(crystal) ** 2 / crystal.get_volume() * 4.0 / 3.0 * np.pi * np.diff(edges**3))
    shell = slice(200, 300)  # nearest neighbors at 2.82 Å, the edge of a bin
    found = detector.observable.target.numpy()
    assert found[shell].sum() == pytest.approx(expected[shell].sum(), rel=5e-3)


def test_spice_sees_stretched_bonds_since_the_first_frame():
    atoms = molecule("H2O")
    frames = torch.tensor(np.stack([atoms.positions, 1.3 * atoms.positions]))
    detector = bound(published_detector("spice", System.from_atoms(atoms), 400.0), atoms, frames)
    length = atoms.get_distance(0, 1)
    moved = torch.tensor(
        np.stack([0.2 * atoms.positions, (1 + 0.49 / length) * atoms.positions, 1.6 * atoms.positions])
    )
    assert detector.measure(moved, at_rest(moved)).tolist() == pytest.approx([-0.8 * length, 0.49, 0.6 * length])
    assert detector.classify(moved, at_rest(moved))[0].tolist() == [False, False, True]


def test_mlipaudit_hydrogen_drift_spares_a_transfer():
    atoms = molecule("CH3OH")
    atoms.positions -= atoms.positions[0]
    oxygen, hydrogen = 1, 3  # the hydrogen atom of the hydroxyl group
    assert atoms.get_distance(oxygen, hydrogen) < 1.1
    detector = bound(published_detector("mlipaudit", System.from_atoms(atoms), 300.0), atoms)
    direction = (atoms.positions[oxygen] - atoms.positions[0]) / atoms.get_distance(0, oxygen)
    frames = torch.tensor(atoms.positions).repeat(3, 1, 1)
    for frame, distance in zip(frames, (2.4, 2.6), strict=False):
        frame[hydrogen] = torch.tensor(atoms.positions[oxygen] + distance * direction)
    frames[2, hydrogen] = torch.tensor(atoms.positions[0] - 1.2 * direction)  # moved to the carbon atom
    assert detector.classify(frames, at_rest(frames))[0].tolist() == [False, True, False]
    assert detector.offending_atoms(frames, at_rest(frames))[1] == (hydrogen,)


def test_mlipaudit_leaves_out_hydrogen_of_water(water):
    detector = published_detector("mlipaudit", System.from_atoms(water), 300.0)
    assert [type(each).__name__ for each in detector.detectors] == ["TemperatureExplosion"]


def test_mlipaudit_sees_an_explosion_of_the_temperature():
    atoms = molecule("CH4")
    explosion = bound(published_detector("mlipaudit", System.from_atoms(atoms), 300.0), atoms).detectors[0]
    explosion.set_check_interval(50.0)
    positions = torch.tensor(atoms.positions).repeat(3, 1, 1)
    masses = torch.tensor(atoms.get_masses())[None, :, None]

    def flags(*temperatures):
        velocities = (kB * torch.tensor(temperatures)[:, None, None] / masses).sqrt().expand_as(positions)
        return explosion.classify(positions, velocities)[0].tolist()

    explosion.reset(3)
    assert flags(1e6, 1e6, 1e6) == [False] * 3  # looks every 100 fs, so at every second check
    assert flags(10.0, 300.0, 10_299.0) == [False] * 3
    assert flags(1e6, 1e6, 1e6) == [False] * 3
    assert flags(1001.0, 10_301.0, 10_299.0) == [True, True, False]
    state = explosion.state_dict()
    assert flags(1.0, 1.0, 1.0) == [True, True, False]
    explosion.load_state_dict(state)
    assert explosion.state_dict()["n_checks"] == 4


def test_published_detector_refuses_other_systems_and_names(water):
    crystal = System.from_atoms(bulk("Cu", cubic=True) * 3)
    with pytest.raises(ValueError, match="detector='stable' was not published for a system like System"):
        published_detector("stable", crystal, 300.0)
    with pytest.raises(ValueError, match="detector='mdsim' was not published"):
        published_detector("mdsim", System.from_atoms(Atoms("Ar2", [[0, 0, 0], [0, 0, 3.8]])), 300.0)
    with pytest.raises(ValueError, match="detector='mdism' is not a published criterion: pass one of mdsim, stable"):
        StABlEConfig(detector="mdism")
    with pytest.raises(ValueError, match="detector=3 is of type int"):
        StABlEConfig(detector=3)


def test_settings_and_evaluator_take_names():
    atoms = molecule("CH4")
    reference = torch.tensor(atoms.positions)[None]
    system = System.from_atoms(atoms)
    config = StABlEConfig(detector="stable")
    assert find_detector(config.detector, system, reference, Langevin(300.0), training=True).threshold == 0.25
    frames = [atoms.copy() for _ in range(4)]
    assert isinstance(Evaluator(frames, detector="stable").detector, BondDeviation)
    assert Evaluator(frames, detector="stable").detector.threshold == 0.5
    assert "drift" in repr(Evaluator(frames, detector="mlipaudit").detector).lower()


def test_evaluator_refuses_horizons_below_the_averaging_time(water, liquid):
    frames = []
    for positions in liquid[:4]:
        frames.append(water.copy())
        frames[-1].positions = positions.numpy()
    with pytest.raises(ValueError, match=r"horizons_ps=\(1.0,\) are shorter than the 10 ps"):
        Evaluator(frames, detector="stable")


def test_observable_deviation_samples_in_time():
    atoms = molecule("N2")
    detector = ObservableDeviation(BondLengths(), threshold=1.0, n_samples=3, min_samples=2, interval_fs=20.0)
    assert detector.averaging_fs == 40.0
    bound(detector, atoms)
    detector.set_check_interval(5.0)
    stretched = 2.0 * torch.tensor(atoms.positions)[None]
    values = [detector.measure(stretched, at_rest(stretched)).item() for _ in range(12)]
    assert values == pytest.approx([0.0] * 7 + [atoms.get_distance(0, 1)] * 5)
    assert len(detector.state_dict()["samples"]) == 3


def test_observable_deviation_integral_needs_a_curve():
    with pytest.raises(ValueError, match="norm='integral' needs a curve, but bond_lengths"):
        bound(ObservableDeviation(BondLengths(), norm="integral"), molecule("N2"))
    with pytest.raises(ValueError, match="norm='max' is not a norm"):
        ObservableDeviation(BondLengths(), norm="max")


def test_command_line_takes_published_names(capsys):
    for name in PUBLISHED:
        assert _parse(["evaluate", "model", "starts", "--detector", name]).detector == name
    assert main(["evaluate", "model", "starts", "--detector", "spice", "--threshold", "0.5"]) == 1
    assert "--threshold=0.5 and --detector=spice exclude each other" in capsys.readouterr().err
