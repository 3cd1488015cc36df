"""Diatomic curves, symmetry, cutoff, drift: faults of known size are measured, and sound potentials have none."""

import json

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from force_fields import ForceField
from torch import nn

from stable_plugin.evaluation import check_potential
from stable_plugin.evaluation.preflight import check_systems
from stable_plugin.evaluation.preflight.diatomics import curve_of
from stable_plugin.models import ModulePotential, Potential

ETHANOL = molecule("CH3CH2OH")
COPPER = bulk("Cu", cubic=True) * 2


def rattled(atoms, n_frames=6):
    frames = [atoms.copy() for _ in range(n_frames)]
    for seed, frame in enumerate(frames):
        frame.rattle(0.03, seed=seed)
    return frames


class Pairs(nn.Module):
    """Energy a (1 - r / cutoff)^power of each pair within the cutoff."""

    def __init__(self, power, cutoff, height=1.0):
        super().__init__()
        self.height = nn.Parameter(torch.tensor(float(height), dtype=torch.float64))
        self.power, self.cutoff = power, cutoff

    def stable_potential(self, system):
        return PairPotential(self, system)


class PairPotential(Potential):
    @property
    def cutoff(self):
        return self.module.cutoff

    def atomic_energies(self, positions, edges):
        at = positions.reshape(-1, 3)
        lengths = (at[edges.index[1]] - at[edges.index[0]] + edges.shifts).norm(dim=1)
        energies = 0.5 * self.module.height * (1 - lengths / self.cutoff).clamp_min(0.0) ** self.module.power
        return torch.zeros(len(at), dtype=at.dtype).index_add(0, edges.index[1], energies).view(positions.shape[:2])


class Swirl(ForceField):
    """The force field, with forces around the z axis that are the slope of no energy."""

    def stable_potential(self, system):
        return SwirlPotential(self, system)


class SwirlPotential(Potential):
    cutoff = float("inf")

    def atomic_energies(self, positions, edges):
        return ForceField.stable_potential(self.module, self.system).atomic_energies(positions, edges)

    def energies_and_forces(self, positions, edges):
        energies, forces = super().energies_and_forces(positions, edges)
        around = torch.stack([-positions[..., 1], positions[..., 0], torch.zeros_like(positions[..., 0])], dim=-1)
        return energies, forces + 0.5 * around


class Anchored(nn.Module):
    """A force field in which each atom is also held at the origin, the first one more than the others."""

    def __init__(self, frame, first=0.0, all_atoms=0.0):
        super().__init__()
        self.field, self.first, self.all_atoms = ForceField(frame), first, all_atoms

    def stable_potential(self, system):
        return ModulePotential(AnchoredEnergy(self, system), system)


class AnchoredEnergy(nn.Module):
    def __init__(self, anchored, system):
        super().__init__()
        self.anchored, self.inner = anchored, PairPotential(Pairs(3, 3.0), system)
        self.unused = nn.Parameter(torch.zeros((), dtype=torch.float64), requires_grad=False)

    def forward(self, positions):
        energies = self.inner.energies(positions, self.inner.edges(positions))
        relative = positions - positions.mean(dim=1, keepdim=True)
        first = 0.5 * self.anchored.first * relative[:, 0].square().sum(-1)
        return energies + first + 0.5 * self.anchored.all_atoms * positions[..., 0].square().sum(-1)


def morse(r, depth=4.0, steepness=2.0, length=1.2):
    inner = np.exp(-steepness * (r - length))
    return depth * ((1 - inner) ** 2 - 1), -2 * depth * steepness * (1 - inner) * inner


def test_curve_of_morse_is_sound():
    r = np.arange(0.6, 5.0, 0.02)
    energy, force = morse(r)
    curve = curve_of("C-O", ("C", "O"), r, energy, force, 300.0)
    assert curve.repulsive and curve.force_flips == 1 and curve.tortuosity == pytest.approx(1.0, abs=1e-9)
    assert curve.minima == pytest.approx([1.2], abs=0.02)
    assert curve.conservation_eV_per_A == pytest.approx(np.abs(force + np.gradient(energy, r)).mean())


def test_curve_with_second_minimum_and_collapse():
    r = np.arange(0.6, 5.0, 0.02)
    energy, force = morse(r)
    well = -2.0 * np.exp(-0.5 * ((r - 2.4) / 0.2) ** 2)
    curve = curve_of("C-O", ("C", "O"), r, energy + well, force + well * (r - 2.4) / 0.04, 300.0)
    assert curve.force_flips == 3 and curve.minima == pytest.approx([1.2, 2.4], abs=0.05)
    variation = np.abs(np.diff(energy + well)).sum()
    ends = (energy + well)[[0, -1]] - (energy + well).min()
    assert curve.tortuosity == pytest.approx(variation / ends.sum()) and curve.tortuosity > 1.05
    collapsing = curve_of("C-O", ("C", "O"), r, -1.0 / r, -1.0 / r**2, 300.0)
    assert not collapsing.repulsive and collapsing.force_flips == 0 and collapsing.minima == []


