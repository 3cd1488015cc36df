"""Peak memory of a simulation, measured in separate processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.cases import aspirin
from benchmarks.table import Row, row
from stable_plugin import Langevin
from stable_plugin.md import Execution, Simulator

T = TypeVar("T")

FEW, MANY = 32, 256
"""Numbers of replicas; the difference in memory is due to the replicas alone, without the program itself."""

STEPS = 20


def memory(device: str, repeats: int) -> list[Row]:
    """Measure the peak memory of a simulation per replica of aspirin."""
    per_replica = []
    for _ in range(repeats):
        few, many = (in_own_process(_simulated, n, device) for n in (FEW, MANY))
        per_replica.append((many - few) / (MANY - FEW))
    return [row("memory", f"{FEW} to {MANY} aspirins, MACE", "plain, per replica", per_replica, "MB")]


def in_own_process(measure: Callable[..., T], *arguments: Any) -> T:
    """Call a function of a module in a new process, where nothing was allocated before."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, arguments)


def peak_mb(device: str = "cpu", reset: bool = False) -> float:
    """Return the peak memory since the last reset in MB, of a CUDA device or of this process (Linux only)."""
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**20
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024.0 for line in lines if line.startswith("VmHWM"))


def _simulated(n_replicas: int, device: str) -> float:
    case = aspirin(n_replicas, device)
    execution = Execution(capture=False, compile=False, threads=None)
    simulator = Simulator(case.potential, Langevin(case.temperature_K), case.detector, execution=execution)
    generator = torch.Generator(device).manual_seed(0)
    state = simulator.prepare(case.positions, generator)
    before = peak_mb(device, reset=True)
    simulator.run(state, STEPS, STEPS, generator)
    return peak_mb(device) - before
