"""Defaults for liquids, crystals and metals, and the training loop with a MACE model."""

import io
import logging

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from detector_tools import water_box
from springs import observable_gradient
from toys import flat, tiny_mace

from stable_plugin import (
    AngleLimits,
    AnyOf,
    AtomsWithin,
    BondAmplitudes,
    BondDeviation,
    BondLengths,
    BondLimits,
    ChiralityLimits,
    ContactLimits,
    Langevin,
    LindemannCriterion,
    LocalBondAmplitudes,
    LocalBondLengths,
    LocalContacts,
    Molecules,
    MomentumLimits,
    NearestMolecules,
    RunawayTemperature,
    Schedule,
    StABlECallback,
    System,
    TemperatureLimits,
)
from stable_plugin.config import SystemConfig
from stable_plugin.defaults import choose, default_detector, default_local, default_observables, has_several_molecules
from stable_plugin.integrations.build import build_training_loop
from stable_plugin.observables import RadialDistribution


def thermal(atoms, n_frames=6, scale=0.03, seed=1):
    """Return copies with random displacements."""
    frames = [atoms.copy() for _ in range(n_frames)]
    for index, frame in enumerate(frames):
        frame.rattle(scale, seed=seed + index)
    return frames


class Holder(torch.nn.Module):
    """A user's module around a MACE model."""

    def __init__(self, numbers):
        super().__init__()
        self.model = tiny_mace(numbers)


def build_loop(frames, **arguments):
    """Return the training loop that a callback with these arguments builds."""
    settings = {
        "objective": "boltzmann",
        "structures": frames,
        "n_replicas": 2,
        "window_ps": 0.01,
        "record_every_fs": 2.5,
        "check_every_fs": 2.5,
        "schedule": Schedule(max_failures_per_ns=30_000.0, max_windows=5),
    }
    callback = StABlECallback(**{**settings, **arguments})
    return build_training_loop(callback.config, Holder(frames[0].numbers), None)


def test_defaults_of_a_liquid_are_molecular(caplog):
    frames = thermal(water_box())
    with caplog.at_level(logging.INFO):
        loop = build_loop(frames)
    assert isinstance(loop.estimator.local, Molecules)
    names = [observable.name for observable in loop.estimator.observables]
    assert names == [
        "local_bond_lengths", "local_bond_amplitudes", "local_contacts", "local_contact_amplitudes",
        "radial_distribution_H_H", "intermolecular_radial_distribution_H_O", "radial_distribution_O_O",
    ]  # fmt: skip
    detector = loop.simulator.detector
    assert isinstance(detector, AnyOf)
    kinds = [BondLimits, AngleLimits, ContactLimits, TemperatureLimits, MomentumLimits]
    assert [type(part) for part in detector.detectors] == kinds
    assert "samples are Molecules()" in caplog.text
    assert "contact limits" in caplog.text


def test_defaults_of_a_crystal_are_radial(caplog):
    frames = thermal(bulk("NaCl", "rocksalt", a=5.64, cubic=True) * 2)
    with caplog.at_level(logging.INFO):
        loop = build_loop(frames)
    assert [observable.name for observable in loop.estimator.observables] == [
        "radial_distribution_Cl_Cl", "radial_distribution_Cl_Na", "radial_distribution_Na_Na",
    ]  # fmt: skip
    kinds = [ContactLimits, LindemannCriterion, TemperatureLimits, MomentumLimits]
    assert [type(part) for part in loop.simulator.detector.detectors] == kinds
    assert "samples are whole frames" in caplog.text


def test_gradient_of_a_metal():
    # An untrained potential heats copper up within a few steps.
    loop = build_loop(thermal(bulk("Cu", cubic=True) * 2), detector=RunawayTemperature(1e-3), window_ps=0.01)
    estimate = observable_gradient(loop)
    assert estimate is not None
    assert loop.windows[-1].unstable_fraction == 1.0
    gradient = flat(estimate.gradients)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() > 0
    assert estimate.loss == pytest.approx(loop.windows[-1].observable_loss, rel=1e-6)


LOCAL = {
    "molecules": {"local": Molecules()},
    "nearest": {"local": NearestMolecules(3), "even_sampling": (20, 2)},
    "atoms": {"local": AtomsWithin(2.0), "observables": [LocalBondLengths(), LocalBondAmplitudes()]},
    "both": {"observables": [LocalContacts(), RadialDistribution(("O", "H"), bin_width=0.2)]},
}


