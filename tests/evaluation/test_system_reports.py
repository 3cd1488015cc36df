"""Reports of several systems: a page for each, a table of all, and the total."""

import json

import pytest
from fabricated_report import evaluated

from stable_plugin.evaluation import Evaluation, summary, system_reports, write_system_reports
from stable_plugin.evaluation.verdict import judge


def result(unstable, name, followed_ps=16.0, others=(), **attributes):
    summary_, survival = evaluated(1.0, 1.0, 20.0, 1.0)
    verdict = judge(unstable, followed_ps, "bonds")
    summary_ |= {
        "unstable": unstable,
        "verdict": verdict.as_dict(),
        "failures_per_ns": verdict.failures_per_ns,
        "failures_per_ns_interval": list(verdict.interval),
        "observables": {},
    }
    return Evaluation(
        [summary_],
        {"survival": survival, "observables": {}},
        {},
        name,
        {each.name: each for each in others},
        **attributes,
    )


def stages():
    return {
        "before": result(20, "A", 16.0, [result(4, "B", 30.0), result(0, "C", 32.0)]),
        "after": result(1, "A", 31.0, [result(25, "B", 12.0)], not_evaluated={"C": "no finite forces"}, failed=["C"]),
        "control": None,
    }


def test_reports_of_several_systems(tmp_path):
    windows = [
        {"window": 1, "phase": "simulate", "system": name, "unstable_fraction": 0.5, "steps": 0} for name in "AB"
    ]
    reports = system_reports({"title": "Repair", "windows": windows}, stages())
    page = write_system_reports(tmp_path, reports)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["before"]["unstable"] == 20 and report["systems"]["B"]["after"]["unstable"] == 25
    total = report["total"]
    assert (total["before"]["unstable"], total["after"]["unstable"]) == (24, 26)
    assert total["before"]["replicas"] == 64
    assert total["before"]["verdict"]["followed_ns"] == pytest.approx(0.046)
    assert total["after"]["failures_per_ns"] == pytest.approx(26 / 0.043)
    text = page.read_text()
    assert '<a href="systems/B/report.html">B</a>' in text
    assert "All 2 systems" in text and "26 of 64" in text and "43 ps" in text
    assert "Fails, 2 systems together: 26 failures in 43 ps" in text
    assert "A: Fewer replicas fail: 20 of 32 before, 1 of 32 after" in text
    assert "More replicas of B fail after the repair: 4 of 32 before, 25 of 32 after." in text
    assert "C was not evaluated: no finite forces." in text
    assert '<th scope="col">System</th></tr>' in text, "windows name their system"
    other = (tmp_path / "systems" / "B" / "report.html").read_text()
    assert '<a href="../../report.html">all systems</a>' in other and "Repair: B" in other
    assert "Systems</h2>" not in other
    printed = summary(reports[0].report)
    assert "A: Before: 20 of 32" in printed and "B: Before: 4 of 32" in printed
    assert "Warning: C was not evaluated: no finite forces." in printed


def test_a_system_that_fails_by_itself_is_named_beside_a_total_that_does_not():
    evaluation = result(0, "A", 40000.0, [result(8, "B", 100.0)])
    (root, _) = system_reports({"title": "x"}, {"evaluation": evaluation})
    assert summary(root.report).splitlines()[0].startswith("Holds, 2 systems together: 8 failures")
    assert summary(root.report).splitlines()[0].endswith("Fails by itself: B.")


def test_report_of_one_system_has_no_table(tmp_path):
    (only,) = system_reports({"title": "x"}, {"evaluation": result(0, "A")})
    assert not {"systems", "system", "total"} & set(only.report)
    assert "Systems</h2>" not in write_system_reports(tmp_path, [only]).read_text()


def test_no_system_in_all_stages_is_an_error():
    before = result(0, "A", not_evaluated={"B": "no finite forces"}, failed=["B"])
    after = result(0, "B", not_evaluated={"A": "no finite forces"}, failed=["A"])
    with pytest.raises(ValueError, match="no system could be evaluated in all of the stages before, after"):
        system_reports({"title": "x"}, {"before": before, "after": after})


def test_page_shows_errors_by_head_and_the_fitted_zero(tmp_path):
    errors = {
        "energy_mae_mev_per_atom": 44816.0,
        "energy_mae_fitted_zero_mev_per_atom": 12.5,
        "force_mae_by_head_mev_per_A": {"pt_head": 87.5, "Default": 21.0},
        "energy_mae_by_head_mev_per_atom": {"pt_head": 3.25, "Default": 1.5},
    }
    evaluation = result(0, "A")
    evaluation.summaries[0].update(errors)
    page = write_system_reports(tmp_path, system_reports({"title": "x"}, {"evaluation": evaluation})).read_text()
    for row in (
        "Head pt_head: Force MAE / meV/Å</th><td>87.5",
        "Head Default: Force MAE / meV/Å</th><td>21",
        "Head pt_head: Energy MAE / meV per atom</th><td>3.25",
        "Head Default: Energy MAE / meV per atom</th><td>1.5",
    ):
        assert row in page
    assert "The zero of energy of the model is not that of the labels" in page
    assert "44,800 → 12.5 meV per atom" in page
