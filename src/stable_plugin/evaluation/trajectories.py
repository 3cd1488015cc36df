"""Trajectories of evaluated replicas as extxyz files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ase.io
from torch import Tensor

from stable_plugin.detectors import Detector
from stable_plugin.evaluation.simulation import ReplicaTrajectories
from stable_plugin.md.cells import optional
from stable_plugin.md.system import System

MAX_ALIKE = 3
"""Most failures of the same atoms whose frames are written for labeling."""


def offending_atom_labels(trajectories: ReplicaTrajectories, detector: Detector, system: System) -> dict[int, str]:
    """Return which atoms made each failed replica unstable.

    Args:
        trajectories: Simulated replicas.
        detector: Detector that flagged them.
        system: Simulated system.

    Returns:
        Labels such as ``C1-H14`` by replica; replicas whose failure is not due to particular atoms are left out.
    """
    offending_atoms = detector.offending_atoms(*_last(trajectories, system))
    return {
        replica: system.label(atoms)
        for replica, atoms in enumerate(offending_atoms)
        if atoms and trajectories.failed_ps[replica].isfinite()
    }


def failure_descriptions(trajectories: ReplicaTrajectories, detector: Detector, system: System) -> dict[int, str]:
    """Return what was wrong with each failed replica: the atoms, the value, and the limit.

    Args:
        trajectories: Simulated replicas.
        detector: Detector that flagged them.
        system: Simulated system.
    """
    texts = detector.describe(*_last(trajectories, system))
    return {replica: text for replica, text in enumerate(texts) if trajectories.failed_ps[replica].isfinite()}


def write_trajectories(
    trajectories: ReplicaTrajectories, system: System, labels: dict[int, str], folder: Path, n_trajectories: int
) -> None:
    """Write the replicas that failed first, each up to its failure, and the first stable ones.

    Args:
        trajectories: Simulated replicas.
        system: Simulated system.
        labels: Offending atoms by replica, written as ``offending_atoms`` into the last frame of a failed replica.
        folder: Folder for the files ``failed_replicaNN.extxyz`` and ``stable_replicaNN.extxyz``.
        n_trajectories: Maximum number of failed and of stable replicas.
    """
    folder.mkdir(parents=True, exist_ok=True)
    order = trajectories.failed_ps.argsort(stable=True).tolist()
    failed = [replica for replica in order if trajectories.failed_ps[replica].isfinite()][:n_trajectories]
    stable = [replica for replica in order if trajectories.failed_ps[replica].isinf()][:n_trajectories]
    for replica in failed:
        frames = _recorded_frames(trajectories, system, replica)
        failed_ps = trajectories.failed_ps[replica].item()
        last = _frame(system, trajectories.last_positions[replica], failed_ps, trajectories.last_cell_of(replica))
        last.info["offending_atoms"] = labels.get(replica, "")
        ase.io.write(folder / f"failed_replica{replica:02d}.extxyz", [*frames, last])
    for replica in stable:
        frames = _recorded_frames(trajectories, system, replica)
        ase.io.write(folder / f"stable_replica{replica:02d}.extxyz", frames)


def write_to_label(
    trajectories: ReplicaTrajectories,
    system: System,
    labels: Mapping[int, str],
    descriptions: Mapping[int, str],
    path: Path,
) -> None:
    """Write the last frame before each failure and the first one after, to be labeled by a reference method.

    Failures of the same atoms are alike, so only the first :data:`MAX_ALIKE` of them are written. Nothing is written if no
    replica failed.

    Args:
        trajectories: Simulated replicas.
        system: Simulated system.
        labels: Offending atoms by replica.
        descriptions: What was wrong, by replica.
        path: File to write.
    """
    frames: list[Any] = []
    written: Counter[str] = Counter()
    for replica in trajectories.failed_ps.argsort(stable=True).tolist():
        atoms = labels.get(replica, "")
        if trajectories.failed_ps[replica].isinf() or written[atoms] == MAX_ALIKE:
            continue
        written[atoms] += 1
        time_ps = trajectories.failed_ps[replica].item()
        bad = _frame(system, trajectories.last_positions[replica], time_ps, trajectories.last_cell_of(replica))
        good = _recorded_frames(trajectories, system, replica)[-1:]
        for frame in [*good, bad]:
            stage = "first_bad" if frame is bad else "last_good"
            about = {"replica": replica, "offending_atoms": atoms, "failure": descriptions.get(replica, "")}
            frame.info |= {"stage": stage, **about}
        frames += [*good, bad]
    if frames:
        path.parent.mkdir(parents=True, exist_ok=True)
        ase.io.write(path, frames)


def _last(trajectories: ReplicaTrajectories, system: System) -> tuple[Tensor, ...]:
    """Return the last positions and velocities of the replicas, and their cells if these differ."""
    positions, velocities = (
        each.to(system.masses) for each in (trajectories.last_positions, trajectories.last_velocities)
    )
    cell = trajectories.last_cell
    return (positions, velocities, *optional(None if cell is None else cell.to(positions)))


def _recorded_frames(trajectories: ReplicaTrajectories, system: System, replica: int) -> list[Any]:
    return [
        _frame(
            system,
            trajectories.positions[index, replica],
            trajectories.times_ps[index].item(),
            None if trajectories.cell is None else trajectories.cell[index, replica],
        )
        for index in trajectories.valid[:, replica].nonzero()[:, 0].tolist()
    ]


def _frame(system: System, positions: Tensor, time_ps: float, cell: Tensor | None) -> Any:
    frame = system.atoms(positions, cell=cell)
    frame.info["time_ps"] = round(time_ps, 6)
    return frame
