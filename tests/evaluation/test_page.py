"""HTML page of a fabricated aspirin report: complete, self-contained, escaped."""

from __future__ import annotations

from html import escape
from pathlib import Path

import pytest
from fabricated_report import BONDS, HOSTILE, Page, fabricated, written
from hypothesis import given, settings
from hypothesis import strategies as st

from stable_plugin.evaluation.page import render
from stable_plugin.evaluation.report import summary, write_report


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("runs") / "aspirin"
    return write_report(folder, *fabricated()).read_text(encoding="utf-8")


def test_page_is_complete_and_loads_nothing(html: str) -> None:
    page = Page(html)
    tags = [tag for tag, _ in page.seen]
    assert tags.count("svg") == 5 and "script" not in tags and "link" not in tags
    assert "http://" not in html and "https://" not in html
    assert "url(" not in html.replace("url(#", "")
    for _, attributes in page.seen:
        for name in ("src", "href", "srcset", "data"):
            assert (attributes.get(name) or "#").startswith("#")
    assert len(html) < 600_000


def test_page_ids_are_unique_and_resolve(html: str) -> None:
    page = Page(html)
    ids = [attributes["id"] for _, attributes in page.seen if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {str(a["href"]).lstrip("#") for _, a in page.seen if "href" in a} <= set(ids)


def test_page_figures_use_css_colors(html: str) -> None:
    drawn = html[html.index("<svg") :]
    for color in ("before", "control", "after", "reference"):
        assert f"var(--{color})" in drawn
    assert "#0072b2" not in drawn and "#000000" not in drawn


def test_page_shows_the_numbers(html: str) -> None:
    report, _ = fabricated()
    text = Page(html).text
    for stage in ("before", "control", "after"):
        assert f"{report[stage]['unstable']} of 32" in text
        assert f"{report['extended'][stage]['unstable']} of 32" in text
    for expected in ("278", "281", "about the same", "BondDeviation", "up to 10 ps", "friction_per_ps"):
        assert expected in text
    assert "… (21 values)" in text


def test_page_shows_errors_and_offending_atoms(tmp_path: Path) -> None:
    report, curves = fabricated()
    report["before"]["offending_atoms"] = {"C1-H14": 3, "O2-H3": 1}
    for stage, error in (("before", 0.0042), ("after", 0.0031)):
        report[stage]["observables_standard_error"] = {"bond_lengths": error}
        for shown in curves[stage]["observables"].values():
            shown["standard_error"] = [0.01] * len(shown["mean"])
    text = written(tmp_path / "run", report, curves).text
    assert "± 0.0042" in text and "± 0.0031" in text
    assert "C1-H14 (3 times), O2-H3" in text


def test_page_without_control(tmp_path: Path) -> None:
    report, _ = fabricated(control=None)
    report["extended"] = None
    text = written(tmp_path / "run", report).text
    assert "control" not in text.lower() and "10 ps" not in text


def test_page_of_a_single_evaluation(tmp_path: Path) -> None:
    report, curves = fabricated()
    report_alone = {
        "title": "Aspirin",
        "settings": {},
        "evaluation": report["before"],
        "wall_s": 31.0,
        "md_steps": 64_000,
    }
    report_alone["extended"] = {"evaluation": report["extended"]["before"]}
    curves = {"evaluation": curves["before"], "axes": curves["axes"]}
    page = written(tmp_path / "run", report_alone, curves)
    assert "26 of 32 replicas failed within 1 ps." in page.lead
    assert "→" not in page.text and "StABlE phase" not in page.text and "Fisher" not in page.text
    assert not (tmp_path / "run" / "figures" / "windows.png").exists()
    assert summary(report_alone).splitlines() == [
        "26 of 32 replicas failed within 1 ps.",
        "Force MAE 278 meV/Å, energy MAE 12.1 meV/atom (held out).",
        "Failed within 10 ps: 32 of 32.",
        "Evaluation: 64,000 MD steps, 31 s.",
    ]


def test_summary_has_no_number_that_one_stage_lacks() -> None:
    """The zero of energy is fitted only where it explains most of the error."""
    report, _ = fabricated()
    report["before"]["energy_mae_fitted_zero_mev_per_atom"] = 7.5
    assert "fitted" not in summary(report)
    report["after"]["energy_mae_fitted_zero_mev_per_atom"] = 5.5
    assert "with the zero of energy fitted per element 7.5 -> 5.5 meV/atom (held out)" in summary(report)


def test_page_of_a_minimal_report(tmp_path: Path) -> None:
    entry = fabricated()[0]["before"] | {"force_mae_mev_per_A": None, "energy_mae_mev_per_atom": None}
    entry["observables"] = {"bond_lengths": None}
    minimal = {"title": "Aspirin", "settings": {}, "evaluation": entry, "extended": None, "versions": {}}
    page = written(tmp_path / "run", minimal)
    assert "Force" not in page.text.split("Definitions")[0]
    assert summary(minimal) == "26 of 32 replicas failed within 1 ps."


def test_page_without_labeled_frames(tmp_path: Path) -> None:
    report, _ = fabricated()
    for part in (report, report["extended"]):
        for stage in ("before", "control", "after"):
            part[stage]["force_mae_mev_per_A"] = part[stage]["energy_mae_mev_per_atom"] = None
    page = written(tmp_path / "run", report)
    assert "meV" not in page.text and "force error" not in page.lead
    assert "meV" not in summary(report)


@pytest.mark.parametrize(("xlabel", "sentence"), [("bond", "reference, for each bond."), ("", "reference. Error")])
def test_caption_names_what_the_bars_are(tmp_path: Path, xlabel: str, sentence: str) -> None:
    report, curves = fabricated()
    curves["axes"]["bond_lengths"]["xlabel"] = xlabel
    assert sentence in Page(write_report(tmp_path / "run", report, curves).read_text(encoding="utf-8")).text


def test_page_escapes_hostile_text(tmp_path: Path) -> None:
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
    # The truncated axis label, not parsed as a formula.
    assert f"{escape(HOSTILE[:39], quote=False)}…</text>" in html
    assert all(not name.startswith("on") for _, attributes in page.seen for name in attributes)
    assert all(path.parent.name == "figures" for path in (tmp_path / "run").rglob("*.png"))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20), st.sampled_from(["", HOSTILE, "<img src=//a.b>"])
)
def test_render_never_turns_text_into_markup(text: str, more: str) -> None:
    text += more
    report, _ = fabricated(control=None)
    report |= {"title": text, "settings": {text: [text, {text: text}]}, "versions": {text: text}}
    report["windows"][0]["phase"] = text
    for part in (report, report["extended"]):
        for stage in ("before", "after"):
            part[stage] |= {"detector": text, "observables": {text: 0.1}, "offending_atoms": {text: 2}}
            part[stage]["observables_standard_error"] = {text: 0.01}
    html = render(report, [], {text: {"kind": "bars", "x": [text], "xlabel": text, "ylabel": f"a / {text}"}})
    plain, _ = fabricated(control=None)
    for part in (plain, plain["extended"]):
        for stage in ("before", "after"):
            part[stage] |= {"detector": "(", "observables": {"a": 0.1}, "offending_atoms": {"a": 2}}
            part[stage]["observables_standard_error"] = {"a": 0.01}
    plain |= {"title": "a", "settings": {"a": ["a", {"a": "a"}]}, "versions": {"a": "a"}}
    expected = render(plain, [], {"a": {"ylabel": "a / a"}})
    # The same elements as of a report with plain text.
    assert [tag for tag, _ in Page(html).seen] == [tag for tag, _ in Page(expected).seen]
    assert "default-src 'none'" in html
    assert all(
        not (attributes.get("href") or "#").lower().startswith(("http", "//")) for _, attributes in Page(html).seen
    )


