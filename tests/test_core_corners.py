"""What the other tests of the core pass by: axes, refusals, files, and combinations."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from torch import nn
from toys import tiny_mace, triatomic

from stable_plugin import (
    AngleDistribution,
    AnyOf,
    BondAmplitudes,
    BondDeviation,
    BondLengths,
    DiffusionCoefficient,
    DistanceDistribution,
    LindemannCriterion,
    LocalBondAmplitudes,
    LocalBondLengths,
    LocalContactAmplitudes,
    LocalContacts,
    MeanSquaredDisplacement,
    Molecules,
    ObservableDeviation,
    PowerSpectrum,
    RadialDistribution,
    System,
    VelocityAutocorrelation,
)
from stable_plugin.algorithm.estimator import BoltzmannEstimator
from stable_plugin.algorithm.training_loop import Progress
from stable_plugin.algorithm.window_data import WindowEstimator
from stable_plugin.integrations import progress as progress_line
from stable_plugin.integrations.structures import training_structures
from stable_plugin.md.system import stack_positions
from stable_plugin.models import ModulePotential, find_potential, load_potential
from stable_plugin.observables import trajectory_of
from stable_plugin.runtime import allocator as memory

SIDE = 9.0


def liquid():
    """Eight water molecules in a box."""
    box = Atoms(cell=[SIDE] * 3, pbc=True)
    for corner in np.ndindex(2, 2, 2):
        one = molecule("H2O")
        one.translate(np.array(corner) * SIDE / 2 + 1.0)
        box += one
    return box


def jiggled(atoms, n_frames, seed=0):
    noise = np.random.default_rng(seed).normal(scale=0.05, size=(n_frames, len(atoms), 3))
    return torch.tensor(atoms.positions + noise)


WATER, LIQUID = molecule("H2O"), liquid()


@pytest.mark.parametrize(
    ("observable", "atoms"),
    [
        (BondLengths(), WATER),
        (BondAmplitudes(), WATER),
        (AngleDistribution(), WATER),
        (DistanceDistribution(), WATER),
        (LocalBondLengths(), LIQUID),
        (LocalBondAmplitudes(), LIQUID),
        (LocalContacts(), LIQUID),
        (LocalContactAmplitudes(), LIQUID),
        (RadialDistribution(), LIQUID),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_observable_has_a_place_on_its_axis_for_every_value(observable, atoms):
    observable.bind(System.from_atoms(atoms), jiggled(atoms, 5))
    axis = observable.axis()
    assert observable.per_frame(jiggled(atoms, 3, seed=1)).shape == (3, len(axis["x"]))
    assert axis["kind"] in ("curve", "bars")
    assert axis["xlabel"] and axis["ylabel"]


@pytest.mark.parametrize(
    "make",
    [VelocityAutocorrelation, PowerSpectrum, MeanSquaredDisplacement, DiffusionCoefficient],
    ids=lambda c: c.__name__,
)
@pytest.mark.parametrize("symbols", [None, ["O"]])
def test_a_correlation_has_a_place_on_its_axis_for_every_value(make, symbols):
    observable = make(interval_fs=10.0, max_lag_ps=0.04, symbols=symbols)
    positions = torch.stack([jiggled(LIQUID, 2, seed) for seed in range(9)])
    observable.bind(System.from_atoms(LIQUID), positions, positions)
    observable.update(positions, positions)
    axis = observable.axis()
    found = observable.compute()
    assert len(axis["x"]) == found.numel()
    assert observable.mean_absolute_error() == pytest.approx(0.0, abs=1e-12), "the target is this trajectory"
    assert torch.isfinite(observable.standard_error()).all()
    short = make(interval_fs=10.0, max_lag_ps=0.04)
    short.bind(System.from_atoms(LIQUID), positions, positions)
    short.update(positions[:6, :1], positions[:6, :1])
    assert torch.isnan(short.standard_error()).all(), "no two stretches of the longest lag"


def test_amplitudes_are_squares_of_what_lengths_are_off_the_mean_of_the_reference():
    reference, positions = jiggled(WATER, 6), jiggled(WATER, 4, seed=1)
    observable = BondAmplitudes()
    system = System.from_atoms(WATER)
    observable.bind(system, reference)
    lengths, mean = (
        np.linalg.norm(frames[:, system.bonds[:, 0]] - frames[:, system.bonds[:, 1]], axis=-1)
        for frames in (positions.numpy(), reference.numpy())
    )
    np.testing.assert_allclose(observable.per_frame(positions).numpy(), (lengths - mean.mean(axis=0)) ** 2, rtol=1e-12)


def test_observables_that_are_bound_to_nothing_say_so():
    with pytest.raises(RuntimeError, match=r"LocalContacts has no system yet: call bind\(system, reference\) first\."):
        LocalContacts().per_site(jiggled(LIQUID, 2), torch.zeros(24, dtype=torch.long))
    with pytest.raises(RuntimeError, match=r"MeanSquaredDisplacement has no target yet: call bind\("):
        MeanSquaredDisplacement(interval_fs=10.0, max_lag_ps=0.04).known_target  # noqa: B018
    with pytest.raises(ValueError, match=r"LocalBondLengths finds no bonds: give System\.from_atoms\(\.\.\., bonds="):
        LocalBondLengths().bind(System.from_atoms(LIQUID, bonds=[]), jiggled(LIQUID, 2))


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (
            lambda: LindemannCriterion(threshold=1.0).measure(jiggled(WATER, 2), jiggled(WATER, 2)),
            RuntimeError,
            r"LindemannCriterion has no reference yet: call bind\(system, reference\) first",
        ),
        (lambda: Molecules().system, RuntimeError, r"Molecules has no system yet: call bind\(system\) first"),
        (
            lambda: LocalBondLengths().per_site(jiggled(LIQUID, 2), torch.zeros(24, dtype=torch.long)),
            RuntimeError,
            r"LocalBondLengths has no system yet",
        ),
        (
            lambda: DistanceDistribution().bind(System.from_atoms(LIQUID), jiggled(LIQUID, 2)),
            ValueError,
            r"DistanceDistribution counts each pair of atoms once.*use it for molecules\.",
        ),
        (lambda: trajectory_of([]), ValueError, r"frames is empty: give at least one structure"),
        (lambda: trajectory_of([WATER, molecule("CO2")]), ValueError, r"frames\[1\] is CO2, not H2O"),
        (
            lambda: ModulePotential(nn.Linear(3, 3).double(), System.from_atoms(WATER)).energies_and_forces(
                jiggled(WATER, 2), None
            ),
            ValueError,
            r"Linear returned energies of shape \(2, 3, 3\) for positions of shape \(2, 3, 3\): return \(n_replicas,\)",
        ),
    ],
)
def test_what_cannot_be_answered_is_refused(ask, error, message):
    with pytest.raises(error, match=message):
        ask()


def test_a_charge_and_a_spin_are_taken_where_a_system_states_none():
    charged = WATER.copy()
    charged.info["charge"] = 1
    neutral, stated = System.from_atoms(WATER).with_electrons(0, 1), System.from_atoms(charged).with_electrons(0, 2)
    assert (neutral.charge, neutral.spin) == (0, 1)
    assert (stated.charge, stated.spin) == (1, 2)


def test_several_detectors_remember_together_and_each_is_asked_about_the_reference():
    system, frames = System.from_atoms(WATER), jiggled(WATER, 6)
    looking_back = ObservableDeviation(BondLengths(), threshold=0.2, looks=3)
    both = AnyOf([BondDeviation(threshold=0.5), looking_back])
    both.bind(system, frames)
    both.begin(2)
    moving = torch.zeros(2, 3, 3, dtype=torch.float64)
    both.classify(frames[:2], moving)
    memory = both.memory()
    expected = [tensor.clone() for tensor in both.classify(3.0 * frames[2:4], moving)]
    both.load_state_dict(memory)
    again = both.classify(3.0 * frames[2:4], moving)
    assert all(torch.equal(mine, other) for mine, other in zip(again, expected, strict=True))
    assert expected[0].all()
    both.check_reference(frames)
    with pytest.raises(ValueError, match="reference"):
        both.check_reference(torch.cat([frames, 3.0 * frames]))


class Nameless(nn.Module):
    """Says itself what its potential is."""

    def __init__(self, potential):
        super().__init__()
        self.potential = potential

    def stable_potential(self, system):
        return self.potential, system


def test_a_potential_is_found_where_a_module_says_or_where_a_family_is_known():
    system, springs = System.from_atoms(WATER), triatomic(1.0)
    assert find_potential(Nameless(springs), system) == (springs, system)
    with pytest.raises(
        TypeError, match=r"no potential found in Linear: it contains no model of a known family \(.*MACE.*\)\. Add a"
    ):
        find_potential(nn.Linear(2, 2), system)
    model = tiny_mace(WATER.numbers)
    found = find_potential(nn.Sequential(nn.Identity(), model), system)
    assert type(found).__name__ == "MACEPotential"
    assert found.module is model


def test_a_potential_that_is_no_file_and_no_name_is_refused(tmp_path):
    pytest.importorskip("mace")
    with pytest.raises((FileNotFoundError, ValueError), match=r"nothing\.model"):
        load_potential(tmp_path / "nothing.model")


def site_sampler(even_sampling=None, local=True):
    atoms = liquid()
    system = System.from_atoms(atoms)

    class Ideal(nn.Module):
        def __init__(self):
            super().__init__()
            self.k = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

        def forward(self, positions):
            return self.k * positions.square().sum(dim=-1)

    observable = LocalBondLengths()
    observable.bind(system, jiggled(atoms, 6))
    estimator = BoltzmannEstimator(ModulePotential(Ideal(), system), 300.0)
    return WindowEstimator(estimator, [observable], local=Molecules() if local else None, even_sampling=even_sampling)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"even_sampling": (4, 2), "local": False}, r"even_sampling=\(4, 2\) needs the local estimator: give local="),
        ({"even_sampling": 4}, r"even_sampling=4 is not two numbers"),
        (
            {"even_sampling": (4,)},
            r"even_sampling=\(4,\) is not two numbers: give \(bins, samples per bin and replica\)",
        ),
        ({"even_sampling": (0, 2)}, r"even_sampling=0 is out of range"),
    ],
)
def test_even_sampling_out_of_range_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        site_sampler(**settings)


def test_even_sampling_takes_rare_sites_as_often_as_usual_ones():
    frames = jiggled(liquid(), 10, seed=3)
    frames[4, 0] += torch.tensor([0.8, 0.0, 0.0])  # one molecule of eighty is broken
    drawn, all_of_them = (
        site_sampler(even).sample(frames, 1, torch.Generator().manual_seed(0)) for even in ((2, 3), None)
    )
    (part,), (whole,) = drawn.parts, all_of_them.parts
    assert len(whole.chosen) == 80
    assert len(part.chosen) < 10
    broken = 4 * 8
    assert broken in part.chosen.tolist(), "alone in its bin"
    # The energy of a site is that of its molecule, k Σ r².
    for site, energy in zip(part.chosen.tolist(), part.energies.tolist(), strict=True):
        frame, of = divmod(site, 8)
        assert energy == pytest.approx(frames[frame, 3 * of : 3 * of + 3].square().sum().item(), rel=1e-12)


def test_frames_of_nothing_or_of_another_state_are_refused():
    system = System.from_atoms(WATER)
    with pytest.raises(ValueError, match=r"reference holds no frame"):
        stack_positions([], system, "reference")
    charged, other = WATER.copy(), WATER.copy()
    charged.info["charge"], other.info["charge"] = 1, 0
    with pytest.raises(ValueError, match=r"reference\[1\] has charge=0, but the simulated system has charge=1"):
        stack_positions([charged, other], System.from_atoms(charged), "reference")
    torn = WATER.copy()
    torn.positions[0, 0] = np.nan
    with pytest.raises(ValueError, match=r"reference\[0\] has non-finite positions"):
        stack_positions([torn], system, "reference")
    fractional = WATER.copy()
    fractional.info["charge"] = 0.5
    with pytest.raises(ValueError, match=r"atoms\.info\['charge'\]=0\.5: give a whole number"):
        System.from_atoms(fractional)


class Bar:
    """Takes down what is shown."""

    shown, made = [], []

    def __init__(self, **settings):
        self.n, self.closed, self.words = 0.0, False, ""
        Bar.made.append(self)
        self.settings = settings

    def set_description_str(self, words, refresh):
        self.words = words

    def refresh(self):
        Bar.shown.append((self.words, self.n))

    def close(self):
        self.closed = True


def test_the_progress_line_tells_what_is_known_and_begins_anew_with_each_window(monkeypatch):
    monkeypatch.setattr(progress_line, "tqdm", Bar)
    monkeypatch.setattr(Bar, "shown", [])
    monkeypatch.setattr(Bar, "made", [])
    loop = SimpleNamespace(n_steps=800, simulator=SimpleNamespace(integrator=SimpleNamespace(timestep_fs=0.5)))
    steps = [
        Progress("simulate", 0.1, 1.1, None, None, None),
        Progress("simulate", 0.2, 1.2, 0.25, None, None),
        Progress("learn", 0.05, 1.25, 0.5, 0.00123, 0.875),
    ]
    silent, line = (progress_line.ProgressLine(loop, enabled) for enabled in (False, True))
    for step in steps:
        silent.show(step)
    silent.close()
    assert Bar.made == []
    for step in steps:
        line.show(step)
    assert Bar.shown == [
        ("StABlE simulate · 1.10 ps", 0.1),
        ("StABlE simulate · 1.20 ps · unstable 25%", 0.2),
        ("StABlE learn · 1.25 ps · unstable 50% · loss 1.23e-03 · ESS 0.88", 0.05),
    ]
    assert [bar.settings["total"] for bar in Bar.made] == [0.4, 0.4]
    assert [bar.closed for bar in Bar.made] == [True, False]
    line.close()
    assert Bar.made[-1].closed


def test_structures_are_found_in_what_a_trainer_trains_on():
    def loader(items):
        return SimpleNamespace(dataset=items)

    plain, asked = nn.Linear(1, 1), nn.Linear(1, 1)
    asked.stable_structures = lambda of: (atoms for atoms in [of])
    assert training_structures(asked, WATER) == [WATER]
    assert training_structures(plain, loader([WATER, LIQUID])) == [WATER, LIQUID]
    graphs = [SimpleNamespace(to_ase_single=lambda: WATER)]
    assert training_structures(plain, loader(graphs)) == [WATER]
    for nothing in (loader([]), loader([1, 2]), loader([WATER, 2]), SimpleNamespace()):
        with pytest.raises(
            TypeError, match=r"no structures found in the training data \(SimpleNamespace of .*structures="
        ):
            training_structures(plain, nothing)


def test_graphs_of_mace_are_structures_in_boxes_or_not():
    model = nn.Module()
    model.atomic_energies_fn, model.atomic_numbers = nn.Identity(), torch.tensor([1, 8])
    species = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    positions, cell = torch.tensor(WATER.positions), 7.0 * torch.eye(3, dtype=torch.float64)
    for pbc in (None, torch.tensor([[False] * 3]), torch.tensor([[True, True, False]])):
        graph = SimpleNamespace(node_attrs=species, positions=positions, cell=cell, pbc=pbc)
        (atoms,) = training_structures(nn.Sequential(model), SimpleNamespace(dataset=[graph]))
        assert atoms.symbols.get_chemical_formula(mode="reduce") == "OH2"
        np.testing.assert_array_equal(atoms.positions, WATER.positions)
        periodic = pbc is not None and bool(pbc.any())
        assert atoms.pbc.tolist() == ([True, True, False] if periodic else [False] * 3)
        np.testing.assert_array_equal(atoms.cell.array, cell.numpy() if periodic else np.zeros((3, 3)))


@pytest.mark.parametrize(("platform", "library"), [("darwin", {}), ("linux", {}), ("linux", {"mallopt": None})])
def test_memory_is_kept_where_the_c_library_can(platform, library, monkeypatch):
    told = []
    if "mallopt" in library:
        library = {"mallopt": lambda *setting: told.append(setting)}
    monkeypatch.setattr(memory.sys, "platform", platform)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: SimpleNamespace(**library))
    memory.keep_freed_memory()
    assert told == ([(-3, 32 << 20), (-1, 1 << 30)] if library else [])
