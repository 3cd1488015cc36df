"""Structures and small tools of the conformance tests."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import numpy as np
import torch
from ase import Atoms
from ase.build import molecule
from torch import Tensor, nn

from stable_plugin.md.neighbors import Edges
from stable_plugin.md.system import System
from stable_plugin.models import Potential, find_potential

N_REPLICAS = 3
RATTLE_A = 0.08


def rattled_ethanol() -> Atoms:
    """Return an ethanol molecule off its equilibrium, neutral and closed-shell."""
    atoms: Atoms = molecule("CH3CH2OH")
    atoms.rattle(RATTLE_A, seed=0)
    atoms.info.update(charge=0, spin=1)
    return atoms


def small_water_box() -> Atoms:
    """Return four water molecules in a triclinic cell that is smaller than twice the usual cutoffs."""
    random = np.random.default_rng(0)
    cell = 5.5 * np.array([[1.0, 0.0, 0.0], [0.2, 1.0, 0.0], [-0.1, 0.3, 1.0]])
    atoms = Atoms(cell=cell, pbc=True)
    for place in ([0.1, 0.1, 0.1], [0.6, 0.6, 0.1], [0.6, 0.1, 0.6], [0.1, 0.6, 0.6]):
        water = molecule("H2O")
        water.rotate(random.uniform(0, 360), random.normal(size=3))
        water.translate(np.array(place) @ cell - water.positions[0])
        atoms += water
    atoms.rattle(0.5 * RATTLE_A, seed=0)
    atoms.info.update(charge=0, spin=1)
    return atoms


class KeptModule:
    """A module with what is needed to undo changes of its weights, modes and gradient flags."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._tensors = [tensor.detach().clone() for tensor in self._weights()]
        self._states = module_states(module)

    def restored(self) -> nn.Module:
        """Return the module as it was when it was passed in."""
        with torch.no_grad():
            for tensor, original in zip(self._weights(), self._tensors, strict=True):
                tensor.copy_(original)
        for part, mode in zip(self._module.modules(), self._states[0], strict=True):
            part.training = mode
        for parameter, flag in zip(self._module.parameters(), self._states[1], strict=True):
            parameter.requires_grad_(flag)
            parameter.grad = None
        return self._module

    def _weights(self) -> list[Tensor]:
        return [*self._module.parameters(), *self._module.buffers()]


class Case:
    """A module with a structure: its potential and a few rattled replicas."""

    def __init__(self, module: nn.Module, atoms: Atoms) -> None:
        self.module, self.atoms = module, atoms
        self.potential: Potential = find_potential(module, System.from_atoms(atoms))
        noise = np.random.default_rng(6).normal(scale=0.5 * RATTLE_A, size=(N_REPLICAS, len(atoms), 3))
        self.positions = torch.tensor(atoms.positions + noise).to(self.potential.device, self.potential.dtype)

    def edges(self, positions: Tensor | None = None) -> Edges:
        """Return the neighbor graph of positions, by default those of the replicas."""
        return self.potential.edges(self.positions if positions is None else positions)

    def energies_and_forces(
        self, positions: Tensor | None = None, within: Callable[[], AbstractContextManager[None]] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return energies and forces of positions, in a context that is ``frozen`` by default."""
        positions = self.positions if positions is None else positions
        with (within or self.potential.frozen)():
            return self.potential.energies_and_forces(positions, self.edges(positions))


def module_states(module: nn.Module) -> tuple[list[bool], list[bool]]:
    """Return the modes of all submodules and the gradient flags of all parameters."""
    return [part.training for part in module.modules()], [each.requires_grad for each in module.parameters()]


def largest_value(parameter: Tensor) -> float:
    """Return the size of a parameter, so that a step is small for weights of every size."""
    return float(parameter.detach().abs().max()) or 1.0


def finite_difference(function: Callable[[float], Tensor], step: float = 1e-4) -> Tensor:
    """Return the derivative at zero by central differences of fourth order."""
    near, far = (function(scale * step) - function(-scale * step) for scale in (1.0, 2.0))
    return (8.0 * near - far).detach() / (12.0 * step)


def assert_close(result: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raise an AssertionError if two tensors differ by more than the tolerance anywhere, or in shape."""
    torch.testing.assert_close(result.double(), expected.double(), rtol=0.0, atol=tolerance)


def assert_raises(error: type[Exception], text: str, call: Callable[[], Any]) -> None:
    """Raise an AssertionError unless a call raises an error whose message contains the text."""
    try:
        call()
    except error as raised:
        assert text in str(raised), raised
    else:
        raise AssertionError(f"{error.__name__} was not raised")


def skip(reason: str) -> NoReturn:
    """Skip the current test of pytest."""
    import pytest

    pytest.skip(reason)
