"""One potential trained on several systems."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.constraints import FixAtoms
from springs import observable_gradient
from torch import nn

from stable_plugin import BondDeviation, BondLengths, Langevin, Schedule, StABlEConfig, System
from stable_plugin.algorithm.replica_pool import UnusablePotentialError
from stable_plugin.algorithm.systems_loop import SystemsLoop
from stable_plugin.config import SystemConfig
from stable_plugin.integrations.build import build_training_loop, single_systems, validate
from stable_plugin.models import ModulePotential


class SharedSpring(nn.Module):
    """Bonds of 1 Å with one stiffness, in molecules of any size."""

    def __init__(self, stiffness=2.0):
        super().__init__()
        self.k = nn.Parameter(torch.tensor(stiffness, dtype=torch.float64))

    def stable_potential(self, system):
        return ModulePotential(_Bonds(self, system), system)


class _Bonds(nn.Module):
    def __init__(self, shared, system):
        super().__init__()
        self.shared, self.pairs = shared, system.bonds

    def forward(self, positions):
        first, second = self.pairs.unbind(1)
        lengths = (positions[:, first] - positions[:, second]).norm(dim=-1)
        return 0.5 * self.shared.k * (lengths - 1.0).square().sum(-1)


def chains(symbols, n_frames=3, spread=0.02):
    """Return frames of a chain of atoms 1 Å apart."""
    rng = np.random.default_rng(len(symbols))
    positions = np.arange(len(symbols))[:, None] * np.array([1.0, 0.0, 0.0])
    return [Atoms(symbols, positions + rng.normal(scale=spread, size=positions.shape)) for _ in range(n_frames)]


def settings(**changes):
    values = {
        "objective": "boltzmann",
        "n_replicas": 4,
        "window_ps": 0.02,
        "record_every_fs": 5.0,
        "integrator": Langevin(300.0, 0.5, 10.0),
        "detector": BondDeviation(0.3),
        "observables": BondLengths(),
        "schedule": Schedule(max_failures_per_ns=30_000.0, max_windows=4),
    }
    return StABlEConfig(**{**values, **changes})


OH, WATER = chains("OH"), chains("HOH")


def system(frames, **changes):
    values = {"integrator": Langevin(300.0, 0.5, 10.0), "detector": BondDeviation(0.3), "observables": BondLengths()}
    return SystemConfig(structures=frames, **{**values, **changes})


def several(**changes):
    plain = {"detector": None, "observables": None, "integrator": Langevin()}
    return settings(**{**plain, "systems": [system(OH), system(WATER, weight=3.0)], **changes})


def test_loop_of_one_composition_is_that_of_one_system():
    loop = build_training_loop(settings(structures=OH), SharedSpring(), None)
    assert not isinstance(loop, SystemsLoop)
    assert {record.system for record in loop.windows} == set()


def test_loop_takes_a_system_for_each_composition(caplog):
    caplog.set_level("INFO", "stable_plugin")
    config = settings(structures=[*WATER, Atoms("He"), *OH, chains("FH", 1)[0]])
    loop = build_training_loop(config, SharedSpring(), None)
    assert list(loop.loops) == ["H2O", "HO"]
    assert "simulated: H2O (3 frames), HO (3 frames); left out" in caplog.text
    assert "He, HF" in caplog.text
    detectors = [each.simulator.detector for each in loop.loops.values()]
    assert detectors[0] is not detectors[1]
    limited = build_training_loop(settings(structures=[*OH, *WATER], max_systems=1), SharedSpring(), None)
    assert limited.potential.system.n_atoms == 2


def test_loop_refuses_single_frames_of_each_composition():
    with pytest.raises(ValueError, match=r"2 systems \(H2O, HO\), none with 2 reference frames.*pass structures="):
        validate(settings(structures=[WATER[0], OH[0]]))
    with pytest.raises(ValueError, match=r"bonds= belongs to one composition.*pass systems="):
        validate(settings(structures=[*OH, *WATER], bonds=[(0, 1)]))


def charged(frames, charge):
    copies = [frame.copy() for frame in frames]
    for frame in copies:
        frame.info["charge"] = charge
    return copies


def test_loop_takes_a_system_for_each_charge(caplog):
    caplog.set_level("INFO", "stable_plugin")
    structures = [*charged(WATER, -1), *charged(WATER[:2], 1)]
    loop = build_training_loop(settings(structures=structures, bonds=[(0, 1), (1, 2)]), SharedSpring(), None)
    assert {name: each.potential.system.charge for name, each in loop.loops.items()} == {
        "H2O_charge-1": -1,
        "H2O_charge1": 1,
    }
    assert "simulated: H2O_charge-1 (3 frames), H2O_charge1 (2 frames)" in caplog.text
    loop.simulation_phase()
    assert {record.system for record in loop.windows} == set(loop.loops)


def test_frames_without_a_charge_among_charged_ones_are_refused():
    structures = [*charged(WATER, -1), *charged(WATER, 1), *WATER]
    with pytest.raises(ValueError, match=r"has charge=-1, but structures\[6\] states none: set atoms.info\['charge'\]"):
        validate(settings(structures=structures))


def test_loop_takes_a_system_for_each_set_of_fixed_atoms():
    held = [frame.copy() for frame in WATER]
    for frame in held:
        frame.set_constraint(FixAtoms([0]))
    # The reference states no constraint.
    loop = build_training_loop(settings(structures=[*WATER, *held], reference=WATER * 2), SharedSpring(), None)
    fixed = {name: each.potential.system.fixed for name, each in loop.loops.items()}
    assert list(fixed) == ["H2O_fixed0", "H2O_fixed1"]
    assert fixed["H2O_fixed0"] is None
    assert fixed["H2O_fixed1"].tolist() == [True, False, False]


def test_reference_frames_of_no_system_are_told(caplog):
    caplog.set_level("INFO", "stable_plugin")
    build_training_loop(settings(structures=WATER, reference=[*WATER, *OH]), SharedSpring(), None)
    assert "3 of 6 reference frames are of no system that is simulated" in caplog.text


def test_single_system_has_no_name():
    for config in (settings(structures=[*WATER, OH[0]]), several(systems=[system(OH, name="one")])):
        loop = build_training_loop(config, SharedSpring(), None)
        loop.simulation_phase()
        assert {record.system for record in loop.windows} == {""}


def test_reference_frames_go_to_their_composition():
    singles = single_systems(settings(structures=[OH[0], WATER[0]], reference=[*WATER, *OH, *OH]))
    assert {single.name: len(single.reference) for single in singles} == {"HO": 6, "H2O": 3}
    assert len({single.seed for single in singles}) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"systems": []}, r"systems=\[\] is not a list of systems: pass instances of SystemConfig"),
        ({"systems": [OH]}, r"systems\[0\]=.*pass an instance of SystemConfig or an instance of Mapping"),
        ({"structures": OH}, r"systems= and structures= were both passed: set structures in each of the systems"),
        ({"systems": [SystemConfig()]}, r"systems\[0\]\.structures=None: pass start frames"),
        (
            {"systems": [system(OH, integrator=Langevin(300.0, 0.7))]},
            r"systems\[0\]: window_ps=0\.02 ps is not a whole number",
        ),
        (
            {"systems": [system(OH), {"structures": OH, "weights": 2.0}]},
            r"systems\[1\]\.weights=2\.0 is not a.*mean weight\?",
        ),
        (
            {"systems": [{"structures": OH, "temperature_K": 300}]},
            r"systems\[0\]\.temperature_K=300 is not a.*use one of name",
        ),
        ({"systems": [{"structures": OH, "weight": -1.0}]}, r"systems\[0\]\.weight=-1\.0 is out of range"),
        ({"systems": [{"structures": OH, "integrator": 300}]}, r"systems\[0\]\.integrator=300 is of type int: pass"),
        ({"systems": [{"weight": 2.0}]}, r"systems\[0\]\.structures=None: pass start frames"),
    ],
)
def test_config_rejects_systems(changes, message):
    with pytest.raises(ValueError, match=message):
        several(**changes)


def test_systems_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"systems have the names \['HO', 'HO'\]: set a different name"):
        validate(several(systems=[system(OH), system(OH)]))


def test_gradient_is_the_weighted_average():
    # A soft spring fails with both systems.
    config = several(schedule=Schedule(max_failures_per_ns=10_000.0, max_windows=4))
    loop = build_training_loop(config, SharedSpring(0.2), None)
    alone = []
    for single in single_systems(config):
        alone.append(observable_gradient(build_training_loop(single, SharedSpring(0.2), None)))
    estimate = observable_gradient(loop)
    expected = [0.25 * one + 0.75 * other for one, other in zip(*(each.gradients for each in alone), strict=True)]
    torch.testing.assert_close(estimate.gradients, expected, rtol=1e-12, atol=0.0)
    assert estimate.loss == pytest.approx(0.25 * alone[0].loss + 0.75 * alone[1].loss)
    assert estimate.ess_fraction == min(each.ess_fraction for each in alone)
    assert {record.system for record in loop.windows} == {"HO", "H2O"}
    assert loop.windows[-1].system == "H2O"
    assert loop.is_new_window


def test_stable_system_is_simulated_again_with_the_final_weights():
    # A stiff spring holds the first system; the second never learns within its windows.
    config = several(
        systems=[system(OH, detector=BondDeviation(5.0, None)), system(WATER, detector=BondDeviation(0.08, None))],
        schedule=Schedule(max_failures_per_ns=30_000.0, max_windows=2),
    )
    loop = build_training_loop(config, SharedSpring(2.0), None)
    n_gradients = 0
    while (estimate := observable_gradient(loop)) is not None:
        n_gradients += 1
        assert loop.phase == "learn" or n_gradients > 0
        with torch.no_grad():
            for parameter, gradient in zip(loop.potential.trainable_parameters(), estimate.gradients, strict=True):
                parameter -= 0.01 * gradient.sign()
    assert loop.phase == "done"
    order = [record.system for record in loop.windows]
    assert n_gradients > 0
    # A probe and two windows of 4 * 0.02 ps show 30,000 per ns; the second verification, with less error, takes three.
    assert order[:3] == ["HO"] * 3
    assert order[-4:] == ["HO"] * 4
    assert order.count("HO") == 7
    assert [each.system for each in loop.verifications() if not each.is_verified] == ["H2O"]
    (failing,) = (each for each in loop.verifications() if each.system == "H2O")
    assert failing.bound_per_ns is not None, "the other system was only verified since"


def test_loop_resumes_bit_for_bit():
    def steps(loop, n):
        gradients = []
        for _ in range(n):
            estimate = observable_gradient(loop)
            gradients.append(estimate.gradients[0].clone())
            with torch.no_grad():
                loop.potential.trainable_parameters()[0].sub_(0.05 * estimate.gradients[0].sign())
        return gradients

    module = SharedSpring(0.2)
    loop = build_training_loop(several(), module, None)
    steps(loop, 3)
    state, weights = loop.state_dict(), {name: each.clone() for name, each in module.state_dict().items()}
    expected = steps(loop, 4)
    other = SharedSpring(0.2)
    other.load_state_dict(weights)
    resumed = build_training_loop(several(), other, None)
    resumed.load_state_dict(state)
    assert [record.system for record in resumed.windows] == state["order"]
    torch.testing.assert_close(steps(resumed, 4), expected, rtol=0.0, atol=0.0)
    with pytest.raises(ValueError, match=r"checkpoint is of the systems \['H2O', 'HO'\], this run has"):
        build_training_loop(several(systems=[system(OH), system(chains("FH"))]), other, None).load_state_dict(state)


def test_loop_interrupted_in_a_later_system_resumes_bit_for_bit():
    def loop_of(module):
        # The second system simulates for a while before it learns.
        slow = system(WATER, detector=BondDeviation(0.12, None))
        return build_training_loop(
            several(systems=[system(OH, detector=BondDeviation(0.05, None)), slow]), module, None
        )

    def step(loop):
        estimate = observable_gradient(loop)
        with torch.no_grad():
            loop.potential.trainable_parameters()[0].sub_(0.02 * estimate.gradients[0].sign())
        return estimate.gradients[0]

    expected = loop_of(SharedSpring(1.0))
    gradients = [step(expected) for _ in range(3)]
    module = SharedSpring(1.0)
    loop = loop_of(module)
    seen = []

    def stop(progress):
        seen.append(progress.system)
        if progress.system == "H2O":
            raise KeyboardInterrupt

    loop.on_progress = stop
    with pytest.raises(KeyboardInterrupt):
        step(loop)
    assert "HO" in seen
    state = loop.state_dict()
    assert list(state["estimates"]) == ["HO"]
    resumed = loop_of(module)
    resumed.load_state_dict(state)
    torch.testing.assert_close([step(resumed) for _ in range(3)], gradients, rtol=0.0, atol=0.0)


def test_checkpoints_of_one_and_of_several_systems_are_told_apart():
    one, two = (
        build_training_loop(settings(structures=OH), SharedSpring(), None),
        build_training_loop(several(), SharedSpring(), None),
    )
    with pytest.raises(ValueError, match=r"checkpoint is of the systems \['H2O', 'HO'\], this run has one"):
        one.load_state_dict(two.state_dict())
    with pytest.raises(ValueError, match=r"checkpoint is of one system, this run has the systems"):
        two.load_state_dict(one.state_dict())


def test_system_of_an_unusable_potential_is_named():
    config = several(systems=[system(OH), system(WATER, detector=BondDeviation(0.06, 0.06))])
    loop = build_training_loop(config, SharedSpring(-5.0), None)
    with pytest.raises(UnusablePotentialError, match=r"H2O: all 4 replicas failed"):
        for _ in range(20):
            observable_gradient(loop)


def test_systems_have_their_own_temperature():
    hot = system(WATER, integrator=Langevin(600.0, 0.5, 10.0))
    loop = build_training_loop(several(systems=[system(OH), hot]), SharedSpring(), None)
    assert [each.simulator.integrator.temperature_K for each in loop.loops.values()] == [300.0, 600.0]
    assert System.from_atoms(WATER[0]).n_atoms == loop.loops["H2O"].potential.system.n_atoms


def test_charges_that_are_not_whole_are_refused():
    with pytest.raises(ValueError, match=r"structures have atoms.info\['charge'\]=0\.25: set a whole number"):
        validate(settings(structures=[*charged(WATER, 0.25), *charged(WATER, 0.5)]))
