"""Boltzmann estimator: one backward pass against the published variant with the gradient of every frame."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.cases import Case, aspirin
from benchmarks.memory import in_own_process, peak_mb
from benchmarks.table import Row, ratios, row
from stable_plugin.algorithm.estimator import BoltzmannEstimator, surrogate_weights, uniform_weights

FRAMES, PARAMETERS = (64, 256, 512, 1024), (8, 128, 256)
"""Number of aspirin frames, and channels of the model: 20,000 to a million parameters."""

CHANNELS = 46
"""Channels of the model for which the number of frames is varied: 60,000 parameters."""

CHUNK = 64
"""Frames per call of the model, in both variants."""


def estimator(repeats: int) -> Iterator[list[Row]]:
    """Measure time and peak memory of both variants, each measurement in its own process."""
    settings = [(n_frames, CHANNELS) for n_frames in FRAMES] + [(128, channels) for channels in PARAMETERS]
    for n_frames, channels in settings:
        rows = []
        measured: dict[str, list[tuple[int, float, float]]] = {"one backward": [], "gradient of every frame": []}
        for _ in range(repeats):
            for variant, results in measured.items():
                results.append(in_own_process(_measured, variant, n_frames, channels))
        n_parameters = measured["one backward"][0][0]
        case = f"{n_frames} frames, {n_parameters} parameters"
        seconds = {variant: [result[1] for result in results] for variant, results in measured.items()}
        for variant, results in measured.items():
            rows.append(row("estimator", case, variant, seconds[variant], "s"))
            rows.append(row("estimator", case, f"{variant}: peak memory", [result[2] for result in results], "MB"))
        speedup = ratios(seconds["gradient of every frame"], seconds["one backward"])
        yield [*rows, row("estimator", case, "gradient of every frame / one backward", speedup, "")]


def _measured(variant: str, n_frames: int, channels: int) -> tuple[int, float, float]:
    """Return the number of parameters, the seconds, and the megabytes beyond model and frames."""
    case = aspirin(n_frames, channels=channels)
    positions = case.positions
    values = torch.linalg.vector_norm(positions[:, 0] - positions[:, 1], dim=-1)[:, None].double()
    variants: dict[str, Callable[[Case, torch.Tensor], Any]] = {
        "one backward": one_backward,
        "gradient of every frame": gradient_of_every_frame,
    }
    few = aspirin(CHUNK, channels=channels)
    for _ in range(2):  # TorchScript optimizes in its first calls
        one_backward(few, values[:CHUNK])
    before = peak_mb(reset=True)
    started = time.perf_counter()
    variants[variant](case, values)
    seconds = time.perf_counter() - started
    return sum(p.numel() for p in case.potential.trainable_parameters()), seconds, peak_mb() - before


def one_backward(case: Case, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the gradient of the squared mean of the values, as this package computes it."""
    estimate = BoltzmannEstimator(case.potential, 500.0, chunk=CHUNK).estimate(
        case.positions, [values], [torch.zeros(1, dtype=torch.float64)]
    )
    return tuple(estimate.gradients)


def gradient_of_every_frame(case: Case, values: torch.Tensor) -> torch.Tensor:
    """Return the same gradient from the (n_frames, n_parameters) matrix of energy gradients."""
    potential = case.potential
    parameters = potential.trainable_parameters()
    matrix = []
    for part in case.positions.split(CHUNK):
        energies = potential.energies(part, potential.edges(part))
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
    weights = uniform_weights(len(case.positions), case.positions)
    upstream = 2.0 * values.mean(dim=0)
    return surrogate_weights(values, upstream, weights, 500.0).float() @ torch.stack(matrix)
