"""Files and folders that are complete or absent, and write errors that name the path and the remedy."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TORCH_WRITER = ("inline_container", "PytorchStreamWriter", "Parent directory")
"""Parts of the messages of torch's own writer, which raises RuntimeError for any error of the system."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

REFUSED = (*FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.EIO)
"""Error numbers of the system that a failed write can raise."""

PROBE_BYTES = 4096


@contextmanager
def atomic_write(path: str | Path, kind: str = "file") -> Iterator[Path]:
    """Yield a path to write a file to, and rename the file to its final path when it is complete.

    If the process is killed or the disk is full, the previous file stays in place.

    Args:
        path: Final path of the file.
        kind: Kind of file, for errors.

    Raises:
        OSError: If it cannot be written; names the path and the remedy.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    with explain_write_errors(path, kind):
        try:
            yield partial
            os.replace(partial, path)
        finally:
            # os.path.isfile() is false where Path.is_file() raises PermissionError.
            if os.path.isfile(partial):
                partial.unlink()


@contextmanager
def atomic_folder(path: str | Path, kind: str = "folder") -> Iterator[Path]:
    """Yield a folder to write to, and rename it to its final path when it is complete; see :func:`atomic_write`.

    The incomplete folder is one level deeper, where a search through the folders next to ``path`` does not find it. A
    folder that is replaced stays under the name ``<path>.old`` until the new one is in place, so that one of the two is
    complete at any moment.

    Args:
        path: Final path of the folder.
        kind: Kind of folder, for errors.

    Raises:
        OSError: If it cannot be written; names the path and the remedy.
    """
    path, partial = Path(path), partial_folder(path)
    parent, old = partial.parent, path.with_name(path.name + ".old")
    with explain_write_errors(path, kind):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)
                os.replace(path, old)
            os.replace(partial, path)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(parent, ignore_errors=True)


def partial_folder(path: str | Path) -> Path:
    """Return the path at which :func:`atomic_folder` writes a folder before it is complete."""
    path = Path(path)
    return path.parent / ".partial" / path.name


@contextmanager
def explain_write_errors(path: str | Path, kind: str) -> Iterator[None]:
    """Replace write errors by errors that name the path and the remedy.

    Args:
        path: Path that is written.
        kind: Kind of file or folder, for errors.

    Raises:
        OSError: In place of the error of the system or of torch's writer.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not is_write_error(error) or is_explained(error):
            raise
        untouched = " The previous version is untouched." if os.path.exists(path) else ""
        explanation = OSError(
            f"{kind} {str(path)!r} cannot be written ({_reason(error)}): {remedy(path, error)}{untouched}"
        )
        explanation.errno = _number(error)
        explanation.explained = True  # type: ignore[attr-defined]
        raise explanation from error


def is_write_error(error: BaseException) -> bool:
    """Return whether an error is a write error of the system or of torch's writer."""
    if isinstance(error, RuntimeError):
        return any(words in str(error) for words in TORCH_WRITER)
    return isinstance(error, OSError) and error.errno in REFUSED


def is_explained(error: BaseException) -> bool:
    """Return whether the message of an error already names the path and the remedy."""
    return getattr(error, "explained", False)


def write_obstacle(folder: str | Path) -> str | None:
    """Try to write to a folder, and return the message of the error; None if there is none."""
    probe = Path(folder) / f".probe-{os.getpid()}"
    try:
        with explain_write_errors(folder, "folder"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            try:
                probe.write_bytes(bytes(PROBE_BYTES))
            finally:
                if os.path.isfile(probe):
                    probe.unlink()
    except OSError as error:
        return str(error)
    return None


def remedy(path: str | Path, error: BaseException) -> str:
    """Return what to do about a path that cannot be written."""
    # If a folder cannot be created, its own path is the file that blocks it.
    itself = os.path.isdir(path) or _number(error) in (errno.EEXIST, errno.ENOTDIR)
    folder = Path(path) if itself else Path(path).parent
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        return f"{str(folder)!r} is a file where a folder is needed: move the file, or choose another folder."
    number = _number(error)
    if number == errno.ENOENT:
        return f"{str(Path(path).parent)!r} does not exist: create it, or choose another folder."
    if number is None or number in FULL:
        return f"{_free(folder)}: free some space, or choose a folder on another disk."
    if number == errno.EROFS:
        return f"{str(folder)!r} is mounted read-only: choose another folder."
    if number in (errno.EACCES, errno.EPERM):
        return f"{str(folder)!r} is not writable by this user: change its permissions, or choose another folder."
    return "choose another folder."


def _free(folder: Path) -> str:
    space = f"{shutil.disk_usage(folder).free / 1e6:.0f} MB are free in {str(folder)!r}"
    temporary = tempfile.gettempdir()
    if os.stat(temporary).st_dev == os.stat(folder).st_dev:
        return space
    # Lightning writes there first, and moves the file.
    return f"{space}, and {shutil.disk_usage(temporary).free / 1e6:.0f} MB in {temporary!r}, which TMPDIR sets"


def _reason(error: BaseException) -> str:
    number = _number(error)
    # Torch's writer reports positions in the file instead of the system's error.
    return "the disk is full, or the file exceeds the size limit" if number is None else os.strerror(number)


def _number(error: BaseException) -> int | None:
    number = getattr(error, "errno", None)
    if number is not None:
        return int(number)
    if "does not exist" in str(error):
        return errno.ENOENT
    return next((each for each in (errno.EROFS, errno.EACCES, errno.ENOENT) if os.strerror(each) in str(error)), None)
