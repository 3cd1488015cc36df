"""A progress line for the simulation, beside the Trainer's own bar."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm

from stable_plugin.algorithm.training_loop import Progress, TrainingLoop


class ProgressLine:
    """Shows phase, simulated time, unstable replicas, observable loss and effective sample size of a window.

    Args:
        loop: What simulates.
        enabled: Whether to show anything.
    """

    def __init__(self, loop: TrainingLoop, enabled: bool) -> None:
        self.window_ps = loop.n_steps * loop.simulator.integrator.timestep_fs / 1000.0
        self.enabled = enabled
        self._bar: Any = None

    def show(self, progress: Progress) -> None:
        """Update the line."""
        if not self.enabled:
            return
        if self._bar is None or progress.window_ps < self._bar.n:
            self.close()
            self._bar = tqdm(
                total=self.window_ps, leave=False, bar_format="{desc} |{bar}| {n:.2f}/{total:.2f} ps {elapsed}"
            )
        self._bar.set_description_str(_describe(progress), refresh=False)
        self._bar.n = progress.window_ps
        self._bar.refresh()

    def close(self) -> None:
        """Remove the line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _describe(progress: Progress) -> str:
    parts = [f"StABlE {progress.phase}", f"{progress.simulated_ps:.2f} ps"]
    if progress.unstable_fraction is not None:
        parts.append(f"unstable {progress.unstable_fraction:.0%}")
    if progress.observable_loss is not None:
        parts.append(f"loss {progress.observable_loss:.2e}")
    if progress.ess_fraction is not None:
        parts.append(f"ESS {progress.ess_fraction:.2f}")
    return " · ".join(parts)
