"""SevenNet models pass the conformance tests of potentials."""

import copy
from functools import cache

import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

from stable_plugin import Langevin, NonFinite, System
from stable_plugin.md import Simulator
from stable_plugin.models import find_potential, load_potential, sevennet
from stable_plugin.testing import PotentialConformance

SevenNetCalculator = pytest.importorskip("sevenn.calculator").SevenNetCalculator

WATER = System.from_atoms(molecule("H2O"))


@cache
def loaded(model="7net-0", modal=None):
    """Return a pretrained model, which takes seconds to build; change copies only."""
    return load_potential(model, modal=modal)


def copied(dtype, model="7net-0", modal=None):
    return copy.deepcopy(loaded(model, modal)).to(dtype)


@cache
def calculator(model, modal):
    """Return SevenNet's own calculator."""
    network = copied(torch.float32, model, modal).network
    return SevenNetCalculator(network, "model_instance", device="cpu", modal=modal)


def rattled(atoms, seed=0):
    atoms.rattle(0.1, seed=seed)
    return atoms


class SevenNetConformance(PotentialConformance):
    family = "sevennet"
    suffix = ".pth"
    model, modal = "7net-0", None
    dtype = torch.float64
    rotation_tolerance = 1e-7  # the constants of its tensor products are in single precision
    calculator_tolerance = 2e-5  # SevenNet's calculator works in single precision, with total energies

    def make_module(self):
        return copied(self.dtype, self.model, self.modal)

    def make_calculator(self, module, atoms):
        return calculator(self.model, self.modal)

    def make_structures(self):
        # Two atoms in a triclinic cell: nearly all their neighbors are images.
        return {"molecule": rattled(molecule("CH3OH")), "periodic": rattled(bulk("LiF", "rocksalt", 4.03))}

    def save(self, module, path):
        sevennet.save_sevennet(module, path)

    def make_load_arguments(self):
        return {"dtype": self.dtype, "modal": self.modal}


class TestSevenNet0(SevenNetConformance):
    suffix = None  # files are in single precision, and are tested in it


class TestSevenNet0Single(SevenNetConformance):
    dtype = torch.float32
    energy_tolerance = 1e-4
    force_tolerance = 1e-4
    rotation_tolerance = 1e-4
    gradient_tolerance = None


class TestSevenNetMF0(SevenNetConformance):
    """A model of several modalities."""

    model, modal = "7net-mf-0", "PBE"


def test_potential_names_unknown_elements():
    curium = System.from_atoms(Atoms("Cm2", positions=[[0, 0, 0], [0, 0, 2.5]]))
    with pytest.raises(ValueError, match=r"does not know the element\(s\) Cm"):
        find_potential(loaded(), curium)


def test_potential_names_unknown_modals():
    with pytest.raises(ValueError, match=r"modal=None is not a modality .*use one of \['R2SCAN', 'PBE'\]"):
        find_potential(loaded("7net-mf-0", "PBE").network, WATER)
    with pytest.raises(ValueError, match=r"modal='PBE' is not a modality .*remove it"):
        sevennet.SevenNetPotential(loaded().network, WATER, "PBE")


def test_load_sevennet_names_missing_and_damaged_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth' is neither a file nor a pretrained model"):
        load_potential(tmp_path / "nothing.pth")
    (tmp_path / "damaged.pth").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"damaged\.pth cannot be read as a SevenNet checkpoint"):
        load_potential(tmp_path / "damaged.pth")


def test_simulation_conserves_energy():
    """Without friction the total energy of a simulated molecule stays, through the neighbor list of the simulator."""
    atoms = molecule("H2O")
    potential = find_potential(copied(torch.float64), System.from_atoms(atoms))
    simulator = Simulator(potential, Langevin(300.0, 0.25, 0.0), NonFinite(), check_every_fs=0.25)
    generator = torch.Generator().manual_seed(0)
    positions = torch.tensor(atoms.positions)[None]
    start = simulator.prepare(positions, generator)
    window = simulator.run(start, 80, 40, generator)
    with potential.frozen():
        energies = [
            potential.energies_and_forces(at, potential.edges(at))[0].item()
            + 0.5 * (potential.system.masses[:, None] * speed**2).sum().item()
            for at, speed in ((positions, start.velocities), (window.end.positions, window.end.velocities))
        ]
    assert energies[1] == pytest.approx(energies[0], abs=2e-3)
