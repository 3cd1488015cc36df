"""Settings of the C library's memory allocator."""

from __future__ import annotations

import ctypes
import sys

# Of glibc's malloc.h.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3

MAX_MMAP_THRESHOLD_BYTES = 32 * 1024 * 1024
"""Largest threshold that glibc accepts."""

MAX_KEPT_BYTES = 1024 * 1024 * 1024


def keep_freed_memory() -> None:
    """Let this process keep up to a gigabyte of freed memory instead of returning it to the system.

    A model call on the CPU allocates and frees the same tens of megabytes each time. By default glibc returns such
    blocks at once, and the system clears them page by page at the next allocation, which takes a fifth of a step. Does
    nothing with other C libraries.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, MAX_MMAP_THRESHOLD_BYTES)
        mallopt(TRIM_THRESHOLD, MAX_KEPT_BYTES)