def test_page_escapes_hostile_labels_in_figures(tmp_path: Path) -> None:
    report, curves = fabricated(control=None)
    for stage in ("before", "after"):
        report[stage]["offending_atoms"] = {HOSTILE: 2}
    curves["axes"]["bond_lengths"]["x"] = [HOSTILE] * len(BONDS)
    for axis in ("distance_distribution", "angle_distribution"):
        curves["axes"][axis] |= {"xlabel": HOSTILE, "ylabel": HOSTILE}
    html = write_report(tmp_path / "run", report, curves).read_text(encoding="utf-8")
    tags = {tag for tag, _ in Page(html).seen}
    assert "<script" not in html.lower() and tags.isdisjoint({"script", "iframe", "object", "embed", "img", "image"})
    assert HOSTILE in Page(html).text


def test_page_policy_forbids_loading(html: str) -> None:
    (policy,) = (
        a["content"] for _, a in Page(html).seen if str(a.get("http-equiv")).lower() == "content-security-policy"
    )
    assert policy is not None and "default-src 'none'" in policy
    # Nothing beyond inline styles and images is allowed again.
    assert {part.split()[0] for part in policy.split(";") if part.strip()} <= {"default-src", "style-src", "img-src"}
    assert "http" not in policy and "*" not in policy and "@import" not in html
