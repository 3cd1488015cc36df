"""The zero of energy while weights change, in every way in."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms
from pytorch_lightning import LightningModule
from small_training import short_callback, small_module, trainer
from torch import nn
from toys import as_potential, tiny_mace

from stable_plugin import BondDeviation, Schedule, StABlEConfig, StABlEMixin, System
from stable_plugin.algorithm.energy_zero import EnergyZero
from stable_plugin.integrations.lightning.data import ExtxyzDataModule
from stable_plugin.md.labels import ENERGY_KEY, FORCES_KEY
from stable_plugin.models import ModulePotential
from stable_plugin.models.mace import MACEModule


def waters(n_frames=6):
    frames = []
    for seed in range(n_frames):
        atoms = Atoms("OHH", [[0.0, 0.0, 0.0], [0.96, 0.0, 0.0], [-0.24, 0.93, 0.0]])
        atoms.rattle(0.01, seed=seed)
        atoms.info[ENERGY_KEY] = -30.0 + 0.1 * seed
        atoms.arrays[FORCES_KEY] = np.random.default_rng(seed).normal(size=(3, 3))
        frames.append(atoms)
    return frames


def zero_of(potential, frames):
    positions = torch.tensor(np.stack([frame.positions for frame in frames]))
    return EnergyZero([potential], [positions], [None]), positions


def mean_energy(potential, positions):
    with torch.no_grad():
        energies = potential.energies(positions, potential.edges(positions)).mean().item()
    return energies + potential.constant_energy


def test_restore_brings_the_mean_energy_back():
    frames = waters()
    model = tiny_mace([1, 8])
    potential = as_potential(model, System.from_atoms(frames[0]))
    zero, positions = zero_of(potential, frames)
    zero.mark()
    before, forces = (
        mean_energy(potential, positions),
        potential.energies_and_forces(positions, potential.edges(positions))[1],
    )
    with torch.no_grad():
        model.atomic_energies_fn.atomic_energies += torch.tensor([0.3, -0.2]).to(
            model.atomic_energies_fn.atomic_energies
        )
    assert zero.drifts() == {"Default": pytest.approx((2 * 0.3 - 0.2) / 3, rel=1e-6)}
    zero.restore()
    assert mean_energy(potential, positions) == pytest.approx(before, abs=1e-6)
    torch.testing.assert_close(potential.energies_and_forces(positions, potential.edges(positions))[1], forces)


def test_drift_of_two_systems_is_the_best_constant():
    class Constant(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = nn.Parameter(torch.tensor(value, dtype=torch.float64))

        def forward(self, positions):
            return self.value + 0.0 * positions.sum((1, 2))

    small, large = (System.from_atoms(atoms) for atoms in (Atoms("H2", [[0, 0, 0], [0, 0, 0.74]]), waters(1)[0]))
    potentials = [ModulePotential(Constant(1.0), small), ModulePotential(Constant(2.0), large)]
    zero = EnergyZero(potentials, [torch.zeros(3, 2, 3), torch.zeros(1, 3, 3)], [None, None])
    zero.mark()
    with torch.no_grad():
        potentials[0].module.value += 0.4
        potentials[1].module.value += 0.9
    expected = np.linalg.lstsq([[2.0], [3.0]], [0.4, 0.9], rcond=None)[0][0]
    assert zero.drifts() == {None: pytest.approx(expected)}


def test_restore_holds_each_head():
    frames = waters()
    heads = {"heads": ["old", "new"], "atomic_inter_scale": [1.5, 1.5], "atomic_inter_shift": [0.1, 0.1]}
    model = tiny_mace([1, 8], atomic_energies=np.array([[-10.0, -80.0], [-11.0, -81.0]]), **heads)
    system = System.from_atoms(frames[0])
    potentials = [as_potential(model, replace(system, head=head)) for head in ("old", "new", "new")]
    _, positions = zero_of(potentials[0], frames)
    zero = EnergyZero(potentials, [positions] * 3, [None] * 3)
    zero.mark()
    before = [mean_energy(potential, positions) for potential in potentials]
    with torch.no_grad():
        model.scale_shift.shift += torch.tensor([0.3, -0.2]).to(model.scale_shift.shift)
    assert zero.drifts() == {"old": pytest.approx(0.3), "new": pytest.approx(-0.2)}
    zero.restore()
    assert [mean_energy(potential, positions) for potential in potentials] == pytest.approx(before, abs=1e-6)


def stable(**changes):
    values = {
        "detector": BondDeviation(0.08, 10.0),
        "schedule": Schedule(max_failures_per_ns=30_000.0, max_windows=4),
        "steps_per_window": 4,
        "min_ess_fraction": 0.01,
        "gradient_ratio": 1000.0,
    }
    return {**values, **changes}


def drift_after(module, data, folder, *callbacks):
    """Return by how much the mean energy of the frames changes in a run, in eV per atom."""
    torch.manual_seed(0)
    frames = data.train_frames
    module.prepare(frames)
    positions = torch.tensor(np.stack([frame.positions for frame in frames]))
    system = System.from_atoms(frames[0])

    def energy():
        potential = module.stable_potential(system)
        return mean_energy(potential, positions.to(potential.dtype))

    before = energy()
    trainer(folder, *callbacks, max_epochs=12).fit(module, data)
    return (energy() - before) / len(frames[0])


def hold_nothing(monkeypatch):
    monkeypatch.setattr(EnergyZero, "restore", lambda self: None)


@pytest.mark.parametrize("way", ["callback", "mixin"])
def test_energies_do_not_drift(way, tmp_path, monkeypatch):
    class Mixed(StABlEMixin, MACEModule):
        def training_step(self, batch, batch_idx):
            loss, observable = super().training_step(batch, batch_idx), self.stable_loss()
            return None if observable is None else loss + 1e5 * observable

    def run(name):
        data = ExtxyzDataModule(waters(), batch_size=2)
        arguments = {"energy_weight": 0.01, "lr": 0.02, "dtype": "float64"}
        if way == "callback":
            return drift_after(small_module(**arguments), data, tmp_path / name, short_callback(**stable()))
        settings = replace(short_callback(**stable()).config, gradient_ratio=StABlEConfig.gradient_ratio)
        module = Mixed(r_max=4.0, hidden_irreps="4x0e", max_ell=1, correlation=1, radial_MLP=[8], **arguments)
        module.configure_stable(config=settings)
        return drift_after(module, data, tmp_path / name)

    held = run("held")
    hold_nothing(monkeypatch)
    free = run("free")
    assert abs(free) > 5e-3
    assert abs(held) < 2e-4


class Free(LightningModule):
    """A module without a constant that could be shifted."""

    def __init__(self):
        super().__init__()
        self.constant = nn.Parameter(torch.tensor(0.0, dtype=torch.float64))
        self.k = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, positions):
        lengths = (positions[:, 1:] - positions[:, :1]).norm(dim=-1)
        return self.constant * self.k + 0.5 * self.k * (lengths - 1.0).square().sum(-1)

    def stable_potential(self, system):
        return ModulePotential(self, system)

    def training_step(self, batch, batch_idx):
        return 1e-3 * (self.k - 1.0).square() + (self.constant - 0.5).square()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


def test_drift_of_a_module_without_constant_is_a_warning(tmp_path, caplog):
    loader = torch.utils.data.DataLoader(waters(), batch_size=2, collate_fn=list)
    callback = short_callback(**stable(), structures=waters())
    trainer(tmp_path, callback, max_epochs=6).fit(Free(), loader)
    assert "the energies have drifted by" in caplog.text
    assert "Free keeps no constant that could be shifted back" in caplog.text
