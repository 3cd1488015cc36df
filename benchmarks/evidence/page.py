"""Write docs/evidence.md from the results of the pieces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from benchmarks.evidence.pieces import CASES, PIECES, SEEDS, Case, Piece
from benchmarks.evidence.results import load
from benchmarks.recipes import ROOT
from stable_plugin.evaluation.formatting import duration, number

PAGE = ROOT / "docs" / "evidence.md"

STAGES = {
    ("margin", "before"): "before",
    ("margin", "control"): "energies and forces alone",
    ("published", "after"): "published objective",
    ("margin", "after"): "failure margin",
}
"""Rows of each seed: the objective and the stage of its run, and what they are called."""

INTRODUCTION = """# Evidence

Systems × architectures × three seeds, each with four potentials: the one that was fitted to 50 frames (water: 2), the same after as many
further steps with energies and forces alone, after StABlE training with the objective of the paper, and with the failure margin.
All are judged with held-out start frames: 32 replicas of a molecule for 10 ps, 8 of water for 40 ps. A run ends early when every replica has
failed. Intervals are of 95 %; of no failure, the upper end is shown.

`make evidence` runs the pieces that are not in `docs/results/evidence` yet, one for each core at a time, and writes this page;
`python -m benchmarks.evidence --list` lists them. The recipe of a piece is a recipe of `recipes/` with the changes in
`benchmarks/evidence/pieces.py`.
"""

WORSE = """## What got worse

