"""Sentences of a report: verdict, findings and warnings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fabricated_report import Page, fabricated, written

from stable_plugin.evaluation import wording
from stable_plugin.evaluation.report import summary, write_report
from stable_plugin.evaluation.report_warnings import (
    MAX_ENERGY_MAE_RATIO,
    MAX_FORCE_MAE_GROWTH,
    MIN_ENERGY_MAE_INCREASE_MEV,
    report_warnings,
)


def test_findings_omit_insignificant_changes(tmp_path: Path) -> None:
    report, curves = fabricated()
    sentence = "closer to the reference (mean absolute error): bond lengths"
    assert sentence in written(tmp_path / "significant", report, curves).text
    report["after"]["observables_standard_error"] = {"bond_lengths": 10.0}
    assert sentence not in written(tmp_path / "insignificant", report, curves).text


def test_headline_improvement(tmp_path: Path) -> None:
    html = write_report(tmp_path / "run", *fabricated()).read_text(encoding="utf-8")
    lead = Page(html).lead
    assert "Fewer replicas fail: 26 of 32 before, 2 of 32 after, within 1 ps." in lead
    assert "closer to the reference" in lead and "further from" not in lead
    assert 'class="lead better"' in html


def test_headline_worse(tmp_path: Path) -> None:
    report, _ = fabricated(before=0.1, after=1.9, control=None, after_force=420.0)
    page = write_report(tmp_path / "run", report, {}).read_text(encoding="utf-8")
    lead = Page(page).lead
    assert "Worse than before, more replicas fail" in lead and "Fewer" not in lead
    assert "the force error grew by 51 %" in lead
    assert "further from the reference" in lead and "closer to" not in lead
    assert 'class="lead worse"' in page
    assert "Worse than before" in summary(report)


def test_headline_no_significant_difference(tmp_path: Path) -> None:
    report, _ = fabricated(before=0.30, after=0.22, control=None)
    assert 0 < report["after"]["unstable"] < report["before"]["unstable"]
    assert "No significant difference in stability" in written(tmp_path / "run", report).lead
    assert "No significant difference" in summary(report)


def test_headline_most_still_fail(tmp_path: Path) -> None:
    report, _ = fabricated(before=8.0, after=1.1, control=None)
    assert "but most still do" in written(tmp_path / "run", report).lead


def test_headline_without_failures(tmp_path: Path) -> None:
    report, _ = fabricated(before=1e-6, after=1e-6, control=None)
    page = written(tmp_path / "run", report)
    assert "there is no evidence that training helped" in page.lead
    assert "0 failures seen, at most 115 per ns (95 %)" in page.text
    assert "≤ 11.5" in page.text, "the tiles show the longer horizon"


def test_headline_uses_the_longer_horizon(tmp_path: Path) -> None:
    report, _ = fabricated(before=1e-6, after=1e-6, control=None)
    report["extended"]["before"] |= {"unstable": 20}
    assert (
        "Fewer replicas fail: 20 of 32 before, 0 of 32 after, within 10 ps." in written(tmp_path / "run", report).lead
    )
    assert "No replica failed" not in summary(report)


def test_headline_improvement_that_does_not_last(tmp_path: Path) -> None:
    report, _ = fabricated(before=1.9, after=0.3, control=None)
    failed_later = report["extended"]["after"]["unstable"]
    assert failed_later > 16
    lead = written(tmp_path / "run", report).lead
    assert f"within 1 ps; within 10 ps, {failed_later} of 32 fail even after training." in lead


def test_findings_control_as_good_as_stable(tmp_path: Path) -> None:
    report, _ = fabricated(control=0.05)
    assert "there is no evidence that the repair caused the improvement" in written(tmp_path / "run", report).lead


def test_headline_incomparable_evaluations(tmp_path: Path) -> None:
    report, _ = fabricated(control=None)
    report["after"]["threshold"] = 2.0
    page = written(tmp_path / "run", report)
    assert (
        "Before and after cannot be compared: they were evaluated with different horizons or detectors." in page.lead
        and "Fewer" not in page.lead
    )


FORCES, ENERGIES = "force_mae_mev_per_A", "energy_mae_mev_per_atom"


def with_errors(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Return a repaired and verified model with other errors on held-out frames."""
    report, _ = fabricated(control=None)
    report["before"] |= before
    report["after"] |= after
    return report


