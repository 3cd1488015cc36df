"""Reading saved files as data, without running code from them."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

WRITTEN_HERE = "Use a file that was written by this package."


def load_tensors(path: str | Path, kind: str = "checkpoint") -> Any:
    """Return what ``torch.save`` wrote, if it consists of tensors and plain values.

    Args:
        path: The file.
        kind: Kind of file, for errors.

    Raises:
        ValueError: If it is truncated or damaged, or contains objects that run code when they are loaded.
    """
    with read_as_data(path, kind):
        return torch.load(path, map_location="cpu", weights_only=True)


@contextmanager
def read_as_data(path: str | Path, kind: str = "checkpoint", remedy: str = WRITTEN_HERE) -> Iterator[None]:
    """Replace errors of reading a damaged or untrusted file by errors that name the file and the remedy.

    Errors of reading an intact file are not replaced: the reader's own message describes them better.

    Args:
        path: The file.
        kind: Kind of file, for errors.
        remedy: What to do about a file that runs code when it is loaded.

    Raises:
        ValueError: If the file is damaged, or contains objects that run code when they are loaded.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(_untrusted(path, kind, error, remedy)) from error
    except Exception as error:  # a file can be damaged in many ways
        if _is_intact(path):
            raise
        raise ValueError(_damaged(path, kind, error)) from error


def _untrusted(path: str | Path, kind: str, error: Exception, remedy: str) -> str:
    # torch names the class that it refuses.
    refused = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line), "")
    return (
        f"{kind} {str(path)!r} contains more than tensors and plain values, and loading the rest could run code: it is not "
        f"loaded, and nothing was changed. {refused}{' ' if refused else ''}{remedy}"
    )


def _damaged(path: str | Path, kind: str, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [""])[0]
    return (
        f"{kind} {str(path)!r} is truncated or damaged ({type(error).__name__}: {reason}): nothing was changed. Restore a "
        "complete copy, or move the file to start again without it."
    )


def _is_intact(path: str | Path) -> bool:
    """Return whether a file is a complete archive as torch.save writes it, with valid checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # any error means that it is not intact
        return False
