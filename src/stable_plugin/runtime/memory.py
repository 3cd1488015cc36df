"""Telling that memory did not suffice from other errors."""

from __future__ import annotations

import torch

OUT_OF_MEMORY = (MemoryError, RuntimeError)
"""What is raised where memory does not suffice: by NumPy and Python, and by torch, which raises others too."""

CPU_ALLOCATOR = "DefaultCPUAllocator"
"""Names itself in the error when it gets no memory; torch has no class for that."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice, on a device or on the host."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and CPU_ALLOCATOR in str(error)
    )
