"""A progress line for the simulation, beside the trainer's own bar."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Protocol

from tqdm import tqdm

from stable_plugin.algorithm.records import Progress


class Bar(Protocol):
    """What a progress line is drawn with."""

    def update(self, done_ps: float, description: str) -> None:
        """Redraw the line."""

    def close(self) -> None:
        """Remove the line."""


class ProgressLine:
    """Shows phase, simulated time, unstable fraction, observable loss and effective sample size of the present window.

    Draws only in a terminal, where a line can be rewritten in place. In a file or a notebook, where each refresh would be
    a new line, the log has one line per window instead. A partial line that is flushed in a notebook while rich shows
    a display without ipywidgets makes rich and ipykernel flush each other without end.

    Args:
        window_ps: Length of a window in ps.
        enabled: Whether to show anything.
        rich_progress: Returns the ``rich.progress.Progress`` that owns the terminal, or None if there is none; the line is
            then drawn with tqdm.
    """

    def __init__(self, window_ps: float, enabled: bool = True, rich_progress: Callable[[], Any] = lambda: None) -> None:
        self.window_ps = window_ps
        self.enabled = enabled
        self._rich_progress = rich_progress
        self._bar: Bar | None = None
        self._done_ps = 0.0

    def __repr__(self) -> str:
        return f"{type(self).__name__}(window_ps={self.window_ps:g}, enabled={self.enabled})"

    def show(self, progress: Progress) -> None:
        """Update the line; start a new one when a window starts."""
        if not self.enabled:
            return
        if progress.window_ps < self._done_ps:
            self.close()
        if self._bar is None:
            self._bar = self._make_bar()
        if self._bar is not None:
            self._done_ps = progress.window_ps
            self._bar.update(progress.window_ps, _describe(progress))

    def close(self) -> None:
        """Remove the line."""
        if self._bar is not None:
            self._bar.close()
            self._bar, self._done_ps = None, 0.0

    def _make_bar(self) -> Bar | None:
        rich = self._rich_progress()
        if rich is not None:
            # A console in a notebook says that it is a terminal, too.
            in_terminal = rich.console.is_terminal and not rich.console.is_jupyter
            return _RichBar(rich, self.window_ps) if in_terminal else None
        return _TqdmBar(self.window_ps) if sys.stderr.isatty() else None


class _TqdmBar:
    def __init__(self, window_ps: float) -> None:
        shape = "{desc} |{bar}| {n:.2f}/{total:.2f} ps {elapsed}"
        self._tqdm: Any = tqdm(total=window_ps, leave=False, bar_format=shape)

    def update(self, done_ps: float, description: str) -> None:
        self._tqdm.set_description_str(description, refresh=False)
        self._tqdm.n = done_ps
        self._tqdm.refresh()

    def close(self) -> None:
        self._tqdm.close()


class _RichBar:
    """A task of the display that another bar already shows; two displays cannot share a terminal."""

    def __init__(self, rich: Any, window_ps: float) -> None:
        self._rich = rich
        # Lightning's columns show whole numbers: femtoseconds.
        self._task = rich.add_task("", total=round(1000.0 * window_ps))

    def update(self, done_ps: float, description: str) -> None:
        self._rich.update(self._task, completed=round(1000.0 * done_ps), description=f"{description} (fs)")
        self._rich.refresh()

    def close(self) -> None:
        self._rich.remove_task(self._task)


def _describe(progress: Progress) -> str:
    parts = [
        f"StABlE {progress.system} {progress.phase}" if progress.system else f"StABlE {progress.phase}",
        f"{progress.simulated_ps:.2f} ps",
    ]
    if progress.unstable_fraction is not None:
        parts.append(f"unstable {progress.unstable_fraction:.0%}")
    if progress.latest is not None:
        if progress.latest.observable_loss is not None:
            parts.append(f"loss {progress.latest.observable_loss:.2e}")
        if progress.latest.ess_fraction is not None:
            parts.append(f"ESS {progress.latest.ess_fraction:.2f}")
    return " · ".join(parts)