def train(loop, optimizer, n_steps):
    """Return the losses, sample sizes and gradients of the next steps, and the weights after them."""
    found = []
    for _ in range(n_steps):
        estimate = observable_gradient(loop)
        if estimate is None:
            break
        for parameter, gradient in zip(loop.potential.trainable_parameters(), estimate.gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        found += [estimate.loss, estimate.ess_fraction, flat(estimate.gradients)]
    return [*found, flat(loop.potential.module.parameters())]


@pytest.mark.parametrize("arguments", LOCAL.values(), ids=LOCAL)
def test_local_estimator_resumes_bit_for_bit(arguments):
    frames = thermal(water_box())
    # An untrained potential fails at once.
    settings = {"integrator": Langevin(500.0, 0.5, 1.0), "detector": BondDeviation(0.12, 2.0), **arguments}

    def new_loop(seed):
        loop = build_loop(frames, seed=seed, steps_per_window=2, min_ess_fraction=0.01, **settings)
        return loop, torch.optim.SGD(loop.potential.trainable_parameters(), lr=1e-3)

    loop, optimizer = new_loop(0)
    train(loop, optimizer, 1)
    buffer = io.BytesIO()
    torch.save({"loop": loop.state_dict(), "module": loop.potential.module.state_dict()}, buffer)
    expected = train(loop, optimizer, 3)
    assert len(expected) > 6

    resumed, resumed_optimizer = new_loop(9)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    resumed.load_state_dict(saved["loop"])
    resumed.potential.module.load_state_dict(saved["module"])
    for found, wanted in zip(train(resumed, resumed_optimizer, 3), expected, strict=True):
        assert torch.equal(torch.as_tensor(found), torch.as_tensor(wanted))


def test_local_rejects_an_unknown_name():
    with pytest.raises(ValueError, match=r"local='molecule' is not a neighborhood: pass Molecules\(\)"):
        StABlECallback(local="molecule")


def test_has_several_molecules():
    assert has_several_molecules(System.from_atoms(water_box()))
    assert not has_several_molecules(System.from_atoms(molecule("CH4")))
    assert not has_several_molecules(System.from_atoms(Atoms("Ar2", [[0, 0, 0], [0, 0, 4.0]])))
    assert not has_several_molecules(System.from_atoms(bulk("NaCl", "rocksalt", a=5.64, cubic=True) * 2))


def test_defaults_of_one_molecule_are_its_bonds():
    system = System.from_atoms(molecule("CH4"))
    assert [type(observable) for observable in default_observables(system)] == [BondLengths, BondAmplitudes]
    detector = default_detector(system, torch.tensor(molecule("CH4").positions)[None], Langevin(300.0))
    assert [type(part) for part in detector.detectors[:3]] == [BondLimits, AngleLimits, ChiralityLimits]
    assert default_local("auto", system, [LocalBondLengths()]) is None


def test_default_local_needs_a_local_observable():
    system = System.from_atoms(water_box())
    assert isinstance(default_local("auto", system, [BondLengths(), LocalBondLengths()]), Molecules)
    assert default_local("auto", system, [BondLengths()]) is None
    assert default_local(None, system, [LocalBondLengths()]) is None
    assert isinstance(default_local(AtomsWithin(2.0), system, [BondLengths()]), AtomsWithin)


def test_choose_keeps_the_settings_and_binds_them():
    frames = thermal(water_box())
    system = System.from_atoms(frames[0])
    reference = torch.tensor(np.stack([frame.positions for frame in frames]))
    observable, detector = LocalBondLengths(), BondDeviation(0.3)
    config = SystemConfig(observables=observable, detector=detector, local=None)
    chosen = choose(config, system, reference)
    assert chosen.observables == [observable]
    assert chosen.detector is detector
    assert chosen.local is None
    # Mean bond length of the reference, bond by bond.
    first, second = system.bonds.unbind(1)
    lengths = [frame.get_distance(i, j, mic=True) for frame in frames for i, j in zip(first, second, strict=True)]
    assert observable.known_target.tolist() == pytest.approx([np.mean(lengths)], rel=1e-9)


def test_choose_rejects_an_unstable_reference():
    frames = thermal(molecule("CH4"))
    reference = torch.tensor(np.stack([frame.positions for frame in frames]))
    with pytest.raises(ValueError, match=r"BondDeviation\(threshold=0\.001"):
        choose(SystemConfig(detector=BondDeviation(0.001)), System.from_atoms(frames[0]), reference)
