"""What is shown on standard error: the package's own messages, without those of the packages that it uses."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from typing import Any

PACKAGE = "stable_plugin"


class _StandardError(logging.StreamHandler[Any]):
    """Writes to the present ``sys.stderr``, which displays and test runners replace."""

    @property
    def stream(self) -> Any:
        return sys.stderr

    @stream.setter
    def stream(self, stream: Any) -> None:
        pass


class _OwnLines(logging.Filter):
    """Filter that passes messages of this package, and errors of others."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.name.partition(".")[0] == PACKAGE or record.levelno >= logging.ERROR


def show_log() -> None:
    """Show the package's log on standard error if the program has configured no logging, as Lightning does with its own."""
    package = logging.getLogger(PACKAGE)
    if not package.hasHandlers():
        package.addHandler(_StandardError())
        package.setLevel(logging.INFO)


def set_up_logging(*, debug: bool = False) -> None:
    """Log the messages of this package to stderr in a plain format, and suppress those of other packages.

    A second call replaces the first. Changes the state of the process, so only a program calls this, before it imports the other packages: Lightning adds a
    handler of its own where it finds none.

    Args:
        debug: Whether to show the messages and warnings of all packages.
    """
    handler = _StandardError()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s" if debug else "%(message)s"))
    root = logging.getLogger()
    for earlier in [each for each in root.handlers if isinstance(each, _StandardError)]:
        root.removeHandler(earlier)
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    if debug:
        return
    handler.addFilter(_OwnLines())
    warnings.simplefilter("ignore")
    # Other packages change the filters when they are imported, but not the function that shows the warnings.
    warnings.showwarning = lambda *_, **__: None


def quiet_stdout(debug: bool = False) -> AbstractContextManager[Any]:
    """Discard what is printed in a block that imports other packages: some print when they are imported.

    Args:
        debug: Whether to print it nevertheless.

    Returns:
        The context manager.
    """
    return nullcontext() if debug else redirect_stdout(io.StringIO())
