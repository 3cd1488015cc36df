"""Other temperatures and timesteps than those of an evaluation, at which a repaired potential must not be worse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import ceil
from typing import Any

import numpy as np
from torch import Tensor

from stable_plugin.detectors import Detector
from stable_plugin.evaluation.simulation import SimulationSettings, simulate_replicas
from stable_plugin.evaluation.verdict import judge
from stable_plugin.models import Potential

TEMPERATURE_FACTORS = (0.7, 1.4)

TIMESTEPS_FS = (0.5, 1.0, 2.0)


def other_conditions(settings: SimulationSettings) -> list[SimulationSettings]:
    """Return the settings at 0.7 and 1.4 times the temperature, and at timesteps of 0.5, 1 and 2 fs, up to the first horizon.

    Args:
        settings: Settings of the evaluation.
    """
    integrator = settings.integrator
    first = replace(settings, horizons_ps=(settings.horizons_ps[0],))
    hotter_and_colder = [
        replace(first, integrator=integrator.changed(temperature_K=round(factor * integrator.temperature_K, 6)))
        for factor in TEMPERATURE_FACTORS
    ]
    timesteps = [each for each in TIMESTEPS_FS if each != integrator.timestep_fs]
    return [*hotter_and_colder, *(_with_timestep(first, each) for each in timesteps)]


def failures_under(
    conditions: list[SimulationSettings],
    potential: Potential,
    starts: Tensor,
    cell: Tensor | None,
    detector_at: Callable[[float], Detector],
) -> list[dict[str, Any]]:
    """Return temperature, timestep and verdict under each condition.

    Args:
        conditions: See :func:`other_conditions`.
        potential: Potential to simulate with.
        starts: Start frames, (n_starts, n_atoms, 3) in Å.
        cell: Cells of these frames, (n_starts, 3, 3) in Å; that of the system if None.
        detector_at: Returns the bound detector for a temperature in K.
    """
    found = []
    for settings in conditions:
        integrator = settings.integrator
        detector = detector_at(integrator.temperature_K)
        replicas = simulate_replicas(potential, detector, starts, settings, cell)
        horizon = settings.horizons_ps[0]
        failed = replicas.failed_ps.numpy() <= horizon
        followed = float(np.minimum(replicas.failed_ps.numpy(), horizon).sum())
        # Replicas that fail in their start frames are followed for no time.
        verdict = judge(
            int(failed.sum()),
            max(followed, integrator.timestep_fs / 1000.0),
            str(detector),
            settings.max_failures_per_ns,
        )
        found.append(
            {
                "temperature_K": integrator.temperature_K,
                "timestep_fs": integrator.timestep_fs,
                "horizon_ps": horizon,
                "replicas": settings.n_replicas,
                "unstable": verdict.failures,
                "verdict": verdict.as_dict(),
            }
        )
    return found


def _with_timestep(settings: SimulationSettings, timestep_fs: float) -> SimulationSettings:
    """Return the settings with another timestep, and times that are multiples of it."""

    def multiple(time: float, of: float = timestep_fs) -> float:
        return ceil(time / of - 1e-9) * of

    check_every_fs = multiple(settings.check_every_fs)
    return replace(
        settings,
        integrator=settings.integrator.changed(timestep_fs=timestep_fs),
        check_every_fs=check_every_fs,
        record_every_fs=multiple(settings.record_every_fs, check_every_fs),
        horizons_ps=(multiple(1000.0 * settings.horizons_ps[0]) / 1000.0,),
    )
