"""A progress line for the simulation, beside the trainer's own bar."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm

from stable_plugin.algorithm.records import Progress


class ProgressLine:
    """Shows phase, simulated time, unstable replicas, observable loss and effective sample size of a window.

    Only where something can be rewritten in place: in a terminal or a notebook. In a file the log has one line per window.

    Args:
        window_ps: Length of a window in ps.
        enabled: Whether to show anything.
    """

    def __init__(self, window_ps: float, enabled: bool) -> None:
        self.window_ps = window_ps
        self.enabled = enabled and (sys.stderr.isatty() or "ipykernel" in sys.modules)
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
    if progress.latest is not None:
        parts.append(f"unstable {progress.latest.unstable_fraction:.0%}")
        parts.append(f"loss {progress.latest.observable_loss:.2e}")
        if progress.latest.ess_fraction is not None:
            parts.append(f"ESS {progress.latest.ess_fraction:.2f}")
    return " · ".join(parts)
