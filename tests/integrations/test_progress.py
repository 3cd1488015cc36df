"""The progress line of a simulation: in terminals only, drawn by tqdm or as a task of rich's display."""

import io

import pytest

from stable_plugin.algorithm.records import Progress, WindowRecord
from stable_plugin.integrations import progress as progress_module
from stable_plugin.integrations.progress import ProgressLine


class RecordingBar:
    """Records what is drawn."""

    def __init__(self, shown, **settings):
        self.shown, self.settings, self.closed = shown, settings, False
        self.n, self.words = 0.0, ""

    def set_description_str(self, words, refresh):
        self.words = words

    def refresh(self):
        self.shown.append((self.words, self.n))

    def close(self):
        self.closed = True


def window(unstable, loss, ess):
    return WindowRecord(1, "learn", 1.0, unstable, 0.0, 1.0, 1, 1.0, loss, 300.0, ess_fraction=ess)


STEPS = [
    Progress("probe", 0.1, 1.1, None),
    Progress("verify", 0.2, 1.2, window(0.9, 0.5, None), 0.25),
    Progress("learn", 0.05, 1.25, window(0.9, 0.00123, 0.875), 0.5),
    Progress("learn", 0.05, 1.65, window(0.9, None, None), 0.5),  # hotter than the targets
]


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)


def test_progress_line_starts_again_with_each_window(monkeypatch, terminal):
    shown, made = [], []

    def make(**settings):
        made.append(RecordingBar(shown, **settings))
        return made[-1]

    monkeypatch.setattr(progress_module, "tqdm", make)
    line = ProgressLine(0.4)
    for step in STEPS:
        line.show(step)
    assert shown == [
        ("StABlE probe · 1.10 ps", 0.1),
        ("StABlE verify · 1.20 ps · unstable 25% · loss 5.00e-01", 0.2),
        ("StABlE learn · 1.25 ps · unstable 50% · loss 1.23e-03 · ESS 0.88", 0.05),
        ("StABlE learn · 1.65 ps · unstable 50%", 0.05),
    ]
    assert [bar.settings["total"] for bar in made] == [0.4, 0.4]
    assert [bar.closed for bar in made] == [True, False]
    line.close()
    assert made[-1].closed


@pytest.mark.parametrize("enabled", [True, False])
def test_progress_line_is_silent_in_files(capsys, enabled):
    line = ProgressLine(0.4, enabled)
    for step in STEPS:
        line.show(step)
    line.close()
    assert capsys.readouterr().err == ""


def test_progress_line_can_be_disabled(capsys, terminal):
    ProgressLine(0.4, enabled=False).show(STEPS[0])
    assert capsys.readouterr().err == ""


def rich_progress(**console):
    rich_console = pytest.importorskip("rich.console")
    from rich.progress import Progress as RichProgress

    return RichProgress(console=rich_console.Console(file=io.StringIO(), width=120, **console))


def test_progress_line_is_a_task_of_rich():
    with rich_progress(force_terminal=True) as display:
        line = ProgressLine(0.4, rich_progress=lambda: display)
        line.show(STEPS[1])
        (task,) = display.tasks
        assert (task.completed, task.total) == (200, 400)
        assert task.description == "StABlE verify · 1.20 ps · unstable 25% · loss 5.00e-01 (fs)"
        line.show(STEPS[2])
        assert [task.completed for task in display.tasks] == [50]
        line.close()
        assert not display.tasks


@pytest.mark.parametrize("console", [{"force_terminal": False}, {"force_terminal": True, "force_jupyter": True}])
def test_progress_line_leaves_other_displays_of_rich(console, terminal):
    display = rich_progress(**console)
    ProgressLine(0.4, rich_progress=lambda: display).show(STEPS[0])
    assert not display.tasks