def test_shallow_minimum_does_not_count():
    r = np.arange(0.6, 5.0, 0.02)
    energy, force = morse(r)
    well = -0.01 * np.exp(-0.5 * ((r - 4.0) / 0.1) ** 2)
    curve = curve_of("C-O", ("C", "O"), r, energy + well, force + well * (r - 4.0) / 0.01, 300.0)
    assert len(curve.minima) == 1


@pytest.mark.parametrize(("power", "jump"), [(3, 0.0), (1, 2.0 / 3.7)])
def test_kink_at_the_cutoff_is_measured(power, jump):
    found = check_potential(Pairs(power, cutoff=3.7, height=2.0), rattled(COPPER), n_frames=2)
    assert found.cutoff.n_pairs == 6 and found.cutoff.cutoff_A == 3.7
    assert found.cutoff.force_jump_eV_per_A == pytest.approx(jump, rel=0.02, abs=1e-3)
    assert found.cutoff.energy_jump_eV == pytest.approx(0.0, abs=1e-6)
    assert any("at the cutoff" in problem for problem in found.problems) == (power == 1)


def test_kink_of_isolated_pair_is_measured():
    found = check_potential(Pairs(1, cutoff=6.0), rattled(ETHANOL), n_frames=1)
    assert found.cutoff.n_pairs == 1 and found.cutoff.force_jump_eV_per_A == pytest.approx(1.0 / 6.0, rel=1e-6)


def test_nonconservative_force_drifts():
    frames = rattled(ETHANOL)
    sound, swirl = (check_potential(kind(ETHANOL), frames, n_frames=4) for kind in (ForceField, Swirl))
    assert abs(sound.drift.drift_meV_per_atom_ps) < 0.3 and not any("drifts" in each for each in sound.problems)
    assert swirl.drift.drift_meV_per_atom_ps > 3.0 and any("drifts" in each for each in swirl.problems)


def test_symmetries_of_sound_potential():
    found = check_potential(EMT(), rattled(COPPER), n_frames=2)
    assert all(change < 1e-9 for kind in vars(found.symmetry).values() for change in kind)
    assert found.problems == []
    assert [curve.elements for curve in found.diatomics] == ["Cu-Cu"] and found.diatomics[0].repulsive
    assert any("states no cutoff" in note for note in found.notes)


@pytest.mark.parametrize(
    ("settings", "broken"),
    [({"all_atoms": 0.1}, "rotation and translation"), ({"first": 1.0}, "permutation")],
)
def test_broken_symmetry_is_named(settings, broken):
    found = check_potential(Anchored(ETHANOL, **settings), rattled(ETHANOL), n_frames=2)
    assert f"forces change under {broken}" in found.problems


def test_forces_that_are_not_finite_are_named():
    class Broken(ModulePotential):
        def energies_and_forces(self, positions, edges):
            energies = torch.zeros(len(positions), dtype=positions.dtype)
            return energies, torch.full_like(positions, torch.nan)

    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(()))

        def stable_potential(self, system):
            return Broken(self, system)

    found = check_potential(Module(), rattled(ETHANOL), n_frames=2)
    assert any("not finite in frames 0, 1" in problem for problem in found.problems)
    assert found.symmetry is None and found.drift is None
    assert "NaN" not in json.dumps(found.to_json(), allow_nan=False)


def test_family_without_dimers_leaves_a_note():
    class NoDimers(ForceField):
        def stable_potential(self, system):
            if system.n_atoms == 2:
                raise ValueError("needs a cell")
            return super().stable_potential(system)

    found = check_potential(NoDimers(ETHANOL), rattled(ETHANOL), n_frames=1)
    assert found.diatomics == [] and any("needs a cell" in note for note in found.notes)


def test_random_state_is_untouched():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    check_potential(ForceField(ETHANOL), rattled(ETHANOL), n_frames=1)
    assert torch.equal(torch.rand(1), expected)


def test_one_frame_is_enough():
    assert check_potential(ForceField(ETHANOL), [ETHANOL], n_frames=8).n_holes == 0


def test_several_systems_are_checked_one_by_one():
    frames = [*rattled(COPPER, 2), *rattled(bulk("Al", cubic=True) * 2, 3), Atoms("Cu")]
    with pytest.raises(ValueError, match="are of 3 systems: pass the frames of one of them"):
        check_potential(EMT(), frames)
    assert list(check_systems(EMT(), frames, n_frames=1)) == ["Al32", "Cu32"]
    with pytest.raises(ValueError, match="at least two atoms"):
        check_systems(EMT(), [Atoms("Cu"), Atoms("Al")])


@pytest.mark.parametrize("settings", [{"temperature_K": 0.0}, {"n_frames": 0}, {"seed": -1}])
def test_settings_are_checked(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))}="):
        check_potential(EMT(), [COPPER], **settings)
