"""Conformance tests that the potential of any family of models can inherit.

A test module of the family defines a subclass of :class:`PotentialConformance`, and pytest does the rest::

    class TestMyModel(PotentialConformance):
        family = "mymodel"

        def make_module(self):
            return my_package.Model(...).double()

        def make_calculator(self, module, atoms):
            return my_package.Calculator(module)

This module needs pytest only where a test is skipped, and a calculator that computes in another way than the adapter, which
is usually the family's own, is what makes the comparison meaningful.
"""

from __future__ import annotations

from stable_plugin.testing.host_reads import HostReads
from stable_plugin.testing.potentials import PotentialConformance
from stable_plugin.testing.tools import rattled_ethanol, small_water_box

__all__ = ["HostReads", "PotentialConformance", "rattled_ethanol", "small_water_box"]
