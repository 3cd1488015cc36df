"""Why observables of motion are not trained on: what the gradient of a diffusion coefficient takes, on an exact case."""

import numpy as np
import pytest

from stable_plugin import DiffusionCoefficient, StABlEConfig

KT, FRICTION, TIMESTEP, N_STEPS, N_PARTICLES = 1.0, 1.0, 0.05, 200, 100_000
WAVENUMBER, BARRIER, RECORD_EVERY = 2 * np.pi / 5.0, 3.0, 20


def trajectories(barrier, seed):
    """Simulate particles in U = barrier (1 - cos k x) / 2 from equilibrium.

    Returns:
        Diffusion coefficient of each, dU / d barrier at its start, and d log p / d barrier of the noise it took.
    """
    random = np.random.default_rng(seed)
    tried = random.uniform(0, 2 * np.pi / WAVENUMBER, 8 * N_PARTICLES)
    shape = 0.5 * (1 - np.cos(WAVENUMBER * tried))
    start = tried[random.uniform(size=len(tried)) < np.exp(-barrier * shape / KT)][:N_PARTICLES]
    assert len(start) == N_PARTICLES
    position, velocity = start.copy(), random.normal(0, KT**0.5, N_PARTICLES)
    decay = np.exp(-FRICTION * TIMESTEP)
    kick, noise = (1 - decay) / FRICTION, (KT * (1 - decay**2)) ** 0.5
    score, squared = np.zeros(N_PARTICLES), []
    for step in range(1, N_STEPS + 1):
        normal = random.normal(size=N_PARTICLES)
        force = -0.5 * WAVENUMBER * np.sin(WAVENUMBER * position)
        velocity = decay * velocity + kick * barrier * force + noise * normal
        position = position + TIMESTEP * velocity
        score += normal * kick * force / noise
        if step % RECORD_EVERY == 0:
            squared.append((position - start) ** 2)
    late = np.array(squared[len(squared) // 2 :])
    time = TIMESTEP * RECORD_EVERY * np.arange(len(late))
    time -= time.mean()
    diffusion = (time[:, None] * late).sum(axis=0) / (2 * (time**2).sum())
    return diffusion, 0.5 * (1 - np.cos(WAVENUMBER * start)), score


def mean_and_error(values):
    return values.mean(), values.std() / len(values) ** 0.5


def test_diffusion_responds_through_paths_and_not_through_start_frames():
    """Reweighting the start frames, as for structure, gives no gradient at all; reweighting paths gives it."""
    step = 0.3
    above, below = (mean_and_error(trajectories(BARRIER + sign * step, seed)[0]) for sign, seed in ((1, 1), (-1, 2)))
    expected, error = (above[0] - below[0]) / (2 * step), np.hypot(above[1], below[1]) / (2 * step)
    diffusion, of_start, score = trajectories(BARRIER, 0)
    deviation = diffusion - diffusion.mean()
    frames = mean_and_error(-deviation * (of_start - of_start.mean()) / KT)
    products = deviation * (score - (of_start - of_start.mean()) / KT)
    paths = mean_and_error(products)
    assert abs(frames[0]) < 0.05 * abs(expected)
    assert abs(paths[0] - expected) < 3 * np.hypot(paths[1], error) < 0.3 * abs(expected)
    # What docs/howto/condensed.md says of the cost.
    n_for_20_percent = (products.std() / (0.2 * expected)) ** 2
    assert 1000 < n_for_20_percent < 4000


def test_observables_of_motion_are_refused_with_the_reason():
    diffusion = DiffusionCoefficient(interval_fs=20.0, max_lag_ps=0.4)
    with pytest.raises(ValueError, match=r"are of motion, which is not learned from: evaluate them, as `dynamics`"):
        StABlEConfig(objective="both", observables=[diffusion])
