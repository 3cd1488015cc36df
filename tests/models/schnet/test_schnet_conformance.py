"""SchNetPack models pass the conformance tests of potentials."""

import copy

import pytest
import torch
from ase.build import molecule

from stable_plugin import System
from stable_plugin.models import find_potential, load_potential
from stable_plugin.testing import PotentialConformance

pytest.importorskip("schnetpack")
import schnet_tools
from schnetpack.atomistic import Aggregation, Atomwise, Forces
from schnetpack.interfaces import SpkCalculator
from schnetpack.transform import ASENeighborList, ScaleProperty

from stable_plugin.models.schnet import SchNetModel, save_schnet

WATER = System.from_atoms(molecule("H2O"))


class SchNetConformance(PotentialConformance):
    family = "schnet"
    suffix = ""
    kind = "schnet"
    dtype = torch.float64
    energy_unit, length_unit, cutoff = "eV", "Ang", 4.0

    def make_module(self):
        network = schnet_tools.make_network(self.kind, self.dtype, self.cutoff)
        return SchNetModel(network, self.energy_unit, self.length_unit)

    def make_calculator(self, module, atoms):
        return SpkCalculator(
            copy.deepcopy(module.network),
            ASENeighborList(cutoff=self.cutoff),
            energy_unit=self.energy_unit,
            position_unit=self.length_unit,
            dtype=self.dtype,
        )

    def save(self, module, path):
        save_schnet(module, path)

    def make_load_arguments(self):
        return {"energy_unit": self.energy_unit, "length_unit": self.length_unit}


class TestSchNet(SchNetConformance):
    pass


class TestSchNetSingle(SchNetConformance):
    dtype = torch.float32
    energy_tolerance = 1e-5
    force_tolerance = 1e-5
    rotation_tolerance = 1e-5
    gradient_tolerance = None


class TestPaiNN(SchNetConformance):
    kind = "painn"


class TestSchNetInKcal(SchNetConformance):
    """A model in the unit of MD17."""

    energy_unit = "kcal/mol"


def test_units_are_converted():
    """A model in Bohr and Hartree is one in Å and eV whose lengths are scaled."""
    positions = torch.tensor(molecule("H2O").positions)[None]
    bohr, hartree = 0.529177210903, 27.211386245988
    plain = SchNetModel(schnet_tools.make_network(cutoff=4.0), "eV")
    other = SchNetModel(plain.network, "Hartree", "Bohr")
    one, two = (find_potential(model, WATER) for model in (plain, other))
    assert two.cutoff == pytest.approx(4.0 * bohr, rel=1e-6)
    assert two.constant_energy == pytest.approx(hartree * one.constant_energy, rel=1e-6)
    scaled = positions * (two.cutoff / one.cutoff)
    with one.frozen(), two.frozen():
        energies = one.energies(positions, one.edges(positions)), two.energies(scaled, two.edges(scaled))
    assert energies[1].item() == pytest.approx(hartree * energies[0].item(), rel=1e-6)


def test_constant_energy_is_that_of_the_offsets():
    model = SchNetModel(schnet_tools.make_network(), "eV")
    assert find_potential(model, WATER).constant_energy == pytest.approx(3 * 0.25 - 2.0 - 3.0)
    model.network.do_postprocessing = False
    assert find_potential(model, WATER).constant_energy == 0.0


def test_unknown_units_are_refused(tmp_path):
    network = schnet_tools.make_network()
    with pytest.raises(
        ValueError, match=r"NeuralNetworkPotential does not say in which unit .*SchNetModel\(model, energy"
    ):
        find_potential(network, WATER)
    save_schnet(SchNetModel(network, "eV"), tmp_path / "best_model")
    with pytest.raises(ValueError, match=r"energy_unit=None: .*pass energy_unit='eV' or 'kcal/mol'"):
        load_potential(tmp_path / "best_model")


def test_unreadable_files_are_refused(tmp_path):
    (tmp_path / "damaged").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"damaged cannot be read as a SchNetPack model"):
        load_potential(tmp_path / "damaged", family="schnet", energy_unit="eV")
    with pytest.raises(FileNotFoundError, match=r"nothing' is not a file"):
        load_potential(tmp_path / "nothing", family="schnet", energy_unit="eV")


def test_energies_that_are_no_sums_are_refused():
    parts = [Atomwise(n_in=8, output_key="short"), Aggregation(["short"], "energy"), Forces()]
    network = schnet_tools.make_network(output_modules=parts, postprocessors=[])
    with pytest.raises(ValueError, match=r"'energy' of the model is not the sum of an Atomwise output .*Aggregation"):
        find_potential(SchNetModel(network, "eV"), WATER)
    scaled = schnet_tools.make_network(postprocessors=[ScaleProperty("energy")])
    with pytest.raises(ValueError, match=r"postprocessor ScaleProperty, which is not a constant"):
        find_potential(SchNetModel(scaled, "eV"), WATER)
