"""Measured curves from text files, as targets of observables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class MeasuredCurve:
    """A radial distribution function as it was measured.

    Attributes:
        r: Distances in Å, ascending, (n_points,).
        values: g(r), (n_points,).
        errors: Standard errors of g(r), (n_points,); None if they are not known.
    """

    r: np.ndarray
    values: np.ndarray
    errors: np.ndarray | None = None

    @classmethod
    def from_file(cls, path: str | Path, columns: Sequence[int] | None = None) -> MeasuredCurve:
        """Read a text file; lines that start with # are comments.

        Args:
            path: Path of the file.
            columns: Columns of r, g(r) and, if wanted, its error, counted from zero. If None, the file has r and g(r) only.

        Returns:
            The curve, with errors if a third column is named.

        Raises:
            FileNotFoundError: If the file does not exist.
            ValueError: If it is not such a curve.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"target_file={str(path)!r} is not a file: pass a text file with columns r and g(r)."
            )
        try:
            table = np.loadtxt(path, ndmin=2)
        except ValueError as error:
            raise ValueError(
                f"target_file={str(path)!r} is not a table of numbers ({error}): use columns r and g(r)."
            ) from error
        n_columns = table.shape[1]
        chosen = list(columns or range(n_columns))
        # A third column may be an error as well as another curve, so it counts only where it is named.
        known = len(chosen) == 2 or (len(chosen) == 3 and columns is not None)
        if not known or not all(isinstance(each, int) and 0 <= each < n_columns for each in chosen):
            raise ValueError(
                f"target_file={str(path)!r} has {n_columns} column(s), of which target_columns={columns} does not choose two or "
                "three: pass those of r, g(r) and, if there is one, its error, counted from zero."
            )
        table = table[:, chosen]
        problem = None
        if table.shape[0] < 2:
            problem = f"has {table.shape[0]} rows of numbers: use at least two rows of r and g(r)"
        elif not np.isfinite(table).all():
            problem = "contains numbers that are not finite: remove those rows"
        elif (table < 0).any():
            problem = "contains a negative r, g(r) or error: remove those rows"
        elif (np.diff(table[:, 0]) <= 0).any():
            problem = "is not in ascending order of r: sort its rows, and remove duplicates"
        if problem is not None:
            raise ValueError(f"target_file={str(path)!r} {problem}.")
        return cls(*table.T)

    def at(self, centers: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return values and errors at the bin centers of an observable, (n_bins,) each, interpolated linearly.

        Args:
            centers: Bin centers in Å, (n_bins,).

        Raises:
            ValueError: If the curve does not cover them.
        """
        first, last = centers[0].item(), centers[-1].item()
        # A curve that starts at zero is zero below its first r as well, where the atoms repel each other.
        if self.r[-1] < last or (self.r[0] > first and self.values[0] > 0.0):
            raise ValueError(
                f"target_file covers r from {self.r[0]:g} to {self.r[-1]:g} Å, but the bins of the observable range from "
                f"{first:g} to {last:g} Å: set r_max, or use a file with the whole curve."
            )

        def interpolated(curve: np.ndarray) -> Tensor:
            return torch.from_numpy(np.interp(centers.numpy(), self.r, curve))

        return interpolated(self.values), None if self.errors is None else interpolated(self.errors)
