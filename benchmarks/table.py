"""Measurements: taken in turn, printed as a table, and stored with the machine and versions."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.recipes import ROOT

Row = dict[str, Any]

PACKAGES = ("torch", "mace-torch", "fairchem-core", "torch-sim-atomistic", "ase", "e3nn", "vesin")


def row(group: str, case: str, name: str, measured: Sequence[float], unit: str) -> Row:
    """Return one line of the table with median and range of the measurements."""
    return {
        "group": group,
        "case": case,
        "name": name,
        "value": statistics.median(measured),
        "unit": unit,
        "spread": [min(measured), max(measured)],
    }


def in_turn(tasks: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each task; all tasks run once per repeat, so that changes of speed affect all alike."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for task in tasks.values():
        task()
    for _ in range(repeats):
        for name, task in tasks.items():
            _synchronize()
            started = time.perf_counter()
            task()
            _synchronize()
            times[name].append(time.perf_counter() - started)
    return times


def ratios(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """Return the ratios of two series of measurements, repeat by repeat."""
    return [a / b for a, b in zip(first, second, strict=True)]


def show(rows: Sequence[Row]) -> None:
    """Print one table per group."""
    for group in dict.fromkeys(line["group"] for line in rows):
        print(f"\n{group}")
        chosen = [line for line in rows if line["group"] == group]
        widths = [max(len(line[key]) for line in chosen) for key in ("case", "name")]
        for line in chosen:
            low, high = line["spread"]
            print(
                f"  {line['case']:{widths[0]}}  {line['name']:{widths[1]}}  {line['value']:10.4g} {line['unit']:4} "
                f"({low:.4g} to {high:.4g})"
            )


def write(rows: Sequence[Row], device: str, settings: dict[str, Any]) -> Path:
    """Add the rows to the file of this day and device, replacing earlier rows of the same cases."""
    path = Path(__file__).parent / "results" / f"{date.today().isoformat()}-{device}.json"
    measured = {(line["group"], line["case"]) for line in rows}
    earlier = json.loads(path.read_text()) if path.is_file() else {"settings": {}, "rows": []}
    content = {
        "machine": {**machine(device), "threads": torch.get_num_threads()},
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": commit(),
        "settings": {**earlier["settings"], **settings},
        "rows": [*(line for line in earlier["rows"] if (line["group"], line["case"]) not in measured), *rows],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit() -> str:
    """Return the commit of this checkout, or an empty string where there is none."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def machine(device: str) -> dict[str, Any]:
    """Return the processor, its cores, and the GPU if that is the device."""
    found: dict[str, Any] = {"processor": _processor(), "cores": os.cpu_count()}
    return {**found, "gpu": torch.cuda.get_device_name()} if device == "cuda" else found


def _processor() -> str:
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.is_file():
        for line in cpu_info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
