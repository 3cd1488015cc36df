"""``nequip-train`` with StABlECallback as one entry of its YAML, and what NequIP's tools read from the run's folder."""

import copy
from pathlib import Path

import pytest
import torch
from ase.io import read

from stable_plugin import System
from stable_plugin.models import find_potential, get_family, load_potential

pytest.importorskip("nequip.model")
import nequip_tools
from nequip.data.dataset import ASEDataset
from nequip.integrations.ase import NequIPCalculator
from nequip.train import EMALightningModule, NequIPLightningModule

TRAIN = Path(__file__).parents[3] / "recipes" / "data" / "aspirin_train.extxyz"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the folder of a finished run, whose loss is smallest before the repair."""
    folder = tmp_path_factory.mktemp("run")
    # The steps of the repair are large, so that no checkpoint of it is the best.
    done = nequip_tools.train(folder, epochs=20, start_epoch=2, learning_rate=0.3)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "run", done.stdout


def test_nequip_train_repairs(run):
    folder, log = run
    assert "4 replicas of C9H8O4 (21 bonds) from 6 structures, targets from 200 frames" in log
    assert "EMALightningModule keeps averages of the weights" in log
    assert {path.name for path in folder.glob("*.ckpt")} == {
        "best.ckpt",
        "best-not-repaired.ckpt",
        "last.ckpt",
        "repaired.ckpt",
    }


@pytest.mark.parametrize("name", ["repaired", "last", "best"])
def test_nequip_tools_read_the_repaired_potential(run, name):
    """What NequIP's own calculator computes from a checkpoint is the potential that has been simulated with."""
    path = run[0] / f"{name}.ckpt"
    atoms = read(TRAIN)
    weights = torch.load(run[0] / "repaired.ckpt", weights_only=False)["state_dict"]
    trained = nequip_tools.module_of(weights, path)
    potential = find_potential(trained, System.from_atoms(atoms))
    positions = torch.tensor(atoms.positions)[None]
    with potential.frozen():
        energies, forces = potential.energies_and_forces(positions, potential.edges(positions))
    atoms.calc = NequIPCalculator._from_saved_model(path, chemical_species_to_atom_type_map=True)
    assert atoms.get_potential_energy() == pytest.approx(energies.item() + potential.constant_energy, abs=1e-9)
    torch.testing.assert_close(torch.tensor(atoms.get_forces()), forces[0], rtol=0.0, atol=1e-9)


def test_the_best_checkpoint_before_is_kept(run):
    atoms, energies = read(TRAIN), {}
    for name in ("best-not-repaired", "best"):
        atoms.calc = NequIPCalculator._from_saved_model(run[0] / f"{name}.ckpt", chemical_species_to_atom_type_map=True)
        energies[name] = atoms.get_potential_energy()
    assert abs(energies["best"] - energies["best-not-repaired"]) > 1e-3


def test_load_potential_reads_nequip_checkpoints(run, tmp_path):
    atoms = read(TRAIN)
    potential = find_potential(load_potential(run[0] / "repaired.ckpt"), System.from_atoms(atoms))
    positions = torch.tensor(atoms.positions)[None]
    atoms.calc = NequIPCalculator._from_saved_model(run[0] / "best.ckpt", chemical_species_to_atom_type_map=True)
    with potential.frozen():
        energy = potential.energies(positions, potential.edges(positions)).item() + potential.constant_energy
    assert energy == pytest.approx(atoms.get_potential_energy(), abs=1e-9)
    (tmp_path / "damaged.ckpt").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"damaged\.ckpt cannot be read as a NequIP model"):
        load_potential(tmp_path / "damaged.ckpt")
    with pytest.raises(FileNotFoundError, match=r"nothing\.ckpt' is not a file"):
        load_potential(tmp_path / "nothing.ckpt")


def test_averages_are_adopted_and_follow():
    module = nequip_tools.make_lightning_module(EMALightningModule, ema_decay=0.9)
    family = get_family("nequip")
    average = family.average(module)
    assert family.average(nequip_tools.make_lightning_module(NequIPLightningModule)) is None
    weights = list(module.model.parameters())
    before = copy.deepcopy(weights)
    for weight in weights:
        weight.data.add_(1.0)
    average.adopt()
    assert all(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))
    for weight in weights:
        weight.data.add_(1.0)
    average.follow()
    assert all(torch.equal(weight, kept) for weight, kept in zip(weights, module.ema.ema_weights, strict=True))
    assert module.ema.is_holding_ema_weights


def test_structures_are_found_in_nequip_data():
    frames = read(TRAIN, ":3")
    water = read(TRAIN)
    items = list(ASEDataset(str(TRAIN)))[:3]
    structures = get_family("nequip").structures(torch.nn.Identity(), items)
    assert all((one.positions == other.positions).all() for one, other in zip(structures, frames, strict=True))
    assert structures[0].get_chemical_symbols() == water.get_chemical_symbols() and not structures[0].pbc.any()
    assert get_family("nequip").structures(torch.nn.Identity(), [1, 2]) is None
