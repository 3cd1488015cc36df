"""Failure rates by splitting, against a transition matrix, transition state theory and arithmetic."""

from math import exp, log, log1p, pi, sqrt

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.units import fs, kB
from scipy import stats
from torch import nn

from stable_plugin import AnyOf, BondDeviation, BondLengths, Langevin, NonFinite, NoseHooverChain
from stable_plugin.detectors import TemperatureExplosion
from stable_plugin.detectors.limits import Limits
from stable_plugin.evaluation import Evaluator
from stable_plugin.evaluation.page import render
from stable_plugin.evaluation.simulated_splitting import SimulatedReplicas
from stable_plugin.evaluation.simulation import start_state
from stable_plugin.evaluation.splitting import Run, estimate, split
from stable_plugin.evaluation.verdict import judge, judge_by_splitting, sentence
from stable_plugin.models import ModulePotential, find_potential

UP, GOAL, N_CHECKS = 0.3, 11, 40
TEMPERATURE_K, LENGTH, BARRIER_AT, N_BONDS = 500.0, 1.1, 0.2, 4
KT = kB * TEMPERATURE_K


class Walkers:
    """Random walks on 0, 1, 2, ... with a wall at 0, which fail at the goal: many have equal values."""

    def __init__(self, n_replicas, seed):
        self.places = np.zeros(n_replicas, dtype=int)
        self.random = np.random.default_rng(seed)

    def advance(self, active):
        steps = np.where(self.random.random(len(self.places)) < UP, 1, -1)
        self.places = np.where(active.numpy(), np.maximum(self.places + steps, 0), self.places)
        return np.where(self.places >= GOAL, np.inf, self.places).tolist()

    def copy(self, rows):
        return [int(self.places[row]) for row in rows]

    def put(self, rows, states):
        self.places[list(rows)] = states


def exact_probability():
    matrix = np.zeros((GOAL + 1, GOAL + 1))
    for place in range(GOAL):
        matrix[place, place + 1] += UP
        matrix[place, max(place - 1, 0)] += 1.0 - UP
    matrix[GOAL, GOAL] = 1.0
    return np.linalg.matrix_power(matrix, N_CHECKS)[0, GOAL]


def walk(seed, n_replicas=32):
    return split(Walkers(n_replicas, seed), n_replicas, N_CHECKS, torch.Generator().manual_seed(seed))


def test_split_has_no_bias_with_ties():
    found = np.array([walk(seed).probability for seed in range(400)])
    standard_error = found.std() / sqrt(len(found))
    assert abs(found.mean() - exact_probability()) < 3.0 * standard_error
    assert standard_error < 0.1 * exact_probability()


def test_split_interval_contains_the_truth():
    truth = -1000.0 * log1p(-exact_probability()) / N_CHECKS
    estimates = [estimate([walk(4 * trial + run) for run in range(4)], 32, N_CHECKS, 1.0) for trial in range(40)]
    assert sum(each.interval[0] <= truth <= each.interval[1] for each in estimates) >= 34
    widths = [log(each.interval[1] / each.interval[0]) for each in estimates if each.interval[0] > 0.0]
    assert np.median(widths) < log(100.0)
    # Counting would see no failure in most estimates from as many walks.
    walks = np.mean([1000.0 * each.followed_ns / N_CHECKS for each in estimates])
    assert walks * exact_probability() < 0.5


def run_of(probability, n_levels=3, failures=0):
    return Run(probability, 0.1, n_levels, failures, 320, 640)


def test_estimate_without_failures_is_a_bound():
    found = estimate([run_of(0.0)] * 4, 32, 10, 0.1)
    assert found.failures_per_ns is None
    # Clopper and Pearson for 0 of 128, over 1 ps.
    assert found.interval == (0.0, pytest.approx(-1000.0 * log(0.025) / 128, rel=1e-9))


def test_estimate_with_a_run_without_failures():
    found = estimate([run_of(0.0), *[run_of(0.02, failures=1)] * 3], 32, 10, 0.1)
    assert found.failures_per_ns == pytest.approx(-1000.0 * log1p(-0.015))
    assert found.interval == (0.0, pytest.approx(-1000.0 * log1p(-stats.beta.ppf(0.975, 4, 125))))


