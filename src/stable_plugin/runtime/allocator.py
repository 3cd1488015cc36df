"""Memory that every step of a simulation frees and asks for again."""

from __future__ import annotations

import ctypes
import sys

# Of glibc's malloc.h.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3

LARGEST_REUSED_BYTES = 32 * 1024 * 1024
"""The most that glibc takes for its threshold."""

KEPT_BYTES = 1024 * 1024 * 1024


def keep_freed_memory() -> None:
    """Let this process keep the memory it frees, up to a gigabyte, instead of handing it back to the system.

    A model call on the CPU allocates and frees the same tens of megabytes each time. By default glibc returns such
    blocks at once, and the system clears them page by page when they are asked for again: a fifth of a step. Does
    nothing where the C library is another one.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, LARGEST_REUSED_BYTES)
        mallopt(TRIM_THRESHOLD, KEPT_BYTES)
