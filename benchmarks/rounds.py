"""Whole rounds of the demo: what reweighted steps save."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.table import Row, ratios, row

ROOT = Path(__file__).parents[1]

REPLICAS = 16
"""Half as many as in the recipe: half the time."""

SIX_STEPS = ["runner.stable.steps_per_window=6", "+runner.stable.min_ess_fraction=0.1"]

FRESH = "one simulation per step"

WAYS = {
    FRESH: ["runner.stable.steps_per_window=1"],
    "six steps": SIX_STEPS,
    "six steps, rate follows": [*SIX_STEPS, "+runner.stable.max_lr_scale=3.0"],
}
"""The learning rate is the recipe's in all of them, up to what the last makes of it."""


def rounds(seeds: int) -> list[Row]:
    """MD steps and time until a window in which no replica fails, for the demo's model of some seeds."""
    steps: dict[str, list[float]] = {way: [] for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(seeds):
            for way, changes in WAYS.items():
                n_steps, took = _until_none_fails(Path(folder) / f"{way} {seed}", seed, changes)
                print(f"seed {seed}, {way}: {n_steps:.0f} MD steps, {took:.0f} s", flush=True)
                steps[way].append(n_steps)
                seconds[way].append(took)
    case = f"demo with {REPLICAS} replicas, {seeds} seeds"
    rows = [row("windows", case, f"{way}: MD steps of a replica", steps[way], "") for way in WAYS]
    rows += [row("windows", case, f"{way}: time", seconds[way], "s") for way in WAYS]
    for way in WAYS:
        if way != FRESH:
            rows.append(row("windows", case, f"MD steps, {FRESH} / {way}", ratios(steps[FRESH], steps[way]), ""))
            rows.append(row("windows", case, f"time, {FRESH} / {way}", ratios(seconds[FRESH], seconds[way]), ""))
    return rows


def _until_none_fails(folder: Path, seed: int, changes: list[str]) -> tuple[float, float]:
    command = [
        *(str(Path(sys.executable).parent / "fairchem"), "-c", "recipes/aspirin_mace.yaml"),
        *(f"seed={seed}", f"job.run_dir={folder}", "+job.timestamp_id=run", "runner.evaluation.horizons_ps=[0.1]"),
        *("runner.stable.schedule.max_windows=20", "runner.stable.schedule.min_unstable_fraction=0.0", *changes),
        "runner.stable.schedule.stable_ps=0.4",  # one window: training ends when no replica fails in it
        *(f"runner.stable.n_replicas={REPLICAS}", f"runner.evaluation.n_replicas={REPLICAS}"),
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    report: dict[str, Any] = json.loads((folder / "run" / "report.json").read_text())
    windows = report["windows"]
    # A window is counted whole, and the one that shows that no replica fails is needed too.
    last = next((i for i, each in enumerate(windows) if i > 0 and each["unstable_fraction"] == 0.0), len(windows) - 1)
    per_window = report["md_steps"] / len(windows) / report["before"]["replicas"]
    return (last + 1) * per_window, sum(each["wall_s"] for each in windows[: last + 1])
