"""Files and printed summary of a fabricated aspirin report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from fabricated_report import BONDS, fabricated, written

from stable_plugin.evaluation.report import summary, write_report


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "aspirin"
    assert write_report(folder, *fabricated()) == folder / "report.html"
    return folder


def test_write_report_creates_exactly_its_files(run_dir: Path) -> None:
    names = sorted(str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file())
    assert names == [
        "curves.json",
        "figures/observable_1_bond_lengths.png",
        "figures/observable_2_distance_distribution.png",
        "figures/observable_3_angle_distribution.png",
        "figures/survival.png",
        "figures/windows.png",
        "report.html",
        "report.json",
    ]


def test_write_report_json_round_trip(run_dir: Path) -> None:
    report, curves = fabricated()
    assert json.loads((run_dir / "report.json").read_text(encoding="utf-8")) == report
    assert json.loads((run_dir / "curves.json").read_text(encoding="utf-8")) == curves


def test_write_report_pngs_are_small(run_dir: Path) -> None:
    for path in (run_dir / "figures").iterdir():
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG\r\n") and 3_000 < len(content) <= 60_000, (path.name, len(content))
        assert 900 < int.from_bytes(content[16:20]) < 1000  # pixels wide


@pytest.mark.parametrize("name", ["report.json", "curves.json", "report.html"])
def test_write_report_keeps_existing_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("existing")
    with pytest.raises(FileExistsError, match=rf"{name} already exists .* set another run_dir"):
        write_report(tmp_path, *fabricated(control=None))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "existing"


def test_write_report_keeps_other_files(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_text("weights")
    written(tmp_path, fabricated()[0])
    assert (tmp_path / "model.pt").read_text() == "weights"


def test_write_report_nonfinite_and_other_types(tmp_path: Path) -> None:
    report, curves = fabricated(control=None)
    report["after"]["force_mae_mev_per_A"] = report["extended"]["after"]["force_mae_mev_per_A"] = float("nan")
    report["after"]["observables"]["bond_lengths"] = float("inf")
    report["after"]["unstable"] = np.int64(report["after"]["unstable"])
    report["settings"]["path"] = Path("models") / "a.pt"
    curves["before"]["observables"]["bond_lengths"]["mean"][3] = float("nan")
    curves["after"]["survival"] = {key: np.array(value) for key, value in curves["after"]["survival"].items()}
    page = written(tmp_path / "run", report, curves)
    assert "change unknown" in page.text and "nan" not in page.text.lower()
    stored = json.loads((tmp_path / "run" / "report.json").read_text())
    assert stored["after"]["force_mae_mev_per_A"] is None and stored["settings"]["path"] == "models/a.pt"


def test_write_report_keeps_json_if_figure_fails(tmp_path: Path) -> None:
    report, curves = fabricated(control=None)
    curves["axes"]["bond_lengths"]["x"] = BONDS[:-1]
    with pytest.raises(ValueError, match="has 21 means for 21 targets and 20 positions"):
        write_report(tmp_path / "run", report, curves)
    assert json.loads((tmp_path / "run" / "report.json").read_text()) == report


def test_write_report_names_missing_stages(tmp_path: Path) -> None:
    report, curves = fabricated()
    del report["before"]
    for call in (lambda: write_report(tmp_path / "run", report, curves), lambda: summary(report)):
        with pytest.raises(ValueError, match=r"\['control', 'after'\]: pass 'before' and 'after'"):
            call()
    assert not (tmp_path / "run").exists()


def test_summary_lines() -> None:
    report, _ = fabricated()
    assert summary(report).splitlines() == [
        f"Before: 26 of 32 replicas failed within 1 ps (median stable time "
        f"{report['before']['median_stable_ps']:.3g} ps). Control: {report['control']['unstable']} of 32 "
        f"(median stable time {report['control']['median_stable_ps']:.3g} ps). After: 2 of 32.",
        "Force MAE 278 -> 281 meV/Å, energy MAE 12.1 -> 12.2 meV/atom (held out).",
        f"Failed within 10 ps: before 32 of 32, control 32 of 32, after "
        f"{report['extended']['after']['unstable']} of 32.",
        "StABlE phase: 13 windows, 48 optimizer steps, 332,800 MD steps, 452 s.",
    ]
