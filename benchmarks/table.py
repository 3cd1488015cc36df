"""Rows of measurements: taken in turn, printed, and kept with what they were measured on."""

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

Row = dict[str, Any]

PACKAGES = ("torch", "mace-torch", "fairchem-core", "torch-sim-atomistic", "ase", "e3nn", "vesin")


def row(group: str, case: str, name: str, measured: Sequence[float], unit: str) -> Row:
    """One line of the table: median and spread."""
    return {
        "group": group,
        "case": case,
        "name": name,
        "value": statistics.median(measured),
        "unit": unit,
        "spread": [min(measured), max(measured)],
    }


def in_turn(tasks: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds that each task takes, every task once per repeat, so that a change of the machine's speed hits all."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for task in tasks.values():
        task()
    for _ in range(repeats):
        for name, task in tasks.items():
            _wait()
            began = time.perf_counter()
            task()
            _wait()
            times[name].append(time.perf_counter() - began)
    return times


def ratios(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """Repeat by repeat."""
    return [a / b for a, b in zip(first, second, strict=True)]


def show(rows: Sequence[Row]) -> None:
    """Print one table per group."""
    for group in dict.fromkeys(each["group"] for each in rows):
        print(f"\n{group}")
        chosen = [each for each in rows if each["group"] == group]
        widths = [max(len(each[key]) for each in chosen) for key in ("case", "name")]
        for each in chosen:
            low, high = each["spread"]
            print(
                f"  {each['case']:{widths[0]}}  {each['name']:{widths[1]}}  {each['value']:10.4g} {each['unit']:4} "
                f"({low:.4g} to {high:.4g})"
            )


def write(rows: Sequence[Row], device: str, settings: dict[str, Any]) -> Path:
    """Add the rows to the file of this day and device, in the place of earlier ones of the same cases."""
    path = Path(__file__).parent / "results" / f"{date.today().isoformat()}-{device}.json"
    measured = {(each["group"], each["case"]) for each in rows}
    earlier = json.loads(path.read_text()) if path.is_file() else {"settings": {}, "rows": []}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    machine: dict[str, Any] = {"processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    content = {
        "machine": machine,
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": commit.stdout.strip(),
        "settings": {**earlier["settings"], **settings},
        "rows": [*(each for each in earlier["rows"] if (each["group"], each["case"]) not in measured), *rows],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    names = Path("/proc/cpuinfo")
    if names.is_file():
        for line in names.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
