"""Molecular dynamics: this package, plain, compiled and captured, against torch-sim and ASE."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import partial
from math import log
from typing import Any

import numpy as np
import torch
from ase import Atoms, units
from ase.md.langevin import Langevin as ASELangevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution

from benchmarks.cases import Case
from benchmarks.table import Row, in_turn, ratios, row
from stable_plugin import Langevin
from stable_plugin.md import Execution, Simulator
from stable_plugin.md.backends.cuda_graph import BlockGraphs

FRICTION_PER_PS = 1.0

ASE_STEPS = 10

CAPTURED_STEPS = 200
"""Steps of a window on a GPU, which take so little time that fewer would measure how a window begins."""


def md(case: Case, repeats: int, steps: int) -> list[Row]:
    """Time one step of each program with the same replicas and the same model."""
    cuda = case.potential.device.type == "cuda"
    fast = "captured" if cuda else "compiled"
    ours = {"plain": Execution(capture=False, compile=False, threads=None)}
    if case.is_mace:  # fairchem models can be neither captured nor compiled
        ours[fast] = Execution(capture=cuda, compile=not cuda, threads=None)
    steps_of = {"captured": CAPTURED_STEPS, "ASE, one replica": ASE_STEPS}
    tasks: dict[str, Callable[[], Any]] = {
        "bare model call": bare(case, steps),
        **{name: simulation(case, steps_of.get(name, steps), execution) for name, execution in ours.items()},
    }
    if cuda:
        tasks["captured bare model call"] = captured_bare(case, steps)
    if case.is_mace:
        tasks["torch-sim"] = torch_sim(case, steps)
        tasks["ASE, one replica"] = ase(case)
    times = in_turn(tasks, repeats)
    n = len(case.positions)
    # ASE simulates replicas one after the other, so n replicas take n times one step.
    per_step = {
        name: [1000.0 * value / steps_of.get(name, steps) for value in values] for name, values in times.items()
    }
    rows = [row("md", case.name, name, values, "ms") for name, values in per_step.items()]
    compared = [("plain", "bare model call")]
    if cuda:
        compared.append(("captured", "captured bare model call"))
    if case.is_mace:
        compared += [("plain", fast), ("torch-sim", "plain"), ("torch-sim", fast)]
    rows += [row("md", case.name, f"{a} / {b}", ratios(per_step[a], per_step[b]), "") for a, b in compared]
    if case.is_mace:
        for name in ours:
            slowdowns = [n * value for value in ratios(per_step["ASE, one replica"], per_step[name])]
            rows.append(row("md", case.name, f"ASE / {name}, per replica", slowdowns, ""))
    return rows


def compiled_and_captured(case: Case, repeats: int) -> list[Row]:
    """Time a captured step with and without a compiled model."""
    names = {"captured": False, "compiled and captured": True}
    times = in_turn(
        {
            name: simulation(case, CAPTURED_STEPS, Execution(capture=True, compile=is_compiled))
            for name, is_compiled in names.items()
        },
        repeats,
    )
    rows = [
        row("compiled", case.name, name, [1000.0 * value / CAPTURED_STEPS for value in values], "ms")
        for name, values in times.items()
    ]
    faster = ratios(times["captured"], times["compiled and captured"])
    return [*rows, row("compiled", case.name, "captured / compiled and captured", faster, "")]


def bare(case: Case, steps: int) -> Callable[[], None]:
    """Return a function that computes energies and forces of one batch with a given neighbor graph."""
    potential, positions = case.potential, case.positions
    edges = potential.edges(positions)

    def call() -> None:
        with potential.simulating():
            for _ in range(steps):
                potential.energies_and_forces(positions, edges)

    return call


def captured_bare(case: Case, steps: int) -> Callable[[], None]:
    """Return the same function as :func:`bare`, captured as a CUDA graph."""
    potential, positions = case.potential, case.positions
    edges = potential.edges(positions)
    generator = torch.Generator(positions.device)

    def block(at: torch.Tensor) -> list[torch.Tensor]:
        return list(potential.energies_and_forces(at, edges))

    with potential.simulating():
        graph = BlockGraphs().get("bare", None, block, [positions], generator)

    def call() -> None:
        for _ in range(steps):
            graph([positions])

    return call


def simulation(
    case: Case,
    steps: int,
    execution: Execution | None = None,
    timed: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function,
) -> Callable[[], None]:
    """Return a function that continues a simulation, with its calls of the neighbor list wrapped by ``timed``."""
    integrator = Langevin(case.temperature_K, case.timestep_fs, FRICTION_PER_PS)
    simulator = Simulator(case.potential, integrator, case.detector, execution=execution)
    for name in ("update", "edges", "did_overflow"):
        setattr(simulator.neighbors, name, timed(getattr(simulator.neighbors, name)))
    generator = torch.Generator(case.potential.device).manual_seed(0)
    state = simulator.prepare(case.positions, generator)

    def simulate() -> None:
        nonlocal state
        state = simulator.run(state, steps, steps, generator).end

    return simulate


def torch_sim(case: Case, steps: int) -> Callable[[], None]:
    """Return a function that continues torch-sim's Langevin dynamics of the same replicas."""
    import torch_sim as ts
    from torch_sim.models.mace import MaceModel

    potential = case.potential
    model = MaceModel(
        model=potential.module,
        device=potential.device,
        dtype=potential.dtype,
        compute_forces=True,
        compute_stress=False,
    )
    time_unit = ts.units.MetalUnits.time
    numbers = {
        "dt": case.timestep_fs / 1000.0 * time_unit,
        "kT": case.temperature_K * ts.units.MetalUnits.temperature,
        "gamma": FRICTION_PER_PS / time_unit,
    }
    settings = {
        name: torch.tensor(value, device=potential.device, dtype=potential.dtype) for name, value in numbers.items()
    }
    start = ts.io.atoms_to_state(_frames(case), potential.device, potential.dtype)
    if hasattr(ts.integrators, "nvt_langevin"):  # up to 0.3, the last for Python 3.11
        initialize, step = ts.integrators.nvt_langevin(model, **settings)
        state = initialize(start, seed=0)
    else:
        start.rng = 0
        state = ts.integrators.nvt_langevin_init(start, model, kT=settings["kT"])
        step = partial(ts.integrators.nvt_langevin_step, model=model, **settings)

    def simulate() -> None:
        nonlocal state
        for _ in range(steps):
            state = step(state)

    return simulate


