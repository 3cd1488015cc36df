"""Times this package against the bare work it is made of: ``make bench``.

Every pair is measured in turn in one process, so that a change of the machine's speed hits both.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case, aspirin, peptide, water
from stable_plugin import Langevin
from stable_plugin.estimator import BoltzmannEstimator, surrogate_weights, uniform_weights
from stable_plugin.potentials import Potential
from stable_plugin.simulation import Simulator, State

REPEATS = 21
STEPS = 40


def main() -> None:
    small, large = water(1), water(1, repeat=2)
    rows = [
        *simulator_step(aspirin(32)),
        *simulator_step(peptide(8), repeats=7),
        *simulator_step(water(4), repeats=7),
        *neighbour_share(small),
        *neighbour_share(large, repeats=3),
        *growth(small, large),
        *estimator_gradient(160),
    ]
    width = max(len(each["case"]) for each in rows)
    for each in rows:
        low, high = each["spread"]
        print(
            f"{each['group']:10} {each['case']:{width}} {each['name']:34} {each['value']:10.3f} {each['unit']:5} "
            f"({low:.3f} to {high:.3f})"
        )
    print(f"written to {write(rows)}")


def simulator_step(case: Case, repeats: int = REPEATS) -> list[dict[str, Any]]:
    """A step of the simulator against the model's energy-and-force call on the same batch with the graph given."""
    simulate, latest = simulation(case)

    def call_model() -> None:
        positions = latest().positions
        edges = case.potential.edges(positions)
        with case.potential.simulating():
            for _ in range(STEPS):
                case.potential.energies_and_forces(positions, edges)

    tasks = {"simulator": simulate, "bare model call": call_model}
    return paired("simulator", f"{case.name}, per step", tasks, 1000.0 / STEPS, "ms", repeats)


def neighbour_share(case: Case, repeats: int = 7) -> list[dict[str, Any]]:
    """Time that a simulation spends on its neighbour lists."""
    spent = 0.0

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal spent
            began = time.perf_counter()
            result = function(*arguments)
            spent += time.perf_counter() - began
            return result

        return call

    simulate, _ = simulation(case, timed)
    shares = []
    for _ in range(repeats + 1):
        spent, began = 0.0, time.perf_counter()
        simulate()
        shares.append(spent / (time.perf_counter() - began))
    return [row("neighbours", case.name, "share of a step", shares[1:], "")]


def growth(small: Case, large: Case) -> list[dict[str, Any]]:
    """What a step costs in a larger cell."""
    tasks = {"large cell": simulation(large)[0], "small cell": simulation(small)[0]}
    return paired("growth", f"{large.name} and {small.name}, per step", tasks, 1000.0 / STEPS, "ms", repeats=3)


def simulation(
    case: Case, timed: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function
) -> tuple[Callable[[], None], Callable[[], State]]:
    """A function that goes on with a simulation, and one that says where it is; neighbour lists are ``timed``."""
    simulator = Simulator(case.potential, Langevin(case.temperature_K, case.timestep_fs, 1.0), case.detector)
    for name in ("update", "edges", "missed"):
        setattr(simulator.neighbors, name, timed(getattr(simulator.neighbors, name)))
    generator = torch.Generator().manual_seed(0)
    state = simulator.prepare(case.positions, generator)

    def simulate() -> None:
        nonlocal state
        state = simulator.run(state, STEPS, STEPS, generator).end

    return simulate, lambda: state


def estimator_gradient(n_frames: int) -> list[dict[str, Any]]:
    """One weighted backward pass against the gradient of every frame, as published."""
    case = aspirin(n_frames)
    potential, positions = case.potential, case.positions
    estimator = BoltzmannEstimator(potential, 500.0, chunk=40)
    values = torch.linalg.vector_norm(positions[:, 0] - positions[:, 1], dim=-1)[:, None].double()
    target = [torch.zeros(1, dtype=torch.float64)]
    n_parameters = sum(parameter.numel() for parameter in potential.trainable_parameters())
    return paired(
        "estimator",
        f"{n_frames} frames, {n_parameters} parameters",
        {
            "one backward": lambda: estimator.estimate(positions, [values], target),
            "gradient of every frame": lambda: explicit_gradient(potential, positions, values),
        },
        1.0,
        "s",
        repeats=3,
    )


def explicit_gradient(potential: Potential, positions: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The same gradient from the (n_frames, n_parameters) matrix of energy gradients."""
    parameters = potential.trainable_parameters()
    matrix = []
    for part in positions.split(40):
        energies = potential.atomic_energies(part, potential.edges(part)).sum(dim=1)
        for energy in energies:
            gradient = torch.autograd.grad(energy, parameters, retain_graph=True, allow_unused=True)
            matrix.append(
                torch.cat(
                    [
                        torch.zeros_like(p).flatten() if g is None else g.flatten()
                        for p, g in zip(parameters, gradient, strict=True)
                    ]
                )
            )
    weights = uniform_weights(len(positions), positions)
    upstream = 2.0 * values.mean(dim=0)
    return surrogate_weights(values, upstream, weights, 500.0).float() @ torch.stack(matrix)


def paired(
    group: str, case: str, tasks: dict[str, Callable[[], Any]], scale: float, unit: str, repeats: int = REPEATS
) -> list[dict[str, Any]]:
    """Medians of tasks run in turn, and the median of their ratio repeat by repeat."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for task in tasks.values():
        task()
    for _ in range(repeats):
        for name, task in tasks.items():
            began = time.perf_counter()
            task()
            times[name].append(scale * (time.perf_counter() - began))
    (first, ours), (second, theirs) = times.items()
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    named = {first: (ours, unit), second: (theirs, unit), f"{first} / {second}": (ratios, "")}
    return [row(group, case, name, measured, measured_unit) for name, (measured, measured_unit) in named.items()]


def row(group: str, case: str, name: str, measured: Sequence[float], unit: str) -> dict[str, Any]:
    """One line of the table: median and spread."""
    return {
        "group": group,
        "case": case,
        "name": name,
        "value": statistics.median(measured),
        "unit": unit,
        "spread": [min(measured), max(measured)],
    }


def write(rows: list[dict[str, Any]]) -> Path:
    """Keep the rows with what they were measured on."""
    folder = Path(__file__).parent / "results"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    path = folder / f"{date.today().isoformat()}-cpu.json"
    content = {
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {
            name: version(name) for name in ("torch", "mace-torch", "fairchem-core", "e3nn", "vesin", "stable-plugin")
        },
        "commit": commit.stdout.strip(),
        "repeats": REPEATS,
        "rows": rows,
    }
    path.write_text(json.dumps(content, indent=1))
    return path


if __name__ == "__main__":
    main()