def test_estimate_from_the_spread_of_runs():
    p = [0.001, 0.002, 0.004, 0.008]
    found = estimate([run_of(each) for each in p], 32, 10, 0.1)
    factor = exp(stats.t.ppf(0.975, 3) * np.std(np.log(p), ddof=1) / 2)
    assert found.failures_per_ns == pytest.approx(-1000.0 * log1p(-0.00375))
    assert found.interval == pytest.approx(
        (-1000.0 * log1p(-0.00375 / factor), -1000.0 * log1p(-0.00375 * factor)), rel=1e-9
    )
    equal = estimate([run_of(0.004)] * 4, 32, 10, 0.1)
    assert log(equal.interval[1] / equal.interval[0]) == pytest.approx(1.96 * sqrt(0.1), rel=0.01)


def test_estimate_counts_where_many_replicas_fail():
    found = estimate([Run(1.0, 0.0, 0, 32, 320, 320)] * 4, 32, 20, 0.1)
    time_ns = 4 * 320 * 0.1 / 1000.0
    low, high = stats.gamma.ppf(0.025, 128) / time_ns, stats.gamma.ppf(0.975, 129) / time_ns
    assert found.failures_per_ns == pytest.approx(128 / time_ns)
    assert found.interval == pytest.approx((low, high))


class Bonds(nn.Module):
    """Independent bonds, U = h sin²(π x / 2 b) with x off the mean length: a barrier h at b, a hole behind it.

    Args:
        height: h in eV.
        breaks: Whether the energy is NaN behind the barrier.
    """

    def __init__(self, height, breaks=False):
        super().__init__()
        self.height = nn.Parameter(torch.tensor(height, dtype=torch.float64))
        self.breaks = breaks

    def stable_potential(self, system):
        return ModulePotential(self, system)

    def forward(self, positions):
        x = torch.linalg.vector_norm(positions[:, ::2] - positions[:, 1::2], dim=-1) - LENGTH
        energy = self.height * (0.5 * pi * x / BARRIER_AT).sin().square()
        return torch.where(x.abs() < BARRIER_AT, energy, torch.nan if self.breaks else energy).sum(-1)


def weights(height, x):
    return (LENGTH + x) ** 2 * np.exp(-height * np.sin(0.5 * pi * x / BARRIER_AT) ** 2 / KT)


def rate_per_ns(height):
    """Return the rate of crossing any barrier by transition state theory."""
    x = np.linspace(-BARRIER_AT, BARRIER_AT, 4001)
    weight = weights(height, x)
    flux = sqrt(KT / (2.0 * pi * 14.007 / 2.0)) * (weight[0] + weight[-1])
    return N_BONDS * flux / np.trapezoid(weight, x) * 1e6 * fs


def molecules(height, n_frames=100):
    """Return frames of four molecules of nitrogen at equilibrium, far from each other."""
    random = np.random.default_rng(0)
    x = np.linspace(-0.9 * BARRIER_AT, 0.9 * BARRIER_AT, 4001)
    cumulative = np.cumsum(weights(height, x))
    frames = []
    for _ in range(n_frames):
        lengths = LENGTH + np.interp(random.random(N_BONDS), cumulative / cumulative[-1], x)
        directions = random.normal(size=(N_BONDS, 3))
        half = 0.5 * lengths[:, None] * directions / np.linalg.norm(directions, axis=1, keepdims=True)
        centers = 20.0 * np.arange(N_BONDS)[:, None] * [1.0, 0.0, 0.0]
        frames.append(Atoms("N2" * N_BONDS, np.stack([centers + half, centers - half], axis=1).reshape(-1, 3)))
    return frames


def evaluator(height=0.5, **changes):
    settings = {
        "starts": molecules(height),
        "detector": BondDeviation(0.25),
        "observables": [BondLengths()],
        "integrator": Langevin(TEMPERATURE_K, 1.0, 20.0),
        "n_replicas": 32,
        "horizons_ps": [0.25],
        "bonds": [(2 * bond, 2 * bond + 1) for bond in range(N_BONDS)],
        "method": "splitting",
    }
    return Evaluator(**{**settings, **changes})


