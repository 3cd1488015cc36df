"""NequIP models pass the conformance tests of potentials."""

import copy
from typing import ClassVar

import pytest
import torch
from ase import Atoms
from ase.build import molecule

from stable_plugin import System
from stable_plugin.models import find_potential
from stable_plugin.testing import PotentialConformance

pytest.importorskip("nequip.model")
from nequip.data.ase import from_ase
from nequip.integrations.ase import NequIPCalculator
from nequip.integrations.utils import basic_transforms
from nequip_tools import make_model

from stable_plugin.models.nequip import NequIPPotential


class NequIPConformance(PotentialConformance):
    family = "nequip"
    settings: ClassVar[dict] = {}

    def make_module(self):
        return make_model(**self.settings)

    def make_calculator(self, module, atoms):
        names = module.type_names
        return NequIPCalculator(
            copy.deepcopy(module).eval(),
            "cpu",
            transforms=basic_transforms(
                module.metadata, float(module.metadata["r_max"]), names, {name: name for name in names}
            ),
        )

    def make_graphs(self, module, frames):
        return module, [from_ase(frame) for frame in frames]


class TestNequIP(NequIPConformance):
    pass


class TestNequIPSingle(NequIPConformance):
    """The network in single precision, positions and sums in double, as NequIP has it."""

    settings: ClassVar = {"model_dtype": "float32"}
    energy_tolerance = 1e-5
    force_tolerance = 1e-5
    rotation_tolerance = 1e-5
    gradient_tolerance = None


class TestNequIPWithPairPotential(NequIPConformance):
    """Cutoffs by types of atoms, a pair potential, and shifts that are trained."""

    settings: ClassVar = {
        "per_edge_type_cutoff": {"H": 2.5, "C": {"H": 3.0}},
        "pair_potential": {
            "_target_": "nequip.nn.pair_potential.ZBL",
            "units": "metal",
            "chemical_species": ["H", "C", "O"],
        },
        "per_type_energy_shifts_trainable": True,
        "per_type_energy_scales_trainable": True,
    }


class TestNequIPWithoutShifts(NequIPConformance):
    settings: ClassVar = {"per_type_energy_shifts": None, "per_type_energy_scales": None}


def test_potential_names_unknown_types():
    argon = System.from_atoms(Atoms("Ar2", positions=[[0, 0, 0], [0, 0, 3.0]]))
    with pytest.raises(ValueError, match=r"does not know the atom type\(s\) Ar \(it knows H, C, O\)"):
        find_potential(make_model(), argon)


def test_potential_maps_elements_to_types():
    water = System.from_atoms(molecule("H2O"))
    model = make_model(type_names=["light", "C", "O"], per_type_energy_shifts={"light": -1.0, "C": -2.0, "O": -3.0})
    mapped = NequIPPotential(model, water, types={"H": "light"})
    plain = find_potential(make_model(), water)
    positions = torch.tensor(molecule("H2O").positions)[None]
    with mapped.frozen(), plain.frozen():
        energies = [each.energies(positions, each.edges(positions)) for each in (mapped, plain)]
    assert torch.equal(*energies)
    assert mapped.constant_energy == plain.constant_energy == -5.0
    assert "types={'H': 'light'}" in repr(mapped)
