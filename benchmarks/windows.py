"""StABlE phases of the aspirin recipe: simulation time saved by the failure margin, and by reweighted optimizer steps."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.recipes import ROOT
from benchmarks.table import Row, ratios, row

ROUNDS = ROOT / "build" / "rounds"
"""Where the reports of `rounds` are kept."""

REPLICAS = 16
"""Half as many as in the recipe, to halve the time."""

BOLTZMANN = [
    "+runner.stable.objective=boltzmann",
    "+runner.stable.detector._target_=stable_plugin.BondDeviation",
    "+runner.stable_trainer.accumulate_grad_batches=5",
]
"""The published objective, with the detector and the batches that it needs."""

OBJECTIVES = {
    "failure margin": [],
    "observables": [*BOLTZMANN, "+runner.stable.steps_per_window=3"],
}
"""Overrides of the recipe for each objective."""

MAX_FAILURES_PER_NS = 20
"""Failure rate that is to be verified in the comparison of objectives."""

MAX_WINDOWS = 150
"""Learning windows after which a run that is not verified ends; its steps are then a lower bound."""

SIX_STEPS = [*BOLTZMANN, "+runner.stable.steps_per_window=6", "+runner.stable.min_ess_fraction=0.1"]

NO_REWEIGHTING = "one simulation per step"

VARIANTS = {
    NO_REWEIGHTING: [*BOLTZMANN, "+runner.stable.steps_per_window=1"],
    "six steps": SIX_STEPS,
    "six steps, adaptive learning rate": [*SIX_STEPS, "+runner.stable.max_lr_scale=3.0"],
}
"""Overrides of the recipe. All variants start with its learning rate; the last one adapts it."""


def windows(seeds: int) -> list[Row]:
    """Measure MD steps and time until a window without failures, for several seeds."""
    steps: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(seeds):
            for variant, overrides in VARIANTS.items():
                n_steps, time_s = _until_stable(Path(folder) / f"{variant} {seed}", seed, overrides)
                print(f"seed {seed}, {variant}: {n_steps:.0f} MD steps, {time_s:.0f} s", flush=True)
                steps[variant].append(n_steps)
                seconds[variant].append(time_s)
    case = f"aspirin recipe with {REPLICAS} replicas, {seeds} seeds"
    rows = [row("windows", case, f"{variant}: MD steps of a replica", steps[variant], "") for variant in VARIANTS]
    rows += [row("windows", case, f"{variant}: time", seconds[variant], "s") for variant in VARIANTS]
    for variant in VARIANTS:
        if variant != NO_REWEIGHTING:
            rows.append(
                row(
                    "windows",
                    case,
                    f"MD steps, {NO_REWEIGHTING} / {variant}",
                    ratios(steps[NO_REWEIGHTING], steps[variant]),
                    "",
                )
            )
            rows.append(
                row(
                    "windows",
                    case,
                    f"time, {NO_REWEIGHTING} / {variant}",
                    ratios(seconds[NO_REWEIGHTING], seconds[variant]),
                    "",
                )
            )
    return rows


def rounds(seeds: int) -> list[Row]:
    """Measure the MD until a failure rate is verified with each objective, for several seeds.

    It takes hours: reports are kept in `ROUNDS`, and a run whose report is there is not made again.
    """
    simulated: dict[str, list[float]] = {objective: [] for objective in OBJECTIVES}
    for seed in range(seeds):
        for objective in OBJECTIVES:
            report = until_verified(objective, seed)
            (verification,) = report["verifications"]
            ending = "verified" if verification["is_verified"] else "not verified"
            print(f"seed {seed}, {objective}: {report['md_steps']} MD steps, {ending}", flush=True)
            simulated[objective].append(report["md_steps"])
    case = f"aspirin recipe to {MAX_FAILURES_PER_NS} failures per ns, {seeds} seeds"
    return [
        *(row("rounds", case, f"{objective}: MD steps", simulated[objective], "") for objective in OBJECTIVES),
        row(
            "rounds",
            case,
            "MD steps, observables / failure margin",
            ratios(simulated["observables"], simulated["failure margin"]),
            "",
        ),
    ]


def until_verified(objective: str, seed: int) -> dict[str, Any]:
    """Return the report of a run that ends when the rate is verified, or at the last window."""
    folder = ROUNDS / f"{objective} {seed}".replace(" ", "_")
    report = folder / "run" / "report.json"
    if report.is_file():
        found: dict[str, Any] = json.loads(report.read_text())
        return found
    shutil.rmtree(folder, ignore_errors=True)
    limits = [
        f"runner.stable.schedule.max_failures_per_ns={MAX_FAILURES_PER_NS}",
        f"runner.stable.schedule.max_windows={MAX_WINDOWS}",
    ]
    return _run(folder, seed, [*limits, *OBJECTIVES[objective]])


def _run(folder: Path, seed: int, overrides: list[str]) -> dict[str, Any]:
    """Return the report of a run of the recipe with a short evaluation."""
    command = [
        *(str(Path(sys.executable).parent / "fairchem"), "-c", "recipes/aspirin_mace.yaml"),
        *(f"seed={seed}", f"job.run_dir={folder}", "+job.timestamp_id=run", "runner.evaluation.horizons_ps=[0.1]"),
        *overrides,
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    report: dict[str, Any] = json.loads((folder / "run" / "report.json").read_text())
    return report


def _until_stable(folder: Path, seed: int, overrides: list[str]) -> tuple[float, float]:
    short = [
        "runner.stable.schedule.max_windows=20",
        "runner.stable.schedule.max_failures_per_ns=30000",  # one window
        *(f"runner.stable.n_replicas={REPLICAS}", f"runner.evaluation.n_replicas={REPLICAS}"),
    ]
    report = _run(folder, seed, [*short, *overrides])
    records = report["windows"]
    # Windows count in full, including the one that shows that no replica fails.
    last = next(
        (i for i, record in enumerate(records) if i > 0 and record["unstable_fraction"] == 0.0), len(records) - 1
    )
    per_window = report["md_steps"] / len(records) / report["before"]["replicas"]
    return (last + 1) * per_window, sum(record["wall_s"] for record in records[: last + 1])
