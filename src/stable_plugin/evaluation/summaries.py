"""Numbers and curves of a report, from simulated replicas."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from stable_plugin.detectors import Detector
from stable_plugin.evaluation.simulation import ReplicaTrajectories
from stable_plugin.evaluation.survival import kaplan_meier, median_stable_ps
from stable_plugin.evaluation.verdict import MAX_FAILURES_PER_NS, judge
from stable_plugin.md.cells import optional
from stable_plugin.observables import Observable, TimeCorrelation

MAX_ATOM_LABELS = 5
"""Number of offending atom labels in a summary, the most frequent ones."""

BLOCK_PS = 1.0
"""Blocks of a replica of this length count as independent in the standard errors of observables."""


@dataclass(frozen=True)
class Evaluation:
    """Result of evaluating one potential.

    Where the start frames have several systems, ``summaries``, ``curves`` and ``axes`` are those of the first one, and
    ``systems`` holds the results of all.

    Attributes:
        summaries: Numbers of the report, one mapping per horizon.
        curves: Survival and observables at the first horizon, for the figures.
        axes: Axes of the observables by name, for the figures.
        name: Name of the system.
        others: Results of the other systems by name.
        not_evaluated: Systems that were left out or could not be evaluated, with the reason.
        failed: Names of those in ``not_evaluated`` that should have been evaluated.
    """

    summaries: list[dict[str, Any]]
    curves: dict[str, Any]
    axes: dict[str, Any]
    name: str = ""
    others: dict[str, Evaluation] = field(default_factory=dict)
    not_evaluated: dict[str, str] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    @property
    def systems(self) -> dict[str, Evaluation]:
        """Results of all systems by name, that of the first one first."""
        return {self.name: self, **self.others}

    def to_json(self) -> dict[str, Any]:
        """Return the attributes as plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Evaluation:
        """Return the result that :meth:`to_json` was called on.

        Args:
            data: The attributes as plain data.
        """
        others = {name: cls.from_json(each) for name, each in data.get("others", {}).items()}
        return cls(**{**data, "others": others})


class ObservableComparison:
    """Observables of the simulated frames against their reference.

    Args:
        observables: Observables of single frames, bound to the system.
        correlations: Observables of trajectories, bound to the system.
    """

    def __init__(self, observables: Sequence[Observable], correlations: Sequence[TimeCorrelation]) -> None:
        self.observables = list(observables)
        self.correlations = list(correlations)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(observables={self.observables}, correlations={self.correlations})"

    def update(self, trajectories: ReplicaTrajectories, horizon_ps: float) -> None:
        """Compute all observables from the frames up to a horizon, each replica up to its failure."""
        within = trajectories.valid & (trajectories.times_ps <= horizon_ps * (1 + 1e-9))[:, None]
        # A frame at the very end of a block belongs to it, also when rounding puts it just beyond.
        block = (trajectories.times_ps / BLOCK_PS - 1e-9).long()
        for observable in self.observables:
            observable.reset()
            for number in block.unique():
                for replica in range(within.shape[1]):
                    chosen = within[:, replica] & (block == number)
                    cell = trajectories.cells(chosen, replica)
                    observable.update(trajectories.positions[chosen, replica], *optional(cell))
        n_frames = int(within.any(dim=1).sum())
        for correlation in self.correlations:
            correlation.reset()
            if n_frames > 0:
                correlation.update(
                    trajectories.positions[:n_frames], trajectories.velocities[:n_frames], within[:n_frames]
                )

    def computable(self) -> list[tuple[Observable | TimeCorrelation, bool]]:
        """Return each observable with whether the simulated frames suffice to compute it."""
        of_frames = [(observable, bool(observable.count > 0)) for observable in self.observables]
        return [*of_frames, *((correlation, correlation.complete) for correlation in self.correlations)]

    def errors(self) -> dict[str, dict[str, float | None]]:
        """Return mean absolute errors and their standard errors by name; None where there are too few frames."""
        found = self.computable()
        return {
            "observables": {
                observable.name: observable.mean_absolute_error() if enough else None for observable, enough in found
            },
            "observables_standard_error": {
                observable.name: observable.standard_error().mean().item() if enough else None
                for observable, enough in found
            },
        }

    def values(self) -> dict[str, dict[str, list[float]]]:
        """Return mean, target and standard error of each observable that can be computed, by name."""
        return {
            observable.name: {
                "mean": observable.compute().reshape(-1).tolist(),
                "target": observable.known_target.reshape(-1).tolist(),
                "standard_error": observable.standard_error().reshape(-1).tolist(),
            }
            for observable, enough in self.computable()
            if enough
        }

    def axes(self) -> dict[str, Any]:
        """Return the axes of all observables by name."""
        return {observable.name: observable.axis() for observable, _ in self.computable()}


def summarize(
    trajectories: ReplicaTrajectories,
    horizon_ps: float,
    detector: Detector,
    comparison: ObservableComparison,
    label_errors: Mapping[str, float | None],
    atom_labels: Mapping[int, str],
    descriptions: Mapping[int, str],
    max_failures_per_ns: float = MAX_FAILURES_PER_NS,
) -> dict[str, Any]:
    """Return the numbers of a report for one horizon.

    Args:
        trajectories: Simulated replicas.
        horizon_ps: Time in ps up to which failures are counted.
        detector: Detector that flagged the failures.
        comparison: Observables to compute.
        label_errors: Errors on labeled frames, copied into the summary.
        atom_labels: Offending atoms by replica.
        descriptions: What was wrong, by replica.
        max_failures_per_ns: Failure rate that the potential may have, in 1/ns.

    Returns:
        The numbers by their key in a report.
    """
    failed = (trajectories.failed_ps <= horizon_ps).numpy()
    followed = np.minimum(trajectories.failed_ps.numpy(), horizon_ps)
    comparison.update(trajectories, horizon_ps)
    counts = Counter(label for replica, label in atom_labels.items() if failed[replica])
    verdict = judge(int(failed.sum()), float(followed.sum()), str(detector), max_failures_per_ns)
    return {
        "verdict": verdict.as_dict(),
        "replicas": len(failed),
        "horizon_ps": horizon_ps,
        "threshold": detector.threshold,
        "detector": str(detector),
        "unstable": int(failed.sum()),
        "median_stable_ps": median_stable_ps(kaplan_meier(followed, failed)),
        "offending_atoms": dict(counts.most_common(MAX_ATOM_LABELS)),
        "failures": [
            {
                "replica": replica,
                "time_ps": float(trajectories.failed_ps[replica]),
                "what": descriptions.get(replica, ""),
            }
            for replica in np.flatnonzero(failed).tolist()
        ],
        "failures_per_ns": verdict.failures_per_ns,
        "failures_per_ns_interval": list(verdict.interval),
        **label_errors,
        **comparison.errors(),
    }


def curves(
    trajectories: ReplicaTrajectories, horizons_ps: Sequence[float], comparison: ObservableComparison
) -> dict[str, Any]:
    """Return the survival curve up to the longest horizon, and the observables up to the first one.

    Args:
        trajectories: Simulated replicas.
        horizons_ps: Times in ps up to which failures are counted.
        comparison: Observables to compute.

    Returns:
        ``survival`` (see :meth:`SurvivalCurve.as_dict`) and ``observables`` by name.
    """
    longest = max(horizons_ps)
    times_ps = trajectories.failed_ps.numpy()
    survival = kaplan_meier(np.minimum(times_ps, longest), times_ps <= longest)
    comparison.update(trajectories, horizons_ps[0])
    return {"survival": survival.as_dict(), "observables": comparison.values()}
