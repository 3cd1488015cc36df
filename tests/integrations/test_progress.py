"""The progress bar of a window."""

from types import SimpleNamespace

from stable_plugin.algorithm.training_loop import Progress
from stable_plugin.integrations import progress as progress_line


class Bar:
    """Record what tqdm would show."""

    shown, made = [], []

    def __init__(self, **settings):
        self.n, self.closed, self.text = 0.0, False, ""
        Bar.made.append(self)
        self.settings = settings

    def set_description_str(self, text, refresh):
        self.text = text

    def refresh(self):
        Bar.shown.append((self.text, self.n))

    def close(self):
        self.closed = True


def test_progress_line_restarts_with_each_phase(monkeypatch):
    monkeypatch.setattr(progress_line, "tqdm", Bar)
    monkeypatch.setattr(Bar, "shown", [])
    monkeypatch.setattr(Bar, "made", [])
    loop = SimpleNamespace(n_steps=800, simulator=SimpleNamespace(integrator=SimpleNamespace(timestep_fs=0.5)))
    steps = [
        Progress("simulate", 0.1, 1.1, None, None, None),
        Progress("simulate", 0.2, 1.2, 0.25, None, None),
        Progress("learn", 0.05, 1.25, 0.5, 0.00123, 0.875),
    ]
    silent, line = (progress_line.ProgressLine(loop, enabled) for enabled in (False, True))
    for step in steps:
        silent.show(step)
    silent.close()
    assert Bar.made == []
    for step in steps:
        line.show(step)
    assert Bar.shown == [
        ("StABlE simulate · 1.10 ps", 0.1),
        ("StABlE simulate · 1.20 ps · unstable 25%", 0.2),
        ("StABlE learn · 1.25 ps · unstable 50% · loss 1.23e-03 · ESS 0.88", 0.05),
    ]
    assert [bar.settings["total"] for bar in Bar.made] == [0.4, 0.4]
    assert [bar.closed for bar in Bar.made] == [True, False]
    line.close()
    assert Bar.made[-1].closed
