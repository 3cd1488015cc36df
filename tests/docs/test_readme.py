"""The Python of README and documentation, as written there, on small settings."""

import inspect
import re
from pathlib import Path

import pytest
import pytorch_lightning

import stable_plugin
from stable_plugin import Schedule, StABlECallback

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/howto/fairchem.md")
SMALL = {
    "n_replicas": 2,
    "window_ps": 0.01,
    "record_every_fs": 5.0,
    "start_epoch": 1,
    "schedule": Schedule(max_failures_per_ns=30_000.0, max_windows=1),
}


def snippets():
    text = "".join((ROOT / page).read_text() for page in PAGES)
    found = re.findall(r"(<!-- no test: [^>]*-->\n)?```python\n(.*?)```", text, flags=re.DOTALL)
    return [code for skipped, code in found if not skipped]


def shrink(monkeypatch, owner, **changes):
    """Let ``owner`` check its arguments, and replace some of them by smaller ones."""
    original = owner.__init__
    signature = inspect.signature(original)

    def init(self, *arguments, **keywords):
        given = signature.bind(self, *arguments, **keywords)
        original(*given.args, **{**given.kwargs, **changes})

    monkeypatch.setattr(owner, "__init__", init)


@pytest.mark.parametrize("code", snippets(), ids=lambda code: code.strip().splitlines()[-1][:30])
def test_snippet_runs_as_written(code, tmp_path, monkeypatch):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    shrink(monkeypatch, StABlECallback, **SMALL)
    shrink(monkeypatch, pytorch_lightning.Trainer, max_epochs=2, enable_progress_bar=False, accelerator="cpu")
    names = {}
    exec(compile(code, "documentation", "exec"), names)
    if "trainer" in names:
        (callback,) = (one for one in names["trainer"].callbacks if isinstance(one, stable_plugin.StABlECallback))
        assert callback.windows


def test_pages_have_snippets():
    assert len(snippets()) >= 2


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "examples/README.md"])
def test_links_of_page_exist(page):
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", (ROOT / page).read_text())
    missing = [target for target in targets if not ((ROOT / page).parent / target).exists()]
    assert missing == []