def ase(case: Case) -> Callable[[], None]:
    """Return a function that continues ASE's Langevin dynamics of one replica with MACE's calculator."""
    from mace.calculators import MACECalculator

    potential = case.potential
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calculator = MACECalculator(
            models=[potential.module], device=str(potential.device), default_dtype=str(potential.dtype).split(".")[-1]
        )
    atoms = _frames(case)[0]
    atoms.calc = calculator
    random = np.random.default_rng(0)
    MaxwellBoltzmannDistribution(atoms, temperature_K=case.temperature_K, rng=random)
    dynamics = ASELangevin(
        atoms,
        timestep=case.timestep_fs * units.fs,
        temperature_K=case.temperature_K,
        friction=FRICTION_PER_PS / (1000.0 * units.fs),
        rng=random,
    )
    return lambda: dynamics.run(ASE_STEPS)


def neighbor_fraction(case: Case, repeats: int, steps: int) -> list[Row]:
    """Measure the fraction of a simulation that is spent on neighbor lists."""
    spent = 0.0

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal spent
            started = time.perf_counter()
            result = function(*arguments)
            spent += time.perf_counter() - started
            return result

        return call

    simulate = simulation(case, steps, Execution(compile=False, threads=None), timed)
    fractions = []
    for _ in range(repeats + 1):
        spent, started = 0.0, time.perf_counter()
        simulate()
        fractions.append(spent / (time.perf_counter() - started))
    return [row("neighbors", case.name, "fraction of a step", fractions[1:], "")]


def growth(cases: dict[int, Case], of: str, repeats: int, steps: int) -> list[Row]:
    """Measure the exponent with which the cost of a step grows, from the smallest to the largest case.

    Args:
        cases: Cases by size.
        of: Unit of the size, such as ``replicas of aspirin``.
        repeats: Number of measurements.
        steps: Steps in each measurement.
    """
    plain = Execution(compile=False, threads=None)
    times = in_turn({str(n): simulation(case, steps, plain) for n, case in cases.items()}, repeats)
    smallest, largest = min(cases), max(cases)
    factors = ratios(times[str(largest)], times[str(smallest)])
    name = f"{smallest} to {largest} {of}"
    return [
        row("growth", name, "cost of a step", factors, "×"),
        row("growth", name, "exponent", [log(factor) / log(largest / smallest) for factor in factors], ""),
    ]


def _frames(case: Case) -> list[Atoms]:
    return [case.potential.system.atoms(positions) for positions in case.positions]
