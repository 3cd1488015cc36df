"""What is shown on standard error."""

import io
import logging
import subprocess
import sys
import warnings

import pytest

from stable_plugin.runtime.console import set_up_logging

SHOW_LOG = """
import logging, sys
if len(sys.argv) > 1:
    logging.basicConfig(level=logging.WARNING, format="root: %(message)s")
from stable_plugin.runtime.console import show_log
log = logging.getLogger("stable_plugin.some")
show_log()
show_log()
log.info("window 1")
log.warning("careful")
"""


@pytest.mark.parametrize(("arguments", "expected"), [([], ["window 1", "careful"]), (["own"], ["root: careful"])])
def test_show_log_only_without_logging_configuration(arguments, expected):
    command = [sys.executable, "-W", "ignore", "-c", SHOW_LOG, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr.splitlines() == expected


@pytest.mark.parametrize("debug", [False, True])
def test_set_up_logging_shows_own_lines(capsys, monkeypatch, debug):
    logging.getLogger().handlers.clear()
    # Another test may have imported Lightning first, which then logs by itself.
    lightning = logging.getLogger("pytorch_lightning")
    monkeypatch.setattr(lightning, "propagate", True)
    monkeypatch.setattr(lightning, "level", logging.NOTSET)
    lightning.manager._clear_cache()
    set_up_logging(debug=debug)
    logging.getLogger("stable_plugin.some").info("window 1")
    logging.getLogger("pytorch_lightning").info("a tip")
    logging.getLogger("foreign").error("a failure")
    warnings.warn("deprecated", stacklevel=1)
    shown = capsys.readouterr().err
    assert "window 1" in shown and "a failure" in shown
    assert ("a tip" in shown) == debug
    if not debug:
        assert shown == "window 1\na failure\n"


def test_set_up_logging_writes_once_and_to_the_present_stderr(monkeypatch):
    closed = io.StringIO()
    monkeypatch.setattr(sys, "stderr", closed)
    set_up_logging()
    closed.close()
    present = io.StringIO()
    monkeypatch.setattr(sys, "stderr", present)
    logging.getLogger("stable_plugin.some").warning("after the first call")
    set_up_logging()
    logging.getLogger("stable_plugin.some").warning("after the second call")
    assert present.getvalue() == "after the first call\nafter the second call\n"
