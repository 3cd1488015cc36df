"""CHGNet models pass the conformance tests of potentials."""

import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111, molecule

from stable_plugin import System
from stable_plugin.models import find_potential, load_potential
from stable_plugin.testing import PotentialConformance, small_water_box

CHGNetCalculator = pytest.importorskip("chgnet.model.dynamics").CHGNetCalculator

from stable_plugin.models.chgnet import load_chgnet, save_chgnet  # noqa: E402


class CHGNetConformance(PotentialConformance):
    family = "chgnet"
    suffix = ".pth.tar"
    capturable = False  # the number of angles changes from step to step
    dtype = torch.float64
    rotation_tolerance = 1e-5
    gradient_tolerance = 1e-2  # finite differences in the frequencies of its radial functions are inexact
    calculator_tolerance = 1e-4  # CHGNet's calculator works in single precision

    def make_module(self):
        return load_chgnet("chgnet-0.3.0", dtype=self.dtype)

    def make_structures(self):
        boxed = molecule("CH3CH2OH")
        boxed.rattle(0.05, seed=1)
        boxed.cell, boxed.pbc = [10.0, 9.0, 8.0], True
        silicon = bulk(
            "Si"
        )  # two atoms, a cell far smaller than the cutoff, atoms with images of their own as neighbors
        silicon.rattle(0.1, seed=0)
        primitive = bulk("Cu") * (2, 1, 1)
        primitive.rattle(0.05, seed=2)
        slab = fcc111("Cu", (2, 1, 2), vacuum=5.0)
        slab.rattle(0.05, seed=3)
        return {"slab": slab, "boxed": boxed, "periodic": small_water_box(), "silicon": silicon, "copper": primitive}

    def make_calculator(self, module, atoms):
        return CHGNetCalculator(load_chgnet("chgnet-0.3.0"), use_device="cpu")

    def save(self, module, path):
        save_chgnet(module, path)

    def make_load_arguments(self):
        return {"dtype": self.dtype}


class TestCHGNet(CHGNetConformance):
    pass


class TestCHGNetSingle(CHGNetConformance):
    dtype = torch.float32
    energy_tolerance = 1e-4
    force_tolerance = 1e-3
    rotation_tolerance = 1e-3
    calculator_tolerance = 1e-3
    gradient_tolerance = None


def test_potential_is_for_crystals():
    with pytest.raises(ValueError, match=r"model of crystals, but the system is not periodic: put it into"):
        find_potential(load_potential("chgnet-0.3.0"), System.from_atoms(molecule("H2O")))


def test_potential_names_unknown_elements():
    einsteinium = Atoms("Es2", positions=[[0, 0, 0], [0, 0, 2.5]], cell=[5, 5, 5], pbc=True)
    with pytest.raises(ValueError, match=r"does not know the element\(s\) Es \(it knows those up to Pu\)"):
        find_potential(load_potential("chgnet-0.3.0"), System.from_atoms(einsteinium))


def test_load_chgnet_names_missing_and_damaged_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth\.tar' is neither a file nor"):
        load_potential(tmp_path / "nothing.pth.tar")
    with pytest.raises(FileNotFoundError, match=r"'chgnet-9' is neither a file nor .*'chgnet-0\.3\.0'"):
        load_potential("chgnet-9")
    (tmp_path / "damaged.pth.tar").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"damaged\.pth\.tar cannot be read as a CHGNet checkpoint"):
        load_potential(tmp_path / "damaged.pth.tar")
