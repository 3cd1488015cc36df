"""``spktrain`` with StABlECallback as one entry of its YAML, and what SchNetPack's tools read from the run's folder."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from stable_plugin import System
from stable_plugin.models import find_potential, get_family, load_potential

pytest.importorskip("schnetpack")
import schnet_tools
from schnetpack import AtomisticTask
from schnetpack.data import ASEAtomsData
from schnetpack.interfaces import SpkCalculator
from schnetpack.train import ExponentialMovingAverage
from schnetpack.transform import ASENeighborList


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the folder of a finished run, whose loss is smallest before the repair."""
    folder = tmp_path_factory.mktemp("run")
    done = schnet_tools.train(folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "runs" / "run", done.stdout


def test_spktrain_repairs(run):
    folder, log = run
    assert "4 replicas of C9H8O4 (21 bonds) from 5 structures, targets from 200 frames" in log
    assert "ExponentialMovingAverage keeps averages of the weights" in log
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"epoch=01.ckpt", "last.ckpt", "repaired.ckpt"}


def repaired_weights(folder):
    checkpoint = torch.load(folder / "checkpoints" / "repaired.ckpt", weights_only=False)
    prefix = "model."
    weights = {
        name.removeprefix(prefix): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith(prefix)
    }
    return weights, checkpoint["callbacks"]["ExponentialMovingAverage"]["ema"]["shadow_params"]


def test_schnetpack_tools_read_the_repaired_potential(run):
    """What SchNetPack's own calculator computes from best_model is the potential that has been simulated with."""
    folder = run[0]
    atoms = schnet_tools.make_database(folder / "again.db", 1)[0]
    atoms.rattle(0.05, seed=0)
    model = load_potential(folder / "best_model", energy_unit="eV")
    weights, averages = repaired_weights(folder)
    for name, tensor in model.network.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    parameters = dict(model.network.named_parameters())
    assert all(torch.equal(average, parameters[name]) for name, average in zip(parameters, averages, strict=True))
    potential = find_potential(model, System.from_atoms(atoms))
    positions = torch.tensor(atoms.positions, dtype=torch.float32)[None]
    with potential.frozen():
        energies, forces = potential.energies_and_forces(positions, potential.edges(positions))
    atoms.calc = SpkCalculator(str(folder / "best_model"), ASENeighborList(cutoff=5.0), energy_unit="eV")
    assert atoms.get_potential_energy() == pytest.approx(energies.item() + potential.constant_energy, abs=1e-3)
    torch.testing.assert_close(torch.tensor(atoms.get_forces()).to(forces), forces[0], rtol=1e-4, atol=1e-4)


def test_the_model_before_is_kept(run):
    before, after = (
        load_potential(run[0] / name, energy_unit="eV").network.state_dict()
        for name in ("best_model-not-repaired", "best_model")
    )
    assert any(not torch.equal(tensor, after[name]) for name, tensor in before.items())


def make_task(units, tmp_path, length_unit="Ang"):
    """Return a task whose trainer has data in these units."""
    schnet_tools.make_database(tmp_path / "frames.db", 2)
    data = ASEAtomsData(
        str(tmp_path / "frames.db"),
        transforms=[ASENeighborList(cutoff=4.0)],
        property_units={"energy": units},
        distance_unit=length_unit,
    )
    task = AtomisticTask(schnet_tools.make_network(), [], optimizer_args={"lr": 0.1})
    task._trainer = SimpleNamespace(datamodule=SimpleNamespace(train_dataset=data))
    return task, data


def test_units_and_structures_come_from_the_data(tmp_path):
    """A task knows the units of its data: without it, kcal/mol would be simulated as eV."""
    task, data = make_task("kcal/mol", tmp_path, "Bohr")
    frames = schnet_tools.make_database(tmp_path / "other.db", 2)
    structures = get_family("schnet").structures(task, [data[0], data[1]])
    for structure, frame in zip(structures, frames, strict=True):
        np.testing.assert_allclose(structure.positions, frame.positions, atol=1e-6)
        assert structure.get_chemical_symbols() == frame.get_chemical_symbols() and not structure.pbc.any()
    potential = find_potential(task, System.from_atoms(frames[0]))
    assert potential.settings() == {"energy_unit": "kcal/mol", "length_unit": "Bohr"}
    task._trainer = None
    with pytest.raises(ValueError, match="AtomisticTask is not trained on an AtomsDataModule"):
        find_potential(task, System.from_atoms(frames[0]))


def test_averages_are_adopted_and_follow():
    callback, family = ExponentialMovingAverage(decay=0.9), get_family("schnet")
    average = family.average(callback)
    assert average.name == "ExponentialMovingAverage" and list(average.copies()) == []
    module = SimpleNamespace(model=nn.Linear(2, 2))
    callback.on_fit_start(None, module)
    weight, shadow = module.model.weight, callback.ema.shadow_params[0]
    shadow.add_(1.0)
    average.adopt()
    assert torch.equal(weight, shadow) and torch.equal(callback.ema.collected_params[0], shadow)
    callback.on_train_epoch_start(None, module)  # puts the weights back in their place
    assert torch.equal(weight, shadow)
    weight.data.add_(1.0)
    average.follow()
    callback.on_train_batch_end(None, module)
    assert torch.equal(weight, callback.ema.shadow_params[0])
    assert family.average(module) is None
