"""Reading what was saved before: as data, which runs nothing."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def load_tensors(path: str | Path, kind: str = "checkpoint") -> Any:
    """What ``torch.save`` wrote, if it is made of tensors and plain values.

    Args:
        path: The file.
        kind: What it is, for errors.

    Raises:
        ValueError: If it is cut off, damaged, or holds anything that loading would have to run.
    """
    with read_as_data(path, kind):
        return torch.load(path, map_location="cpu", weights_only=True)


@contextmanager
def read_as_data(path: str | Path, kind: str = "checkpoint") -> Iterator[None]:
    """Have errors of reading a file say which one, what is wrong with it, and what to do.

    Raises:
        ValueError: In place of whatever the reading raises.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{kind} {str(path)!r} is not made of tensors and plain values alone, and what else it holds could run code: it "
            "is not loaded, and nothing was changed. Remove it, or put back the one that was written here."
        ) from error
    except Exception as error:  # a file can be damaged in many ways
        raise ValueError(_damaged(path, kind, error)) from error


def _damaged(path: str | Path, kind: str, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [""])[0]
    return (
        f"{kind} {str(path)!r} is cut off or damaged ({type(error).__name__}: {reason}): nothing was changed. Move it away "
        "to begin again from what is there besides, or put back a whole copy."
    )
