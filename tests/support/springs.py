"""A training loop on springs that are too soft, shared by tests of the loop, the step size and several processes."""

import torch
from toys import TRIATOMIC, triatomic  # noqa: F401

from stable_plugin import BondDeviation, BondLengths, Langevin, Schedule, StABlEConfig
from stable_plugin.algorithm.assembly import assemble
from stable_plugin.md import Simulator

TEMPERATURE = 300.0
SOFT, STIFF = 0.5, 12.0
"""Spring constants in eV/Å² of the potential in training and of the one that the reference comes from."""


def simulated(potential, start, n_steps, seed=7):
    detector = BondDeviation(0.3, None)
    detector.bind(potential.system, torch.tensor(TRIATOMIC.positions)[None])
    simulator = Simulator(potential, Langevin(TEMPERATURE, 0.5, 20.0), detector)
    generator = torch.Generator().manual_seed(seed)
    return simulator.run(simulator.prepare(start, generator), n_steps, 100, generator)


def make_loop(potential, reference, structures=None, context=None, **changes):
    """Return a short loop on the springs; further arguments change its settings."""
    settings = {
        "integrator": Langevin(TEMPERATURE, 0.5, 20.0),
        "objective": "boltzmann",
        "observables": [BondLengths()],
        "detector": BondDeviation(0.3, 2.0),
        "n_replicas": 24,
        "window_ps": 0.1,
        "record_every_fs": 10.0,
        "schedule": Schedule(max_failures_per_ns=800.0, probe_every=1),
        "steps_per_window": 4,
        "min_ess_fraction": 0.3,
        "seed": 0,
    }
    structures = reference[:10] if structures is None else structures
    return assemble(potential, structures, reference, StABlEConfig(**{**settings, **changes}), context)


def observable_gradient(loop):
    """Return the estimate of the observables for the next step; None at the end."""
    estimates = loop.gradient()
    return None if estimates is None else estimates["observables"]


def optimizer_step(loop, optimizer):
    """Ask for the gradient of the observables and apply it; the estimate, or None at the end."""
    estimate = observable_gradient(loop)
    if estimate is not None:
        for parameter, gradient in zip(loop.potential.trainable_parameters(), estimate.gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    return estimate


def adam(potential, lr=0.1):
    return torch.optim.Adam(potential.module.parameters(), lr=lr)
