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
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import aspirin
from stable_plugin import Langevin
from stable_plugin.estimator import BoltzmannEstimator, surrogate_weights, uniform_weights
from stable_plugin.potentials import Potential
from stable_plugin.simulation import Simulator

REPEATS = 21
STEPS = 40


def main() -> None:
    rows = [*simulator_step(32), *estimator_gradient(160)]
    width = max(len(row["case"]) for row in rows)
    for row in rows:
        print(
            f"{row['group']:10} {row['case']:{width}} {row['name']:34} {row['value']:10.3f} {row['unit']:5} "
            f"({row['spread'][0]:.3f} to {row['spread'][1]:.3f})"
        )
    print(f"written to {write(rows)}")


def simulator_step(n_replicas: int) -> list[dict[str, Any]]:
    """A step of the simulator against the model's energy-and-force call on the same batch with the graph given."""
    potential, positions, detector = aspirin(n_replicas)
    simulator = Simulator(potential, Langevin(500.0, 0.5, 1.0), detector)
    generator = torch.Generator().manual_seed(0)
    latest = simulator.prepare(positions, generator)

    def simulate() -> None:
        nonlocal latest
        latest = simulator.run(latest, STEPS, STEPS, generator).end

    def call_model() -> None:
        edges = potential.edges(latest.positions)
        with potential.frozen():
            for _ in range(STEPS):
                potential.energies_and_forces(latest.positions, edges)

    return paired(
        "simulator",
        f"{n_replicas} aspirins, ms per step",
        {"simulator": simulate, "bare model call": call_model},
        1000.0 / STEPS,
        "ms",
    )


def estimator_gradient(n_frames: int) -> list[dict[str, Any]]:
    """One weighted backward pass against the gradient of every frame, as published."""
    potential, positions, _ = aspirin(n_frames)
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
    return [
        {
            "group": group,
            "case": case,
            "name": name,
            "value": statistics.median(measured),
            "unit": measured_unit,
            "spread": [min(measured), max(measured)],
        }
        for name, (measured, measured_unit) in named.items()
    ]


def write(rows: list[dict[str, Any]]) -> Path:
    """Keep the rows with what they were measured on."""
    folder = Path(__file__).parent / "results"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    path = folder / f"{date.today().isoformat()}-cpu.json"
    content = {
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {name: version(name) for name in ("torch", "mace-torch", "e3nn", "stable-plugin")},
        "commit": commit.stdout.strip(),
        "repeats": REPEATS,
        "rows": rows,
    }
    path.write_text(json.dumps(content, indent=1))
    return path


if __name__ == "__main__":
    main()
