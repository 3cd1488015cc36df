"""The report of a fabricated aspirin run: complete, self-contained, safe, honest in words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stable_plugin.evaluation.page import render
from stable_plugin.evaluation.report import summary, write_report
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


def peaks(x: np.ndarray, centres: np.ndarray, width: float, scale: np.ndarray | float = 1.0) -> np.ndarray:
    """A distribution in percent made of Gaussians."""
    shape = np.sum(scale * np.exp(-0.5 * ((x[:, None] - centres) / width) ** 2), axis=1)
    return np.asarray(100.0 * shape / shape.sum())


def evaluated(hazard_per_ps: float, horizon_ps: float, force: float, spoiled: float) -> tuple[dict[str, Any], Any]:
    """An evaluation of 32 replicas and its survival curve."""
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
            "bond_lengths": 0.081 * spoiled,
            "distance_distribution": 0.052 * spoiled,
            "angle_distribution": 0.113 * spoiled,
        },
    }
    return entry, curve.as_dict()


def observables(spoiled: float) -> dict[str, Any]:
    """Means and targets of the three observables, the more off the more spoiled."""
    random = np.random.default_rng(2)
    lengths = random.uniform(0.97, 1.52, len(BONDS))
    off = np.abs(random.normal(0.0, 0.1, len(BONDS)))
    centres, weight = np.array([1.1, 1.39, 1.5, 2.15, 2.42, 2.8, 3.4, 3.9, 4.6, 5.4, 6.2]), random.uniform(0.3, 2.0, 11)
    angles = np.array([104.0, 111.0, 120.0, 124.0])
    return {
        "bond_lengths": {"mean": (lengths + spoiled * off).tolist(), "target": lengths.tolist()},
        "distance_distribution": {
            "mean": peaks(R, centres + 0.02 * spoiled, 0.05 + 0.06 * spoiled, weight).tolist(),
            "target": peaks(R, centres, 0.05, weight).tolist(),
        },
        "angle_distribution": {
            "mean": peaks(ANGLES, angles - 2.0 * spoiled, 5.0 + 4.0 * spoiled).tolist(),
            "target": peaks(ANGLES, angles, 5.0).tolist(),
        },
    }


def fabricated(
    before: float = 1.9, after: float = 0.03, control: float | None = 1.6, after_force: float = 281.3
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Report and curves of a run whose models fail at the hazards given, in 1/ps."""
    hazards = {"before": before, "control": control, "after": after}
    forces = {"before": 278.2, "control": 262.0, "after": after_force}
    report: dict[str, Any] = {"control": None, "extended": {"control": None}}
    curves: dict[str, Any] = {}
    for stage, hazard in hazards.items():
        if hazard is None:
            continue
        spoiled = hazard / 1.9
        report[stage], _ = evaluated(hazard, 1.0, forces[stage], spoiled)
        report["extended"][stage], survival = evaluated(hazard, 10.0, forces[stage], 1.2 * spoiled)
        curves[stage] = {"survival": survival, "observables": observables(spoiled)}
    curves["axes"] = {
        "bond_lengths": {"kind": "bars", "x": BONDS, "xlabel": "bond", "ylabel": "length / Å"},
        "distance_distribution": {"kind": "curve", "x": R.tolist(), "xlabel": "r / Å", "ylabel": "h(r) / % per bin"},
        "angle_distribution": {
            "kind": "curve",
            "x": ANGLES.tolist(),
            "xlabel": "angle / °",
            "ylabel": "share / % per bin",
        },
    }
    shares = [0.1, 0.34, 0.47, 0.53, 0.41, 0.25, 0.19, 0.09, 0.03, 0.0, 0.0, 0.03, 0.0]
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
            "schedule": {"max_unstable_fraction": 0.5, "min_unstable_fraction": 0.0, "stable_ps": 2.0},
            "observables": ["bond_lengths"],
            "target": np.linspace(1.0, 1.5, 21).tolist(),
        },
        "windows": [
            {
                "window": number,
                "phase": "learn" if 3 <= number <= 10 else "simulate",
                "simulated_ps": 0.4 * number,
                "unstable_fraction": share,
                "observable_loss": None if number == 1 else 0.24 * float(np.exp(-0.5 * min(abs(number - 4), 7))),
                "ess_fraction": 0.31 + 0.06 * number if 3 <= number <= 10 else None,
                "steps": 6 if 3 <= number <= 10 else 0,
                "learning_rate": 1e-3 if 3 <= number <= 10 else None,
                "wall_s": 34.8,
            }
            for number, share in enumerate(shares, start=1)
        ],
        "wall_s": 452.4,
        "md_steps": 332_800,
        "optimizer_steps": 48,
        "versions": {"stable-plugin": "0.1.0", "torch": "2.13.0", "mace-torch": "0.3.16"},
    }
    return report, curves


