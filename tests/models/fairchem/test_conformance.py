"""fairchem models pass the conformance tests of potentials."""

import pytest
import torch
from fairchem.core import FAIRChemCalculator
from fairchem.core.units.mlip_unit import InferenceSettings, load_predict_unit
from fairchem_tools import network, tasks

from stable_plugin.models.fairchem import FairchemModel, save_fairchem
from stable_plugin.testing import PotentialConformance


class FairchemConformance(PotentialConformance):
    family = "fairchem"
    suffix = ".pt"
    kind = "esen"
    dtype = torch.float64
    energy_tolerance = 1e-7
    force_tolerance = 1e-7
    capturable = False  # fairchem builds graphs and checks its inputs on the host
    load_arguments = {"task_name": "omol", "dtype": torch.float64}

    @pytest.fixture(autouse=True)
    def folder(self, tmp_path_factory):
        self.temporary = tmp_path_factory.mktemp("model")

    def make_module(self):
        model = FairchemModel.from_configs(network(self.kind), tasks(self.kind), task_name="omol")
        return model.to(dtype=self.dtype)

    def make_calculator(self, module, atoms):
        path = self.temporary / "calculator.pt"
        save_fairchem(module, path)
        settings = InferenceSettings(base_precision_dtype=self.dtype)
        return FAIRChemCalculator(load_predict_unit(path, settings, device="cpu"), task_name="omol")

    def save(self, module, path):
        save_fairchem(module, path)


class TestESEN(FairchemConformance):
    pass


class TestUMA(FairchemConformance):
    kind = "uma"


class TestAllScAIP(FairchemConformance):
    kind = "allscaip"
    dtype = torch.float32
    energy_tolerance = 1e-3
    force_tolerance = 1e-3
    gradient_tolerance = None
    load_arguments = {"task_name": "omol"}