@pytest.mark.parametrize("breaks", [False, True], ids=["hole", "nan"])
def test_splitting_agrees_with_transition_state_theory(breaks):
    height = 10.0 * KT
    settings = {"horizons_ps": [0.4], "integrator": Langevin(TEMPERATURE_K, 2.0, 10.0), "check_every_fs": 8.0}
    (summary,) = evaluator(height, record_every_fs=80.0, **settings).evaluate(Bonds(height, breaks)).summaries
    found = summary["splitting"]
    low, high = found["interval"]
    assert low < rate_per_ns(height) < high < 200.0 * low
    # Counting four failures takes longer.
    assert found["followed_ns"] < 4.0 / rate_per_ns(height)
    assert found["horizon_ps"] == pytest.approx(0.4) and len(found["probabilities"]) == 4
    assert summary["verdict"]["method"] == "splitting" and summary["verdict"]["interval"] == found["interval"]


def test_evaluate_by_splitting_in_the_report():
    result = evaluator(n_replicas=8, horizons_ps=[0.05, 0.1], max_failures_per_ns=1e4).evaluate(Bonds(0.5))
    first, last = result.summaries
    assert "splitting" not in first and first["verdict"]["method"] == "direct"
    again = evaluator(n_replicas=8, horizons_ps=[0.05, 0.1], max_failures_per_ns=1e4).evaluate(Bonds(0.5)).summaries[1]
    assert again["splitting"] == last["splitting"]
    report = {"title": "T", "evaluation": first, "extended": {"evaluation": last}}
    page = render(report, [], result.axes)
    assert "Failure rate by splitting" in page and "Adaptive multilevel splitting" in page
    assert "by splitting (10,000 per ns asked for)" in page or "by splitting (1e+04 per ns asked for)" in page


@pytest.mark.parametrize(
    ("rate", "interval", "text"),
    [
        (0.02, (0.01, 0.05), "Holds: 0.02 failures per ns (95 %: 0.01 to 0.05) by splitting (1 per ns asked for)."),
        (3.0, (2.0, 5.0), "Fails: 3 failures per ns (95 %: 2 to 5) by splitting (1 per ns asked for)."),
        (
            0.5,
            (0.2, 2.0),
            "Not known: 0.5 failures per ns (95 %: 0.2 to 2) by splitting (1 per ns asked for); pass more replicas.",
        ),
        (None, (0.0, 0.9), "Holds: no failure found, at most 0.9 per ns (95 %) by splitting (1 per ns asked for)."),
    ],
)
def test_verdict_by_splitting(rate, interval, text):
    counted = judge(0, 32.0, "bonds").as_dict()
    assert sentence(judge_by_splitting(counted, rate, interval)) == text


@pytest.mark.parametrize("limited", [False, True])
def test_splitting_counts_energies_outside_the_limits(limited):
    own = evaluator()
    simulator = own.settings.simulator(find_potential(Bonds(0.5), own.system), own.detector)
    generator = torch.Generator().manual_seed(0)
    state = start_state(simulator, own.starts, own.settings, generator)
    limit = float(state.energies.median())
    limits = Limits(*(torch.tensor([value]) for value in (0.5 * limit, 0.0, limit))) if limited else None
    replicas = SimulatedReplicas(simulator, state, generator, limits)
    values = torch.tensor(replicas.advance(torch.ones(32, dtype=torch.bool)))
    outside = replicas.state.energies > limit
    assert 0 < int(outside.sum()) < 32
    assert torch.equal(values.isinf(), outside & limited)
    inside = ~outside
    expected = own.detector.measure(replicas.state.positions, replicas.state.velocities)
    assert (values[inside] >= expected[inside].float()).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "sampling"}, r"method='sampling' is not a method: pass 'direct' or 'splitting'"),
        ({"integrator": NoseHooverChain(500.0)}, r"integrator=NoseHooverChain.*stay equal without noise. Use Langevin"),
        ({"integrator": Langevin(500.0, 1.0, 0.0)}, r"friction_per_ps above 0"),
        ({"n_replicas": 7}, r"n_replicas=7 is too few for method='splitting': pass at least 8"),
        (
            {"detector": AnyOf([NonFinite(), AnyOf([TemperatureExplosion(1e4)])])},
            r"detector=TemperatureExplosion.*looks back in time.*Pass a detector that judges single frames",
        ),
    ],
)
def test_evaluator_refuses_splitting(changes, message):
    with pytest.raises(ValueError, match=message):
        evaluator(**changes)