class Page(HTMLParser):
    """Collects what matters here: balanced tags, attributes, text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == [], f"left open: {self.open}"

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

    @property
    def lead(self) -> str:
        return self.text.split("Failed within")[0]


def written(folder: Path, report: Mapping[str, Any], curves: Mapping[str, Any] | None = None) -> Page:
    """The page, without figures of curves if none are given."""
    curves = curves or {}
    return Page(write_report(folder, report, curves).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "aspirin"
    assert write_report(folder, *fabricated()) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def html(run_dir: Path) -> str:
    return (run_dir / "report.html").read_text(encoding="utf-8")


def test_files_and_no_leftovers(run_dir: Path) -> None:
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


def test_json_round_trip(run_dir: Path) -> None:
    report, curves = fabricated()
    assert json.loads((run_dir / "report.json").read_text(encoding="utf-8")) == report
    assert json.loads((run_dir / "curves.json").read_text(encoding="utf-8")) == curves


def test_pngs_are_small_pictures(run_dir: Path) -> None:
    for path in (run_dir / "figures").iterdir():
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG\r\n") and 3_000 < len(content) <= 60_000, (path.name, len(content))
        assert 900 < int.from_bytes(content[16:20]) < 1000  # pixels wide


def test_page_is_whole_and_loads_nothing(html: str) -> None:
    page = Page(html)
    tags = [tag for tag, _ in page.seen]
    assert tags.count("svg") == 5 and "script" not in tags and "link" not in tags
    assert "http://" not in html and "https://" not in html
    assert "url(" not in html.replace("url(#", "")
    for _, attributes in page.seen:
        for name in ("src", "href", "srcset", "data"):
            assert (attributes.get(name) or "#").startswith("#")
    assert len(html) < 600_000


def test_ids_are_unique_and_references_resolve(html: str) -> None:
    page = Page(html)
    ids = [attributes["id"] for _, attributes in page.seen if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {str(a["href"]).lstrip("#") for _, a in page.seen if "href" in a} <= set(ids)


def test_figures_take_their_colours_from_the_page(html: str) -> None:
    drawn = html[html.index("<svg") :]
    for colour in ("before", "control", "after", "reference"):
        assert f"var(--{colour})" in drawn
    assert "#0072b2" not in drawn and "#000000" not in drawn


def test_numbers_are_on_the_page(html: str) -> None:
    report, _ = fabricated()
    text = Page(html).text
    for stage in ("before", "control", "after"):
        assert f"{report[stage]['unstable']} of 32" in text
        assert f"{report['extended'][stage]['unstable']} of 32" in text
    for expected in ("278", "281", "about the same", "BondDeviation", "followed to 10 ps", "friction_per_ps"):
        assert expected in text
    assert "… (21 values)" in text


def test_errors_of_observables_and_atoms_that_broke_are_told(tmp_path: Path) -> None:
    report, curves = fabricated()
    report["before"]["broken_atoms"] = {"C1-H14": 3, "O2-H3": 1}
    for stage, error in (("before", 0.0042), ("after", 0.0031)):
        report[stage]["observables_standard_error"] = {"bond_lengths": error}
        for shown in curves[stage]["observables"].values():
            shown["standard_error"] = [0.01] * len(shown["mean"])
    text = written(tmp_path / "told", report, curves).text
    assert "± 0.0042" in text and "± 0.0031" in text
    assert "C1-H14 (3 times), O2-H3" in text


def test_a_change_within_its_error_is_not_told(tmp_path: Path) -> None:
    report, curves = fabricated()
    sentence = "closer to the reference (mean absolute error): bond lengths"
    assert sentence in written(tmp_path / "sure", report, curves).text
    report["after"]["observables_standard_error"] = {"bond_lengths": 10.0}
    assert sentence not in written(tmp_path / "unsure", report, curves).text


def test_improvement_is_worded_as_one(html: str) -> None:
    lead = Page(html).lead
    assert "Fewer replicas fail: 26 of 32 before, 2 of 32 after, within 1 ps." in lead
    assert "closer to the reference" in lead and "further from" not in lead
    assert 'class="lead better"' in html


def test_worse_is_worded_as_worse(tmp_path: Path) -> None:
    report, _ = fabricated(before=0.1, after=1.9, control=None, after_force=420.0)
    page = write_report(tmp_path / "run", report, {}).read_text(encoding="utf-8")
    lead = Page(page).lead
    assert "Worse than before, more replicas fail" in lead and "Fewer" not in lead
    assert "the force error grew by 51 %" in lead
    assert "further from the reference" in lead and "closer to" not in lead
    assert 'class="lead worse"' in page
    assert "Worse than before" in summary(report)


def test_chance_is_worded_as_unclear(tmp_path: Path) -> None:
    report, _ = fabricated(before=0.30, after=0.22, control=None)
    assert 0 < report["after"]["unstable"] < report["before"]["unstable"]
    assert "No clear difference in stability" in written(tmp_path / "run", report).lead
    assert "No clear difference" in summary(report)


def test_half_a_repair_is_no_repair(tmp_path: Path) -> None:
    report, _ = fabricated(before=8.0, after=1.1, control=None)
    assert "though most still do" in written(tmp_path / "run", report).lead


def test_nothing_to_repair(tmp_path: Path) -> None:
    report, _ = fabricated(before=1e-6, after=1e-6, control=None)
    page = written(tmp_path / "run", report)
    assert "nothing shows that training helped" in page.lead
    assert "0 failures seen, at most 115 per ns (95 %)" in page.text
    assert "≤ 115" in page.text


def test_the_longer_horizon_speaks_where_the_first_cannot(tmp_path: Path) -> None:
    report, _ = fabricated(before=1e-6, after=1e-6, control=None)
    report["extended"]["before"] |= {"unstable": 20}
    assert (
        "Fewer replicas fail: 20 of 32 before, 0 of 32 after, within 10 ps." in written(tmp_path / "run", report).lead
    )
    assert "No replica failed" not in summary(report)


def test_a_gain_that_does_not_last_is_said(tmp_path: Path) -> None:
    report, _ = fabricated(before=1.9, after=0.3, control=None)
    late = report["extended"]["after"]["unstable"]
    assert late > 16
    lead = written(tmp_path / "run", report).lead
    assert f"within 1 ps; followed to 10 ps, {late} of 32 fail even after training." in lead


def test_control_that_does_as_well_is_said(tmp_path: Path) -> None:
    report, _ = fabricated(control=0.05)
    assert "the observable is not shown to be what helped" in written(tmp_path / "run", report).lead


def test_unlike_evaluations_are_not_compared(tmp_path: Path) -> None:
    report, _ = fabricated(control=None)
    report["after"]["threshold"] = 2.0
    page = written(tmp_path / "run", report)
    assert "not evaluated alike" in page.lead and "Fewer" not in page.lead


def test_without_control(tmp_path: Path) -> None:
    report, _ = fabricated(control=None)
    report["extended"] = None
    text = written(tmp_path / "run", report).text
    assert "ontrol" not in text and "ollowed to" not in text


def test_evaluation_alone(tmp_path: Path) -> None:
    report, curves = fabricated()
    alone = {"title": "Aspirin", "settings": {}, "evaluation": report["before"], "wall_s": 31.0, "md_steps": 64_000}
    alone["extended"] = {"evaluation": report["extended"]["before"]}
    curves = {"evaluation": curves["before"], "axes": curves["axes"]}
    page = written(tmp_path / "run", alone, curves)
    assert "26 of 32 replicas failed within 1 ps." in page.lead
    assert "→" not in page.text and "StABlE phase" not in page.text and "Fisher" not in page.text
    assert not (tmp_path / "run" / "figures" / "windows.png").exists()
    assert summary(alone).splitlines() == [
        "26 of 32 replicas failed within 1 ps.",
        "Force MAE 278 meV/Å, energy MAE 12.1 meV/atom (held out).",
        "Failed when followed to 10 ps: 32 of 32.",
        "Evaluation: 64,000 MD steps, 31 s.",
    ]


def test_the_least_that_a_runner_gives(tmp_path: Path) -> None:
    entry = fabricated()[0]["before"] | {"force_mae_mev_per_A": None, "energy_mae_mev_per_atom": None}
    entry["observables"] = {"bond_lengths": None}
    least = {"title": "Aspirin", "settings": {}, "evaluation": entry, "extended": None, "versions": {}}
    page = written(tmp_path / "run", least)
    assert "Force" not in page.text.split("How the numbers are defined")[0]
    assert summary(least) == "26 of 32 replicas failed within 1 ps."


def test_before_and_after_without_labels(tmp_path: Path) -> None:
    report, _ = fabricated()
    for stage in ("before", "control", "after"):
        report[stage]["force_mae_mev_per_A"] = report[stage]["energy_mae_mev_per_atom"] = None
    page = written(tmp_path / "run", report)
    assert "meV" not in page.text and "force error" not in page.lead
    assert "meV" not in summary(report)


def test_hostile_text_is_escaped(tmp_path: Path) -> None:
    report, curves = fabricated()
    report["title"] = HOSTILE
    report["settings"] = {HOSTILE: {HOSTILE: [HOSTILE, {HOSTILE: HOSTILE}]}}
    report["versions"] = {HOSTILE: HOSTILE}
    report["windows"][0]["phase"] = HOSTILE
    for stage in ("before", "control", "after"):
        report[stage]["detector"] = HOSTILE
        report[stage]["observables"] = {HOSTILE: 0.1}
        curves[stage]["observables"] = {HOSTILE: curves[stage]["observables"]["bond_lengths"]}
    curves["axes"] = {HOSTILE: {"kind": "bars", "x": [HOSTILE] * 21, "xlabel": HOSTILE, "ylabel": f"a / {HOSTILE}"}}
    html = write_report(tmp_path / "run", report, curves).read_text(encoding="utf-8")
    page = Page(html)
    assert "<script" not in html.lower()
    assert {tag for tag, _ in page.seen}.isdisjoint({"script", "iframe", "object", "embed", "img"})
    assert page.text.count(HOSTILE) > 10
    # The axis label, cut to its room and not read as a formula.
    assert f"{escape(HOSTILE[:39], quote=False)}…</text>" in html
    assert all(not name.startswith("on") for _, attributes in page.seen for name in attributes)
    assert all(path.parent.name == "figures" for path in (tmp_path / "run").rglob("*.png"))


@pytest.mark.parametrize("name", ["report.json", "curves.json", "report.html"])
def test_an_existing_report_is_not_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match=rf"{name} exists .* give a new run_dir"):
        write_report(tmp_path, *fabricated(control=None))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_other_files_of_the_run_stay(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_text("weights")
    written(tmp_path, fabricated()[0])
    assert (tmp_path / "model.pt").read_text() == "weights"


def test_what_json_cannot_say(tmp_path: Path) -> None:
    report, curves = fabricated(control=None)
    report["after"]["force_mae_mev_per_A"] = float("nan")
    report["after"]["observables"]["bond_lengths"] = float("inf")
    report["after"]["unstable"] = np.int64(report["after"]["unstable"])
    report["settings"]["path"] = Path("models") / "a.pt"
    curves["before"]["observables"]["bond_lengths"]["mean"][3] = float("nan")
    curves["after"]["survival"] = {key: np.array(value) for key, value in curves["after"]["survival"].items()}
    page = written(tmp_path / "run", report, curves)
    assert "change unknown" in page.text and "nan" not in page.text.lower()
    stored = json.loads((tmp_path / "run" / "report.json").read_text())
    assert stored["after"]["force_mae_mev_per_A"] is None and stored["settings"]["path"] == "models/a.pt"


def test_numbers_are_kept_when_a_figure_fails(tmp_path: Path) -> None:
    report, curves = fabricated(control=None)
    curves["axes"]["bond_lengths"]["x"] = BONDS[:-1]
    with pytest.raises(ValueError, match="has 21 means for 21 targets and 20 positions"):
        write_report(tmp_path / "run", report, curves)
    assert json.loads((tmp_path / "run" / "report.json").read_text()) == report


def test_missing_stages_are_named(tmp_path: Path) -> None:
    report, curves = fabricated()
    del report["before"]
    for call in (lambda: write_report(tmp_path / "run", report, curves), lambda: summary(report)):
        with pytest.raises(ValueError, match=r"\['control', 'after'\]: give 'before' and 'after'"):
            call()
    assert not (tmp_path / "run").exists()


def test_summary_of_a_whole_run() -> None:
    report, _ = fabricated()
    assert summary(report).splitlines() == [
        f"Before: 26 of 32 replicas failed within 1 ps (median stable time "
        f"{report['before']['median_stable_ps']:.3g} ps). Control: {report['control']['unstable']} of 32 "
        f"(median stable time {report['control']['median_stable_ps']:.3g} ps). After: 2 of 32.",
        "Force MAE 278 -> 281 meV/Å, energy MAE 12.1 -> 12.2 meV/atom (held out).",
        f"Failed when followed to 10 ps: before 32 of 32, control 32 of 32, after "
        f"{report['extended']['after']['unstable']} of 32.",
        "StABlE phase: 13 windows, 48 optimizer steps, 332,800 MD steps, 452 s.",
    ]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20), st.sampled_from(["", HOSTILE, "<img src=//a.b>"])
)
def test_whatever_text_is_in_a_report_none_of_it_is_markup(text: str, more: str) -> None:
    text += more
    report, _ = fabricated(control=None)
    report |= {"title": text, "settings": {text: [text, {text: text}]}, "versions": {text: text}}
    report["windows"][0]["phase"] = text
    for part in (report, report["extended"]):
        for stage in ("before", "after"):
            part[stage] |= {"detector": text, "observables": {text: 0.1}, "broken_atoms": {text: 2}}
            part[stage]["observables_standard_error"] = {text: 0.01}
    html = render(report, [], {text: {"kind": "bars", "x": [text], "xlabel": text, "ylabel": f"a / {text}"}})
    plain, _ = fabricated(control=None)
    for part in (plain, plain["extended"]):
        for stage in ("before", "after"):
            part[stage] |= {"detector": "(", "observables": {"a": 0.1}, "broken_atoms": {"a": 2}}
            part[stage]["observables_standard_error"] = {"a": 0.01}
    plain |= {"title": "a", "settings": {"a": ["a", {"a": "a"}]}, "versions": {"a": "a"}}
    expected = render(plain, [], {"a": {"ylabel": "a / a"}})
    # The very elements of a report without any such text, and no more.
    assert [tag for tag, _ in Page(html).seen] == [tag for tag, _ in Page(expected).seen]
    assert "default-src 'none'" in html
    assert all(
        not (attributes.get("href") or "#").lower().startswith(("http", "//")) for _, attributes in Page(html).seen
    )


def test_atoms_and_elements_of_hostile_names_are_escaped_in_figures_and_tables(tmp_path: Path) -> None:
    report, curves = fabricated(control=None)
    for stage in ("before", "after"):
        report[stage]["broken_atoms"] = {HOSTILE: 2}
    curves["axes"]["bond_lengths"]["x"] = [HOSTILE] * len(BONDS)
    for axis in ("distance_distribution", "angle_distribution"):
        curves["axes"][axis] |= {"xlabel": HOSTILE, "ylabel": HOSTILE}
    html = write_report(tmp_path / "run", report, curves).read_text(encoding="utf-8")
    tags = {tag for tag, _ in Page(html).seen}
    assert "<script" not in html.lower() and tags.isdisjoint({"script", "iframe", "object", "embed", "img", "image"})
    assert HOSTILE in Page(html).text


def test_the_page_forbids_loading_anything(html: str) -> None:
    (policy,) = (
        a["content"] for _, a in Page(html).seen if str(a.get("http-equiv")).lower() == "content-security-policy"
    )
    assert policy is not None and "default-src 'none'" in policy
    # What the figures need is in the page; nothing else is opened up again.
    assert {part.split()[0] for part in policy.split(";") if part.strip()} <= {"default-src", "style-src", "img-src"}
    assert "http" not in policy and "*" not in policy and "@import" not in html
