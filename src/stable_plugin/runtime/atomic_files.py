"""Files and folders that are there whole or not at all, and errors that say what to do where they cannot be written."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TORCH_WRITER = ("inline_container", "PytorchStreamWriter", "Parent directory")
"""What torch's own writer says: it raises RuntimeError, whatever it was that the system refused."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

REFUSED = (*FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.EIO)
"""What the system says to somebody who cannot write."""

PROBE_BYTES = 4096


@contextmanager
def atomic_write(path: str | Path, kind: str = "file") -> Iterator[Path]:
    """Where to write a file, which is renamed into place once it is written.

    A process that is killed meanwhile, and a disk that is full, leave what was there before.

    Args:
        path: Where the file will be.
        kind: What it is, for errors.

    Raises:
        OSError: If it cannot be written; names the path and the way out.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    with explain_write_errors(path, kind):
        try:
            yield partial
            os.replace(partial, path)
        finally:
            # Not is_file(): what cannot be looked at is not there to be removed.
            if os.path.isfile(partial):
                partial.unlink()


@contextmanager
def atomic_folder(path: str | Path, kind: str = "folder") -> Iterator[Path]:
    """Where to write a folder, which is renamed into place once everything is in it; as :func:`atomic_write`.

    Half of it lies one level deeper than the whole, where nobody who looks through the folders at ``path`` takes it for
    one of them. A folder that is replaced stays under the name ``<path>.old`` until the new one is in its place, so that
    one of the two is whole at any moment.
    """
    path, partial = Path(path), partial_folder(path)
    workshop, old = partial.parent, path.with_name(path.name + ".old")
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
            shutil.rmtree(workshop, ignore_errors=True)


def partial_folder(path: str | Path) -> Path:
    """Where :func:`atomic_folder` writes a folder before it is whole."""
    path = Path(path)
    return path.parent / ".partial" / path.name


@contextmanager
def explain_write_errors(path: str | Path, kind: str) -> Iterator[None]:
    """Errors of writing to a path, with the path and the way out in their message.

    Raises:
        OSError: Instead of what the system or torch's writers raised.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not is_write_error(error) or is_explained(error):
            raise
        untouched = " What was there before is untouched." if os.path.exists(path) else ""
        explanation = OSError(
            f"{kind} {str(path)!r} cannot be written ({_reason(error)}): {way_out(path, error)}{untouched}"
        )
        explanation.errno = _number(error)
        explanation.explained = True  # type: ignore[attr-defined]
        raise explanation from error


def is_write_error(error: BaseException) -> bool:
    """Whether it is the system that refused to write, or torch that says so in its own words."""
    if isinstance(error, RuntimeError):
        return any(words in str(error) for words in TORCH_WRITER)
    return isinstance(error, OSError) and error.errno in REFUSED


def is_explained(error: BaseException) -> bool:
    """Whether an error says already which path cannot be written, and what to do."""
    return getattr(error, "explained", False)


def write_obstacle(folder: str | Path) -> str | None:
    """Try whether a folder can be written to: what is in the way, and the way out; None if nothing is."""
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


def way_out(path: str | Path, error: BaseException) -> str:
    """What to do about a path that cannot be written."""
    # A folder that cannot be made is itself the file that is in the way.
    itself = os.path.isdir(path) or _number(error) in (errno.EEXIST, errno.ENOTDIR)
    folder = Path(path) if itself else Path(path).parent
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        return f"{str(folder)!r} is a file where a folder is needed. Move it away, or choose another folder."
    number = _number(error)
    if number == errno.ENOENT:
        return f"{str(Path(path).parent)!r} does not exist. Make it, or choose another folder."
    if number is None or number in FULL:
        return f"{_free(folder)}. Make room, or choose a folder on another disk."
    if number == errno.EROFS:
        return f"{str(folder)!r} is mounted read-only. Choose another folder."
    if number in (errno.EACCES, errno.EPERM):
        return f"{str(folder)!r} may not be written to by this user. Change its permissions, or choose another folder."
    return "Choose another folder."


def _free(folder: Path) -> str:
    room = f"{shutil.disk_usage(folder).free / 1e6:.0f} MB are free in {str(folder)!r}"
    elsewhere = tempfile.gettempdir()
    if os.stat(elsewhere).st_dev == os.stat(folder).st_dev:
        return room
    # Lightning writes there first, and moves.
    return f"{room}, and {shutil.disk_usage(elsewhere).free / 1e6:.0f} MB in {elsewhere!r}, which TMPDIR sets"


def _reason(error: BaseException) -> str:
    number = _number(error)
    # Torch's writer names positions in the file where the system's error was lost.
    return "the disk is full, or a file may not get this large" if number is None else os.strerror(number)


def _number(error: BaseException) -> int | None:
    number = getattr(error, "errno", None)
    if number is not None:
        return int(number)
    if "does not exist" in str(error):
        return errno.ENOENT
    return next((each for each in (errno.EROFS, errno.EACCES, errno.ENOENT) if os.strerror(each) in str(error)), None)
