"""Limits of the energy, and replicas that fall into a hole of the potential."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.units import kB
from torch import nn

from stable_plugin import Evaluator, Langevin, System
from stable_plugin.evaluation.energies import energy_limits
from stable_plugin.models import ModulePotential, find_potential

N_ATOMS, TEMPERATURE_K = 20, 300.0


class Wells(nn.Module):
    """Harmonic atoms at sites far apart, with a hole of a given depth 1.5 Å beside the first one."""

    def __init__(self, depth_eV, k=1.0):
        super().__init__()
        self.k = nn.Parameter(torch.tensor(k, dtype=torch.float64))
        self.depth_eV = depth_eV
        self.register_buffer("sites", torch.tensor(sites()))

    def stable_potential(self, system):
        return ModulePotential(self, system)

    def forward(self, positions):
        displacements = positions - self.sites
        to_hole = displacements[:, 0] - torch.tensor([0.0, 0.0, 1.5], dtype=positions.dtype)
        hole = torch.exp(-to_hole.square().sum(-1) / 0.5)
        return 0.5 * self.k * displacements.square().sum(dim=(1, 2)) - self.depth_eV * hole


def sites():
    return np.stack(np.meshgrid(*[6.0 * np.arange(n) for n in (5, 2, 2)], indexing="ij"), axis=-1).reshape(-1, 3)


def frames(n_frames=100):
    """Return frames of the harmonic atoms at equilibrium."""
    width = np.sqrt(kB * TEMPERATURE_K)
    random = np.random.default_rng(0)
    return [Atoms(f"Ar{N_ATOMS}", sites() + random.normal(scale=width, size=(N_ATOMS, 3))) for _ in range(n_frames)]


def test_limits_are_those_of_harmonic_atoms():
    system = System.from_frames(frames())
    potential = find_potential(Wells(0.0), system)
    reference = torch.tensor(np.stack([frame.positions for frame in frames(200)]))
    limits = energy_limits(potential, reference, TEMPERATURE_K, None, 50)
    kT = kB * TEMPERATURE_K
    assert limits.center.item() == pytest.approx(1.5 * N_ATOMS * kT, rel=0.05)
    # Five to eight standard deviations, and half of kT per atom.
    for side in (limits.upper - limits.center, limits.center - limits.lower):
        assert 5.0 < (side.item() - 0.5 * N_ATOMS * kT) / (kT * np.sqrt(1.5 * N_ATOMS)) < 9.0


@pytest.mark.parametrize(("depth_eV", "fails"), [(0.0, False), (4.0, True)])
def test_a_hole_is_a_failure_told_by_its_energy(depth_eV, fails, tmp_path):
    # With a friction that takes up the energy that is released, so that the temperature tells nothing.
    evaluator = Evaluator(
        frames(8),
        frames(),
        n_replicas=4,
        horizons_ps=[1.0],
        integrator=Langevin(TEMPERATURE_K, 2.5, 100.0),
        record_every_fs=25.0,
    )
    (summary,) = evaluator.evaluate(Wells(depth_eV), tmp_path).summaries
    assert (summary["unstable"] > 0) == fails
    if fails:
        assert "energy -" in " ".join(failure["what"] for failure in summary["failures"])
        assert summary["verdict"]["state"] == "fails"
        assert (tmp_path / "to_label.extxyz").is_file()
