"""Definitions of the terms in a report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stable_plugin.evaluation.formatting import number
from stable_plugin.evaluation.wording import SIGNIFICANCE, evaluations


def definitions(report: Mapping[str, Any]) -> dict[str, str]:
    """Return the terms that a report uses with their definitions.

    Args:
        report: See :func:`stable_plugin.evaluation.report.write_report`.

    Returns:
        Definition by term, in the order of the page.
    """
    stages = evaluations(report)
    summary = next(iter(stages.values()))
    detector = str(summary["detector"])
    if "(" not in detector and "limits" not in detector:
        detector += f" with a threshold of {number(summary['threshold'])}"
    terms = {
        "Replica": "One simulation with its own initial velocities and noise, started from a held-out frame that no "
        "potential was trained on.",
        "Failed": f"The detector, {detector}, flagged the replica at some time within the horizon "
        f"({number(summary['horizon_ps'])} ps).",
        "Limits": "Range that a quantity leaves in one frame of ten million at equilibrium, from its fluctuations in the "
        "reference frames.",
        "Median stable time": "Time at which the Kaplan-Meier curve first falls to one half. Replicas that did not fail "
        "are censored at the end of their simulation.",
        "Failure rate": "Failures divided by the total time at risk: for each replica, the time until its failure or the "
        "end of its simulation. Interval: exact 95 % interval of a Poisson count (Garwood). A single rate assumes a "
        "hazard that is constant in time.",
        "Force and energy MAE": "Mean absolute error on held-out frames with known forces and energies: over all force "
        "components, and for energies per atom.",
        "MAE of an observable": "Absolute difference between mean and reference, averaged over bonds or bins. The mean "
        "is taken over the frames of all replicas, each up to its failure, so a model whose replicas fail early is "
        "measured on fewer frames, and never on those after a failure. ±: standard error of the mean, averaged likewise, "
        "from the spread between replicas and between blocks of one picosecond.",
    }
    if any(each.get("observables_w1") for each in stages.values()):
        terms["Wasserstein-1"] = (
            "Mean distance that the probability of one distribution has to be moved to give the other. For bonds, angles and "
            "dihedrals, of the equivalent coordinates that differ most in relation to their level; for curves, as distributions "
            "over their axis. The first tenth of the simulation (equilibration_fraction) and frames after a failure are left "
            "out. Above, within: the largest distance of a block of the reference from its other blocks that is expected, at "
            "95 %. Without it, the reference or the simulation is too short."
        )
    if any(each.get("splitting") for each in [*stages.values(), *evaluations(report, "extended").values()]):
        terms["Splitting"] = (
            "Adaptive multilevel splitting: the quarter of the replicas that stayed furthest from a failure is replaced by copies "
            "of others, with exact weights, until failures are reached. The rate is -ln(1 - p) over the simulated time, with the "
            "probability p of a failure from the start frames. Interval: from the spread of independent runs, 95 %."
        )
    if "limits" not in detector:
        del terms["Limits"]
    if "before" in stages:
        terms["Fewer, more, no significant difference"] = (
            f"Two-sided Fisher's exact test on the numbers of failed replicas, at p = {SIGNIFICANCE:g}, with replicas "
            "taken as independent. It covers the randomness of the simulations, not of the training seed."
        )
    if "control" in stages:
        terms["Control"] = (
            "The model before StABlE training, trained further on energies and forces alone for the same number of "
            "optimizer steps at the same learning rates."
        )
    if report.get("windows"):
        terms["Probe, verification"] = (
            "A probe is one window from start states that are the same for all probes and that are not learned from. In a "
            "verification stable replicas continue, until a sequential test (Wald) shows that the failure rate is below "
            "max_failures_per_ns. The v-th verification may be wrong with a probability of 0.05 * 2 / 3^v, together 5 %."
        )
        terms["ESS fraction"] = (
            "Effective sample size of the frames after reweighting them to the updated potential, divided by their "
            "number; at 100 % they are as good as sampled from it."
        )
    return terms
