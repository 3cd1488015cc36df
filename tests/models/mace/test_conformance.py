"""Every kind of MACE model passes the conformance tests of potentials."""

import pytest
import torch
from mace.calculators import MACECalculator
from mace.modules import MACE, interaction_classes
from toys import tiny_mace

from stable_plugin.models.base import default_dtype
from stable_plugin.models.mace import save_mace
from stable_plugin.testing import PotentialConformance


class MACEConformance(PotentialConformance):
    family = "mace"
    suffix = ".model"
    arguments = {}

    @pytest.fixture(autouse=True)
    def folder(self, tmp_path_factory):
        self.temporary = tmp_path_factory.mktemp("model")

    def make_module(self):
        return tiny_mace([1, 6, 8], **self.arguments)

    def make_calculator(self, module, atoms):
        path = self.temporary / "calculator.model"
        save_mace(module, path)
        with default_dtype(torch.get_default_dtype()):  # the calculator changes the default
            return MACECalculator(model_paths=str(path), device="cpu", default_dtype="float64")

    def save(self, module, path):
        save_mace(module, path)


class TestScaledMACE(MACEConformance):
    arguments = {"channels": 8}


class TestUnscaledMACE(MACEConformance):
    arguments = {"model": MACE, "atomic_inter_scale": None, "atomic_inter_shift": None}


class TestDensityMACE(MACEConformance):
    arguments = {
        "interaction_cls": interaction_classes["RealAgnosticDensityResidualInteractionBlock"],
        "interaction_cls_first": interaction_classes["RealAgnosticDensityInteractionBlock"],
    }


class TestRepulsiveMACE(MACEConformance):
    arguments = {"pair_repulsion": True, "distance_transform": "Agnesi"}


class TestManyBodyMACE(MACEConformance):
    arguments = {"correlation": 2, "num_interactions": 1, "max_ell": 2}


class TestChebyshevMACE(MACEConformance):
    arguments = {"radial_type": "chebyshev"}
