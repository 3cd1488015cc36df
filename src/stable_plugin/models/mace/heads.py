"""Heads of multi-head MACE models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch


def heads_of(model: Any) -> list[str]:
    """Return the names of the heads of a MACE model."""
    return list(getattr(model, "heads", None) or ["Default"])


def choose_head(heads: Sequence[str], head: str | None = None) -> str:
    """Return the head to use: the one that is named, or the one that MACE's own calculator takes by default.

    Args:
        heads: Names of the heads of the model.
        head: Name of a head; if None, the only head, or the one that is called ``default`` in any case.

    Raises:
        ValueError: If there is no such head, or none is the default.
    """
    if head is not None:
        if head not in heads:
            raise ValueError(f"head={head!r} is not one of the model's heads {list(heads)}: use one of these.")
        return head
    if len(heads) == 1:
        return heads[0]
    for name in heads:
        if name.lower() == "default":
            return name
    raise ValueError(
        f"head=None, but the model has the heads {list(heads)}, none of which is called 'default': pass head=, or set "
        "atoms.info['head'] in the frames."
    )


@torch.no_grad()
def shift_isolated_atoms(model: Any, shifts: float | Mapping[int, float], head: int) -> None:
    """Add constants to the isolated-atom energies of one head, which changes no force.

    Args:
        model: A MACE model.
        shifts: Constant in eV for all elements, or by atomic number.
        head: Index of the head.
    """
    energies = model.atomic_energies_fn.atomic_energies
    row = energies[head] if energies.dim() == 2 else energies
    numbers = model.atomic_numbers.tolist()
    by_number = shifts if isinstance(shifts, Mapping) else dict.fromkeys(numbers, shifts)
    row += torch.tensor([float(by_number.get(number, 0.0)) for number in numbers]).to(row)


def isolated_atoms(model: Any, head: int) -> dict[int, float]:
    """Return the isolated-atom energies of one head, in eV by atomic number.

    Args:
        model: A MACE model.
        head: Index of the head.
    """
    energies = model.atomic_energies_fn.atomic_energies
    row = energies[head] if energies.dim() == 2 else energies
    return dict(zip(model.atomic_numbers.tolist(), row.double().tolist(), strict=True))
