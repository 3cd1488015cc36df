"""Three atoms on springs to the origin, whose steps can be written out in plain numpy."""

import numpy as np
import torch
from toys import TRIATOMIC

from stable_plugin.md.state import State

MASSES = TRIATOMIC.get_masses()
STIFFNESS = 7.0
"""Spring constant in eV/Å²."""


def harmonic(positions):
    """Return energies, different for each replica, and forces."""
    return 0.5 * STIFFNESS * positions.square().sum(dim=(1, 2)), -STIFFNESS * positions


def random_state(chain_length=0, n_replicas=2):
    """Return a state without zeros, with its forces."""
    random = np.random.default_rng(1)
    positions, velocities = torch.tensor(random.normal(scale=0.2, size=(2, n_replicas, 3, 3)))
    chain = torch.tensor(random.normal(scale=0.05, size=(n_replicas, 2, chain_length)))
    energies, forces = harmonic(positions)
    cell = torch.zeros(n_replicas, 3, 3, dtype=torch.float64)
    return State(positions, velocities, forces, energies, chain, cell)


def after(integrator, state, n_steps, seed=3):
    """Return the state after some steps."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n_steps):
        state = integrator.step(state, torch.tensor(MASSES), harmonic, generator)
    return state


def assert_forces_match(state, positions, rtol, atol):
    """Assert that forces and energies belong to the positions (n_replicas, n_atoms, 3)."""
    np.testing.assert_allclose(state.forces.numpy(), -STIFFNESS * positions, rtol=rtol, atol=atol)
    energies = 0.5 * STIFFNESS * (positions**2).sum(axis=(1, 2))
    np.testing.assert_allclose(state.energies.numpy(), energies, rtol=rtol)