Errors of the failure margin's potential beyond that of the potential before: force errors by more than 3 %, and observables of which the
error grew by more than twice its standard error. Seeds that are not at least 50 times rarer to fail, or whose rate was not verified.
"""

LARGEST_FORCE_ERROR = 1.03
SMALLEST_GAIN = 50.0


def write() -> None:
    """Write the page."""
    PAGE.write_text(text(load()))


def text(results: dict[str, dict[str, Any]]) -> str:
    """Return the page.

    Args:
        results: Results by the names of their pieces.
    """
    sections = [INTRODUCTION, _progress(results)]
    worse = []
    for case in CASES:
        stages = _stages(case, results)
        if stages:
            sections.append(_section(case, results, stages))
            worse += [
                f"- {case.system}, {case.architecture}, seed {seed}: {what}." for seed, what in _worse(case, results)
            ]
    if any(piece.objective == "margin" for name, piece in PIECES.items() if name in results):
        sections.append(WORSE + "\n" + ("\n".join(worse) or "Nothing, in the pieces that are done.") + "\n")
    return "\n".join(sections)


def _progress(results: dict[str, dict[str, Any]]) -> str:
    done = sum(name in results for name in PIECES)
    return f"{done} of {len(PIECES)} pieces are done; what is not shown below has not run.\n"


def _stages(case: Case, results: dict[str, dict[str, Any]]) -> dict[tuple[int, str], dict[str, Any]]:
    """Return what is known of each seed and row."""
    found = {}
    for seed in SEEDS:
        for (objective, stage), row in STAGES.items():
            result = results.get(Piece(case, objective, seed).name)
            if result is not None and result[stage] is not None:
                found[seed, row] = result[stage]
    return found


def _section(case: Case, results: dict[str, dict[str, Any]], stages: dict[tuple[int, str], dict[str, Any]]) -> str:
    distances = list(dict.fromkeys(key for stage in stages.values() for key in stage["observables_w1"]))
    units = {key: stage["observables_w1"][key]["unit"] for stage in stages.values() for key in stage["observables_w1"]}
    heads = [
        "seed",
        "",
        "failures per ns",
        "followed / ns",
        "force MAE / meV/Å",
        "energy MAE, zero fitted / meV/atom",
        *(f"{key.replace('_', ' ')} / {units[key]}" for key in distances),
    ]
    rows = [
        [str(seed), row, rate(stage), number(stage["verdict"]["followed_ns"]), number(stage["force_mae_mev_per_A"])]
        + [number(stage.get("energy_mae_fitted_zero_mev_per_atom", stage["energy_mae_mev_per_atom"]))]
        + [number(stage["observables_w1"].get(key, {}).get("value"), 2) for key in distances]
        for (seed, row), stage in stages.items()
    ]
    lines = [f"## {case.system}, {case.architecture}\n", *table(heads, rows), ""]
    lines.append("Columns from the seventh on are Wasserstein distances to the reference.\n")
    costs = [
        [str(seed), name, *_costs(results[key])]
        for seed in SEEDS
        for objective, name in (("published", "published objective"), ("margin", "failure margin"))
        if (key := Piece(case, objective, seed).name) in results
    ]
    lines += table(["seed", "", "MD in training / ns", "windows", "optimizer steps", "verified", "time"], costs)
    lines += _other_conditions(stages)
    gains = [gain for seed in SEEDS if (gain := _gain(stages, seed)) is not None]
    if gains:
        lines.append(f"\nMedian over the seeds: failures {number(median(gains), 2)} times rarer, or more.")
    return "\n".join(lines) + "\n"


def _other_conditions(stages: dict[tuple[int, str], dict[str, Any]]) -> list[str]:
    """Return a table of the failure rates at other temperatures and timesteps, where they were measured."""
    measured = {key: stage["other_conditions"] for key, stage in stages.items() if "other_conditions" in stage}
    if not measured:
        return []
    rows = [[str(seed), row, *map(rate, conditions)] for (seed, row), conditions in measured.items()]
    conditions = next(iter(measured.values()))
    heads = [f"{number(each['temperature_K'])} K, {number(each['timestep_fs'])} fs" for each in conditions]
    return [
        "\nFailures per ns at temperatures and timesteps that were not trained at:\n",
        *table(["seed", "", *heads], rows),
    ]


def _costs(result: dict[str, Any]) -> Iterator[str]:
    yield number(result["md_steps"] * result["timestep_fs"] * 1e-6)
    yield str(result["windows"])
    yield number(result["optimizer_steps"], 4)
    limits = [each["max_failures_per_ns"] for each in result["verifications"] if each["is_verified"]]
    yield f"below {number(max(limits))} per ns" if limits else "no"
    yield duration(result["wall_s"])


def _gain(stages: dict[tuple[int, str], dict[str, Any]], seed: int) -> float | None:
    """Return how many times rarer failures are; of none, the upper limit of the rate counts."""
    before, after = stages.get((seed, "before")), stages.get((seed, "failure margin"))
    if before is None or after is None:
        return None
    verdict = after["verdict"]
    rate_after = verdict["failures_per_ns"] or verdict["interval"][1]
    return float(before["verdict"]["failures_per_ns"] / rate_after)


def _worse(case: Case, results: dict[str, dict[str, Any]]) -> Iterator[tuple[int, str]]:
    """Yield what the failure margin made worse, or did not reach, by seed."""
    stages = _stages(case, results)
    for seed in SEEDS:
        result = results.get(Piece(case, "margin", seed).name)
        if result is None:
            continue
        before, after = result["before"], result["after"]
        ratio = after["force_mae_mev_per_A"] / before["force_mae_mev_per_A"]
        if ratio > LARGEST_FORCE_ERROR:
            yield seed, f"force MAE {100 * (ratio - 1):+.0f} %"
        gain = _gain(stages, seed)
        if gain is not None and gain < SMALLEST_GAIN:
            yield seed, f"failures {number(gain, 2)} times rarer, or more"
        if not all(each["is_verified"] for each in result["verifications"]):
            yield seed, "the rate that was asked for was not verified"
        for name, error in after["observables"].items():
            earlier = before["observables"].get(name)
            deviations = [stage["observables_standard_error"].get(name) for stage in (before, after)]
            if error is None or earlier is None or None in deviations:
                continue
            if error - earlier > 2.0 * sum(each**2 for each in deviations) ** 0.5:
                yield seed, f"error of {name.replace('_', ' ')} {number(earlier, 2)} → {number(error, 2)}"


def rate(stage: dict[str, Any]) -> str:
    """Return the failure rate with its interval."""
    verdict = stage["verdict"]
    low, high = verdict["interval"]
    if not verdict["failures"]:
        return f"none: at most {number(high)}"
    return f"{number(verdict['failures_per_ns'])} [{number(low)}, {number(high)}]"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]