def test_report_warnings_none_for_a_good_repair(tmp_path: Path) -> None:
    report, _ = fabricated()
    assert report_warnings(report) == []
    page = written(tmp_path / "run", report)
    assert "Warning" not in page.text and "Warning" not in summary(report)


def test_report_warnings_force_bound() -> None:
    assert MAX_FORCE_MAE_GROWTH == 0.10
    assert report_warnings(with_errors({FORCES: 100.0}, {FORCES: 109.9})) == []
    (warning,) = report_warnings(with_errors({FORCES: 100.0}, {FORCES: 110.1}))
    assert "made forces worse" in warning and "from 100 to 110 meV/Å (+10 %)" in warning


def test_report_warnings_energy_ratio_bound() -> None:
    assert MAX_ENERGY_MAE_RATIO == 2.0
    assert report_warnings(with_errors({ENERGIES: 15.0}, {ENERGIES: 30.0})) == []
    (warning,) = report_warnings(with_errors({ENERGIES: 15.0}, {ENERGIES: 30.1}))
    assert "made energies worse" in warning and "from 15 to 30.1 meV per atom" in warning


def test_report_warnings_energy_increase_bound() -> None:
    assert MIN_ENERGY_MAE_INCREASE_MEV == 5.0
    assert report_warnings(with_errors({ENERGIES: 0.5}, {ENERGIES: 5.4})) == []
    assert len(report_warnings(with_errors({ENERGIES: 0.5}, {ENERGIES: 5.5}))) == 1
    assert len(report_warnings(with_errors({ENERGIES: 0.0}, {ENERGIES: 5.0}))) == 1


@pytest.mark.parametrize(("key", "quantity"), [(FORCES, "force"), (ENERGIES, "energy")])
def test_report_warnings_nonfinite_errors(key: str, quantity: str) -> None:
    for value in (None, float("nan"), float("inf")):
        (warning,) = report_warnings(with_errors({key: 20.0}, {key: value}))
        assert f"The {quantity} MAE on held-out frames is not a finite number" in warning
    assert report_warnings(with_errors({key: None}, {key: None})) == []


def test_report_warnings_are_last_and_on_the_page(tmp_path: Path) -> None:
    report = with_errors({ENERGIES: 15.0}, {ENERGIES: 118.0, FORCES: 400.0})
    warnings = report_warnings(report)
    assert len(warnings) == 2
    assert summary(report).splitlines()[-2:] == [f"Warning: {line}" for line in warnings]
    lead = written(tmp_path / "run", report).lead
    assert "Warnings" in lead and all(line in lead for line in warnings)


VERIFICATION = {
    "is_verified": False, "max_failures_per_ns": 100.0, "bound_per_ns": 415.0, "confidence": 0.975, "failures": 1,
    "exposure_ps": 12.4, "remaining_ps": 1.18, "reason": "max_windows is reached", "system": "",
}  # fmt: skip


def test_report_warnings_state_the_bound() -> None:
    report, _ = fabricated()
    report["verifications"] = [VERIFICATION]
    (warning,) = report_warnings(report)
    assert warning == (
        "The potential is not verified to have less than 100 failures per ns: max_windows is reached; 1 failure(s) in 12.4 ps "
        "of all replicas, at most 415 per ns (97.5 %). It would take 1.18 ps per replica without a further failure to verify "
        "it. Raise max_windows."
    )
    assert summary(report).splitlines()[-1] == f"Warning: {warning}"


def test_report_warnings_name_each_unverified_system() -> None:
    report, _ = fabricated()
    report["verifications"] = [
        {**VERIFICATION, "system": "H2O"},
        {**VERIFICATION, "is_verified": True, "system": "CH4"},
    ]
    (warning,) = report_warnings(report)
    assert warning.startswith("The potential on H2O is not verified")


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("radial_distribution_O_H", "Radial distribution O-H"),
        ("power_spectrum_O", "Power spectrum O"),
        ("velocity_autocorrelation", "Velocity autocorrelation"),
        ("bond_lengths", "Bond lengths"),
        ("pressure", "Pressure"),
    ],
)
def test_names_of_observables_keep_the_elements(name: str, title: str) -> None:
    assert wording.observable_name(name) == title
    assert wording.name_in_sentence(name) == title[0].lower() + title[1:]
