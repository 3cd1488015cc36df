"""Results of the pieces: what is kept of a run's report, as JSON under docs/results/evidence."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.evidence.pieces import Piece
from benchmarks.recipes import ROOT
from benchmarks.table import commit, machine
from stable_plugin.runtime.atomic_files import atomic_write

RESULTS = ROOT / "docs" / "results" / "evidence"
"""Where the results are kept."""

STAGES = ("before", "control", "after")

KEPT = ("versions", "wall_s", "md_steps", "optimizer_steps", "verifications")
"""What is kept of a report besides its stages."""

TOO_LONG = ("failures", "force_mae_by_element_mev_per_A")
"""What is left out of a stage: each failure with its atoms, for instance."""


def keep(piece: Piece, run: Path, device: str) -> Path:
    """Write what is kept of the report of a run, and return the path.

    Args:
        piece: The piece.
        run: Folder of the run.
        device: Where it ended, ``cpu`` or ``cuda``.
    """
    report = json.loads((run / "report.json").read_text())
    result = {
        "piece": piece.name,
        "date": date.today().isoformat(),
        "commit": commit(),
        "machine": machine(device),
        **{key: report[key] for key in KEPT},
        "timestep_fs": float(piece.recipe().runner.stable.integrator.timestep_fs),
        "windows": len(report["windows"]),
        **{stage: _short(report[stage]) for stage in STAGES},
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{piece.name}.json"
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(result, indent=1) + "\n")
    return path


def load() -> dict[str, dict[str, Any]]:
    """Return all results by the names of their pieces."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def _short(stage: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if stage is None else {key: value for key, value in stage.items() if key not in TOO_LONG}
