"""The state of a simulation and the functions of velocities."""

from dataclasses import fields

import pytest
import torch
from harmonic import random_state

from stable_plugin import System
from stable_plugin.md import State
from stable_plugin.md.state import kinetic_energy, kinetic_temperature, maxwell_boltzmann
from stable_plugin.units import BOLTZMANN

NAMES = [field.name for field in fields(State)]


def same(first, second):
    return all(torch.equal(mine, other) for mine, other in zip(first.tensors(), second.tensors(), strict=True))


def test_state_tensors_round_trip():
    state = random_state(chain_length=3)
    assert [id(tensor) for tensor in state.tensors()] == [id(getattr(state, name)) for name in NAMES]
    assert same(State.from_tensors(state.tensors()), state)


def test_state_dict_is_by_name():
    state = random_state(chain_length=3)
    saved = state.state_dict()
    assert list(saved) == NAMES
    assert same(State.from_state_dict(dict(reversed(saved.items())), "cpu"), state)
    del saved["cell"]
    with pytest.raises(ValueError, match=r"^tensors=\[.*'chain'.*\] lacks \['cell'\]: .* restart the run"):
        State.from_state_dict(saved)


def test_state_replace_keeps_the_other_tensors():
    state = random_state()
    changed = state.replace(energies=state.energies + 1.0)
    assert torch.equal(changed.energies, state.energies + 1.0)
    assert all(getattr(changed, name) is getattr(state, name) for name in NAMES if name != "energies")


def test_state_select_mixes_replicas():
    state = random_state(chain_length=2, n_replicas=3)
    other = State.from_tensors(tensor + 1.0 for tensor in state.tensors())
    mixed = state.select(torch.tensor([True, False, True]), other)
    for name in NAMES:
        found, mine, theirs = (getattr(each, name) for each in (mixed, state, other))
        assert torch.equal(found[[0, 2]], mine[[0, 2]])
        assert torch.equal(found[1], theirs[1])


def test_state_select_keeps_shared_tensors():
    state = random_state()
    moved = state.replace(positions=state.positions + 1.0)
    assert moved.select(torch.tensor([True, False]), state).cell is state.cell


@pytest.mark.parametrize("name", ["positions", "velocities", "forces", "energies"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_state_finite_flags_the_replica(name, value):
    state = random_state()
    assert state.finite().tolist() == [True, True]
    tensor = getattr(state, name).clone()
    tensor[1].view(-1)[0] = value
    assert state.replace(**{name: tensor}).finite().tolist() == [True, False]


def test_state_repr_shows_shapes():
    assert "positions=[2, 3, 3]" in repr(random_state())
    assert "cell=[2, 3, 3]" in repr(random_state())


def test_maxwell_boltzmann_variance_per_mass(generator):
    masses = torch.tensor([1.0, 16.0], dtype=torch.float64)
    velocities = maxwell_boltzmann((40_000, 2, 3), masses, 350.0, generator)
    variances = velocities.var(dim=(0, 2))
    assert torch.allclose(variances, BOLTZMANN * 350.0 / masses, rtol=0.02)


def test_kinetic_energy_and_temperature_match_ase(aspirin_frames, generator):
    system = System.from_atoms(aspirin_frames[0])
    velocities = maxwell_boltzmann((2, 21, 3), system.masses, 350.0, generator)
    frame = system.atoms(torch.tensor(aspirin_frames[0].positions), velocities[1])
    assert kinetic_energy(velocities, system.masses)[1].item() == pytest.approx(frame.get_kinetic_energy(), rel=1e-10)
    assert kinetic_temperature(velocities, system.masses)[1].item() == pytest.approx(frame.get_temperature(), rel=1e-10)
