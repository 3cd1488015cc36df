"""SevenNet models pass the conformance tests of potentials."""

import pytest
import torch

pytest.importorskip("sevenn")

from sevenn.calculator import SevenNetCalculator

from stable_plugin.models.sevennet import load_sevennet, save_sevennet
from stable_plugin.testing import PotentialConformance


class SevenNetConformance(PotentialConformance):
    family = "sevennet"
    suffix = ".pth"
    model, modal = "7net-0", None
    dtype = torch.float64
    energy_tolerance = 1e-8
    force_tolerance = 1e-8
    load_arguments = {"dtype": torch.float64}

    def make_module(self):
        return load_sevennet(self.model, dtype=self.dtype, modal=self.modal)

    def make_calculator(self, module, atoms):
        return SevenNetCalculator(self.model, device="cpu", modal=self.modal)

    def save(self, module, path):
        save_sevennet(module, path)


class TestSevenNet0(SevenNetConformance):
    pass
