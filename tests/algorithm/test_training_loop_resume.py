"""A loop interrupted within a window continues as if it had not been, also with a model that draws random numbers."""

import numpy as np
import pytest
import torch
from springs import make_loop, observable_gradient
from toys import TRIATOMIC, Springs

from stable_plugin import BondDeviation, Execution, Langevin, Schedule, System
from stable_plugin.models import ModulePotential

N_STEPS = 8


class Drawing(Springs):
    """Energies that depend slightly on the global random stream, as those of eSEN do through rounding."""

    def forward(self, positions):
        return super().forward(positions) * (1.0 + 0.01 * torch.rand((), dtype=positions.dtype))


class Interruption(Exception):
    pass


def make_drawing_loop():
    frames = torch.tensor(TRIATOMIC.positions) + torch.tensor(
        np.random.default_rng(0).normal(scale=0.03, size=(6, 3, 3))
    )
    system = System.from_atoms(TRIATOMIC)
    return make_loop(
        ModulePotential(Drawing(system.bonds, 3.0, torch.ones(2)), system),
        frames,
        frames,
        integrator=Langevin(300.0, 0.5, 1.0),
        detector=BondDeviation(0.07, 10.0),
        n_replicas=4,
        window_ps=0.01,
        record_every_fs=2.5,
        check_every_fs=2.5,
        schedule=Schedule(lr_patience=1, max_lr_cuts=0, probe_every=1),
        steps_per_window=2,
        execution=Execution(threads=1, compile=False),
    )


def learn(trained, steps):
    """Take steps of gradient descent, each from another state of the trainer's random stream."""
    for step in steps:
        torch.manual_seed(step)
        estimate = observable_gradient(trained)
        with torch.no_grad():
            for parameter, gradient in zip(trained.potential.trainable_parameters(), estimate.gradients, strict=True):
                parameter -= 1e-3 * gradient / gradient.norm()


def outcome(trained):
    """Return records, weights and positions."""
    windows = [{**vars(entry), "wall_s": 0.0} for entry in trained.windows]
    return (
        windows,
        [parameter.item() for parameter in trained.potential.trainable_parameters()],
        trained.replicas.state.positions,
    )


def test_gradient_keeps_the_trainers_random_stream():
    trained = make_drawing_loop()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert observable_gradient(trained) is not None
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("n_reports", [1, 4, 9, 14, 16])
def test_interrupted_window_repeats_its_draws(n_reports):
    whole = make_drawing_loop()
    learn(whole, range(N_STEPS))
    assert {entry.phase for entry in whole.windows} == {"probe", "learn"}

    cut, reports = make_drawing_loop(), []

    def interrupt(progress):
        reports.append(progress)
        if len(reports) == n_reports:
            raise Interruption

    cut.on_progress = interrupt
    taken = 0
    with pytest.raises(Interruption):
        while taken < N_STEPS:
            learn(cut, [taken])
            taken += 1
    resumed = make_drawing_loop()
    resumed.load_state_dict(cut.state_dict())
    resumed.potential.module.load_state_dict(cut.potential.module.state_dict())
    learn(resumed, range(taken, N_STEPS))
    (windows, weights, positions), (expected, expected_weights, expected_positions) = outcome(resumed), outcome(whole)
    assert windows == expected and weights == expected_weights
    assert torch.equal(positions, expected_positions)
