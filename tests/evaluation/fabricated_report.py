"""A fabricated aspirin report, and a parser for its HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from stable_plugin.evaluation.report import write_report
from stable_plugin.evaluation.survival import failure_rate_per_ns, kaplan_meier, median_stable_ps

HOSTILE = "\"><script>alert(1)</script> $x_1$ & '</details>"
VOID = {"meta", "br", "link", "img", "path", "use", "stop", "rect", "circle", "line", "polyline", "image"}

BONDS = [
    *("C1-C2", "C2-C3", "C3-C4", "C4-C5", "C5-C6", "C1-C6", "C5-C10", "C11-C12"),
    *("C6-O13", "C10-O7", "C10-O8", "C11-O9", "C11-O13"),
    *("C1-H14", "C2-H15", "C3-H16", "C4-H17", "C12-H18", "C12-H19", "C12-H20", "O7-H21"),
]
R = 0.01 + 0.02 * np.arange(500)
ANGLES = 0.5 + np.arange(180)


def peaks(x: np.ndarray, centers: np.ndarray, width: float, scale: np.ndarray | float = 1.0) -> np.ndarray:
    """Return a distribution in percent made of Gaussians."""
    shape = np.sum(scale * np.exp(-0.5 * ((x[:, None] - centers) / width) ** 2), axis=1)
    return np.asarray(100.0 * shape / shape.sum())


def evaluated(hazard_per_ps: float, horizon_ps: float, force: float, error_scale: float) -> tuple[dict[str, Any], Any]:
    """Return an evaluation of 32 replicas and its survival curve."""
    lifetime = np.random.default_rng(9).exponential(1.0 / hazard_per_ps, 32)
    times, failed = np.minimum(lifetime, horizon_ps), lifetime <= horizon_ps
    curve, rate = kaplan_meier(times, failed), failure_rate_per_ns(int(failed.sum()), float(times.sum()))
    entry = {
        "replicas": 32,
        "horizon_ps": horizon_ps,
        "threshold": 0.5,
        "detector": "BondDeviation",
        "unstable": int(failed.sum()),
        "median_stable_ps": median_stable_ps(curve),
        "failures_per_ns": rate.per_ns,
        "failures_per_ns_interval": [rate.low, rate.high],
        "force_mae_mev_per_A": force,
        "energy_mae_mev_per_atom": force / 23.0,
        "observables": {
            "bond_lengths": 0.081 * error_scale,
            "distance_distribution": 0.052 * error_scale,
            "angle_distribution": 0.113 * error_scale,
        },
    }
    return entry, curve.as_dict()


def observables(error_scale: float) -> dict[str, Any]:
    """Means and targets of three observables; the deviation grows with ``error_scale``."""
    random = np.random.default_rng(2)
    lengths = random.uniform(0.97, 1.52, len(BONDS))
    deviation = np.abs(random.normal(0.0, 0.1, len(BONDS)))
    centers, weight = np.array([1.1, 1.39, 1.5, 2.15, 2.42, 2.8, 3.4, 3.9, 4.6, 5.4, 6.2]), random.uniform(0.3, 2.0, 11)
    angles = np.array([104.0, 111.0, 120.0, 124.0])
    return {
        "bond_lengths": {"mean": (lengths + error_scale * deviation).tolist(), "target": lengths.tolist()},
        "distance_distribution": {
            "mean": peaks(R, centers + 0.02 * error_scale, 0.05 + 0.06 * error_scale, weight).tolist(),
            "target": peaks(R, centers, 0.05, weight).tolist(),
        },
        "angle_distribution": {
            "mean": peaks(ANGLES, angles - 2.0 * error_scale, 5.0 + 4.0 * error_scale).tolist(),
            "target": peaks(ANGLES, angles, 5.0).tolist(),
        },
    }


def fabricated(
    before: float = 1.9, after: float = 0.03, control: float | None = 1.6, after_force: float = 281.3
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Report and curves of a run whose models fail with constant hazards in 1/ps."""
    hazards = {"before": before, "control": control, "after": after}
    forces = {"before": 278.2, "control": 262.0, "after": after_force}
    report: dict[str, Any] = {"control": None, "extended": {"control": None}}
    curves: dict[str, Any] = {}
    for stage, hazard in hazards.items():
        if hazard is None:
            continue
        error_scale = hazard / 1.9
        report[stage], _ = evaluated(hazard, 1.0, forces[stage], error_scale)
        report["extended"][stage], survival = evaluated(hazard, 10.0, forces[stage], 1.2 * error_scale)
        curves[stage] = {"survival": survival, "observables": observables(error_scale)}
    curves["axes"] = {
        "bond_lengths": {"kind": "bars", "x": BONDS, "xlabel": "bond", "ylabel": "length / Å"},
        "distance_distribution": {"kind": "curve", "x": R.tolist(), "xlabel": "r / Å", "ylabel": "h(r) / % per bin"},
        "angle_distribution": {
            "kind": "curve",
            "x": ANGLES.tolist(),
            "xlabel": "angle / °",
            "ylabel": "fraction / % per bin",
        },
    }
    unstable_fractions = [0.1, 0.34, 0.47, 0.53, 0.41, 0.25, 0.19, 0.09, 0.03, 0.0, 0.0, 0.03, 0.0]
    report |= {
        "title": "Aspirin, MACE 8x0e, 500 K",
        "settings": {
            "seed": 0,
            "potential": {"family": "mace", "r_max": 4.5, "checkpoint": None},
            "simulation": {
                "temperature_K": 500.0,
                "timestep_fs": 0.5,
                "thermostat": {"name": "Langevin", "friction_per_ps": 10},
            },
            "schedule": {"max_failures_per_ns": 100.0, "probe_every": 3},
            "observables": ["bond_lengths"],
            "target": np.linspace(1.0, 1.5, 21).tolist(),
        },
        "windows": [
            {
                "window": number,
                "phase": "probe" if number % 4 == 2 else "learn" if 3 <= number <= 10 else "verify",
                "simulated_ps": 0.4 * number,
                "unstable_fraction": unstable_fraction,
                "unstable_low": max(unstable_fraction - 0.1, 0.0),
                "unstable_high": unstable_fraction + 0.1,
                "observable_loss": None if number == 1 else 0.24 * float(np.exp(-0.5 * min(abs(number - 4), 7))),
                "ess_fraction": 0.31 + 0.06 * number if 3 <= number <= 10 else None,
                "steps": 6 if 3 <= number <= 10 else 0,
                "wall_s": 34.8,
            }
            for number, unstable_fraction in enumerate(unstable_fractions, start=1)
        ],
        "wall_s": 452.4,
        "md_steps": 332_800,
        "optimizer_steps": 48,
        "versions": {"stable-plugin": "0.1.0", "torch": "2.13.0", "mace-torch": "0.3.16"},
    }
    return report, curves


class Page(HTMLParser):
    """Tags with attributes, text, and the text of the header; fails on unbalanced tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.lead = ""
        self.feed(html)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data
        if "header" in self.open:
            self.lead += data


def written(folder: Path, report: Mapping[str, Any], curves: Mapping[str, Any] | None = None) -> Page:
    """Write a report and parse its page, without curves if none are passed."""
    curves = curves or {}
    return Page(write_report(folder, report, curves).read_text(encoding="utf-8"))
