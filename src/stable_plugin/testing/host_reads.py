"""Operations that keep a computation from being captured as a CUDA graph."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class HostReads(TorchDispatchMode):
    """Counter of the operations for which host and device wait for each other on a GPU.

    These read a value on the host, return shapes that depend on values, or create tensors of Python numbers. None of them
    can be part of a CUDA graph.

    Attributes:
        count: Number of such operations so far.
        names: Their names, in order.
    """

    NAMES = frozenset(
        {
            "_local_scalar_dense",
            "nonzero",
            "masked_select",
            "_unique2",
            "unique_dim",
            "equal",
            "lift_fresh",
            "linalg_inv_ex",
        }
    )

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    @property
    def count(self) -> int:
        return len(self.names)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in {"index", "index_put"} and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if by_mask or name in self.NAMES:
            self.names.append(name)
        return func(*args, **(kwargs or {}))
