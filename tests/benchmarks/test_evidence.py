"""The pieces of `make evidence`: recipes that are valid, runs that are kept, and a page that says what they say."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import recipe_tools
from omegaconf import OmegaConf

from stable_plugin.integrations.recipes import launch

for family in ("mace", "fairchem", "sevenn"):
    pytest.importorskip(family)

from benchmarks.evidence import __main__ as command  # noqa: E402
from benchmarks.evidence import page, results  # noqa: E402
from benchmarks.evidence.pieces import CASES, PIECES, Piece  # noqa: E402

ROOT = Path(__file__).parents[2]
ASPIRIN = PIECES["aspirin-mace-margin-0"]
DIFFERENT = [
    *(Piece(case, "margin", 0) for case in CASES),
    *(Piece(case, "published", 0) for case in CASES if case.recipe != "aspirin_mace"),
    PIECES["aspirin-mace-published-0"],
]
"""Pieces whose recipes differ in more than their combination of a case and an objective."""


@pytest.mark.parametrize("piece", DIFFERENT, ids=lambda piece: piece.name)
def test_recipe_of_piece_is_valid(piece, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    OmegaConf.save(piece.recipe(), tmp_path / "recipe.yaml")
    launch.prepare(tmp_path / "recipe.yaml", [f"job.run_dir={tmp_path}"]).validate()


def test_page_is_that_of_the_results():
    assert page.PAGE.read_text() == page.text(results.load())


def test_run_keeps_the_figures_of_its_report(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    tiny = recipe_tools.tiny("aspirin_mace", recipe_tools.small_data(tmp_path / "data"))
    monkeypatch.setattr(Piece, "recipe", lambda piece: OmegaConf.create(tiny))
    command.run(ASPIRIN)
    (kept,) = results.load().values()
    report = json.loads((tmp_path / "runs" / ASPIRIN.name / "run" / "report.json").read_text())
    assert kept["before"]["verdict"] == report["before"]["verdict"]
    assert kept["after"]["force_mae_mev_per_A"] == report["after"]["force_mae_mev_per_A"]
    assert f"| 0 | before | {page.rate(report['before'])} |" in page.text({ASPIRIN.name: kept})


@pytest.mark.parametrize("changed", [False, True])
def test_interrupted_piece_goes_on_unless_its_recipe_has_changed(changed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "RUNS", tmp_path)
    monkeypatch.setattr(command, "keep", lambda piece, run, device: run)
    monkeypatch.setattr(command.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0))
    folder = tmp_path / ASPIRIN.name
    command.run(ASPIRIN)
    (folder / "run").mkdir()
    if changed:
        monkeypatch.setattr(Piece, "recipe", lambda piece: OmegaConf.create({"seed": 5}))
    command.run(ASPIRIN)
    first, second = capsys.readouterr().out.splitlines()[::2]
    assert ": started, log in" in first
    assert (": started, log in" in second) == changed
    assert (folder / "run").is_dir() != changed


def test_piece_that_fails_is_not_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    broken = replace(ASPIRIN.case, changes={"runner.stable.n_replicas": 0})
    command.run(Piece(broken, "margin", 0))
    assert "failed, see" in capsys.readouterr().out
    assert not results.load()


def stage(failures, followed_ns, force_mae=100.0, error=0.1):
    rate = failures / followed_ns
    return {
        "verdict": {
            "failures": failures,
            "followed_ns": followed_ns,
            "failures_per_ns": rate,
            "interval": [0.5 * rate, 2.0 * rate or 3.69 / followed_ns],
        },
        "force_mae_mev_per_A": force_mae,
        "energy_mae_mev_per_atom": 1.0,
        "observables": {"angle_distribution": error},
        "observables_standard_error": {"angle_distribution": 0.01},
        "observables_w1": {"angles": {"value": 2.0, "unit": "degrees"}},
    }


def result(before, after, verified=True):
    return {
        "before": before,
        "control": None,
        "after": after,
        "md_steps": 400_000,
        "timestep_fs": 0.5,
        "windows": 15,
        "optimizer_steps": 1000,
        "wall_s": 600.0,
        "verifications": [{"is_verified": verified, "max_failures_per_ns": 50.0}],
    }


def test_page_shows_rates_and_costs():
    text = page.text({ASPIRIN.name: result(stage(32, 0.01), stage(0, 0.3))})
    assert "| 0 | before | 3,200 [1,600, 6,400] | 0.01 | 100 | 1 | 2 |" in text
    assert "| 0 | failure margin | none: at most 12.3 | 0.3 | 100 | 1 | 2 |" in text
    assert "| 0 | failure margin | 0.2 | 15 | 1,000 | below 50 per ns | 10 min |" in text
    assert "failures 260 times rarer, or more" in text
    assert "Nothing, in the pieces that are done." in text


def test_page_shows_other_conditions():
    before, after = stage(32, 0.01), stage(0, 0.3)
    for each, failures in ((before, 20), (after, 3)):
        verdicts = [stage(count, 0.1)["verdict"] for count in (0, failures)]
        each["other_conditions"] = [
            {"temperature_K": 350.0, "timestep_fs": 0.5, "verdict": verdicts[0]},
            {"temperature_K": 500.0, "timestep_fs": 2.0, "verdict": verdicts[1]},
        ]
    text = page.text({ASPIRIN.name: result(before, after)})
    assert "| seed |  | 350 K, 0.5 fs | 500 K, 2 fs |" in text
    assert "| 0 | before | none: at most 36.9 | 200 [100, 400] |" in text
    assert "| 0 | failure margin | none: at most 36.9 | 30 [15, 60] |" in text


@pytest.mark.parametrize(
    ("after", "verified", "line"),
    [
        (stage(0, 0.3, force_mae=104.0), True, "force MAE +4 %"),
        (stage(30, 0.3), True, "failures 32 times rarer, or more"),
        (stage(0, 0.3, error=0.2), True, "error of angle distribution 0.1 → 0.2"),
        (stage(0, 0.3), False, "the rate that was asked for was not verified"),
    ],
)
def test_page_lists_what_got_worse(after, verified, line):
    text = page.text({ASPIRIN.name: result(stage(32, 0.01), after, verified)})
    assert f"- aspirin, mace, seed 0: {line}." in text
    assert "Nothing" not in text
