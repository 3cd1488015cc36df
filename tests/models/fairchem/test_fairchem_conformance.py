"""fairchem models pass the conformance tests of potentials."""

from math import inf
from typing import ClassVar

import pytest
import torch
from fairchem.core import FAIRChemCalculator
from fairchem.core.units.mlip_unit import InferenceSettings, load_predict_unit
from fairchem_tools import network, tasks

from stable_plugin.models.base import default_dtype
from stable_plugin.models.fairchem import FairchemModel, FairchemModule, save_fairchem
from stable_plugin.testing import PotentialConformance


class FairchemConformance(PotentialConformance):
    family = "fairchem"
    suffix = ".pt"
    kind = "esen"
    dtype = torch.float64
    energy_tolerance = 1e-7
    force_tolerance = 1e-7
    rotation_tolerance = 1e-5  # the Wigner matrices of fairchem are rotations to single precision
    graph_labels: ClassVar = {"charge": 1, "spin": 2}
    capturable = False  # fairchem builds graphs and checks its inputs on the host

    @pytest.fixture(autouse=True)
    def folder(self, tmp_path_factory):
        self.temporary = tmp_path_factory.mktemp("model")

    def make_module(self):
        with default_dtype(self.dtype):  # as load_fairchem does, for buffers that no checkpoint contains
            return FairchemModel.from_configs(network(self.kind), tasks(self.kind), task_name="omol").to(
                dtype=self.dtype
            )

    def make_calculator(self, module, atoms):
        path = self.temporary / "calculator.pt"
        save_fairchem(module, path)
        settings = InferenceSettings(base_precision_dtype=self.dtype)
        return FAIRChemCalculator(load_predict_unit(path, settings, device="cpu"), task_name="omol")

    def save(self, module, path):
        save_fairchem(module, path)

    def make_graphs(self, module, frames):
        path = self.temporary / "pretrained.pt"
        path.unlink(missing_ok=True)
        save_fairchem(module, path)
        trainer = FairchemModule(checkpoint=path, task_name="omol")
        return trainer, trainer.dataloader(frames, 1, shuffle=False).dataset

    def make_load_arguments(self):
        return {"task_name": "omol", "dtype": self.dtype}


class TestESEN(FairchemConformance):
    pass


class TestUMA(FairchemConformance):
    kind = "uma"


class TestAllScAIP(FairchemConformance):
    kind = "allscaip"
    dtype = torch.float32
    rotation_tolerance = inf
    energy_tolerance = 1e-3
    force_tolerance = 1e-3
    gradient_tolerance = None
