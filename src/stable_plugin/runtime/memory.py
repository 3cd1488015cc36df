"""Detection of errors that mean out of memory."""

from __future__ import annotations

import torch

OUT_OF_MEMORY = (MemoryError, RuntimeError)
"""Errors of a failed allocation in Python, NumPy and torch; torch raises RuntimeError for other reasons too."""

CPU_ALLOCATOR = "DefaultCPUAllocator"
"""Name in the message of an allocation that failed on the CPU, for which torch has no error type."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that an allocation failed, on a device or on the host."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and CPU_ALLOCATOR in str(error)
    )
