"""Structures out of whatever a Trainer trains on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ase import Atoms


def training_structures(module: Any, dataloader: Any) -> list[Atoms]:
    """The structures behind a training dataloader.

    The dataset is read, not the loader: iterating the loader would advance the random numbers that shuffle it.

    Args:
        module: The LightningModule; its method ``stable_structures(dataloader)`` is asked first, if it has one.
        dataloader: The training dataloader.

    Raises:
        TypeError: If the dataset's items are not understood.
    """
    if hasattr(module, "stable_structures"):
        return list(module.stable_structures(dataloader))
    dataset = getattr(dataloader, "dataset", None)
    items: Sequence[Any] = [] if dataset is None else [dataset[index] for index in range(len(dataset))]
    if items and all(isinstance(item, Atoms) for item in items):
        return list(items)
    if items and all(hasattr(item, "to_ase_single") for item in items):  # fairchem's graphs
        return [_from_fairchem_graph(item) for item in items]
    numbers = _mace_atomic_numbers(module.modules())
    if items and numbers is not None and all(hasattr(item, "node_attrs") for item in items):
        return [_from_mace_graph(item, numbers) for item in items]
    raise TypeError(
        f"no structures found in the training data ({type(dataloader).__name__} of {type(dataset).__name__}): give "
        "structures=, as ASE Atoms or the path of a file."
    )


def _mace_atomic_numbers(modules: Iterable[Any]) -> list[int] | None:
    for module in modules:
        if hasattr(module, "atomic_energies_fn") and hasattr(module, "atomic_numbers"):
            numbers: list[int] = module.atomic_numbers.tolist()
            return numbers
    return None


def _from_mace_graph(graph: Any, atomic_numbers: Sequence[int]) -> Atoms:
    species = graph.node_attrs.argmax(dim=1).tolist()
    pbc: Any = getattr(graph, "pbc", None)
    periodic = pbc is not None and bool(pbc.any())
    return Atoms(
        numbers=[atomic_numbers[index] for index in species],
        positions=graph.positions.detach().cpu().numpy(),
        cell=graph.cell.detach().cpu().numpy() if periodic else None,
        pbc=pbc.reshape(-1).tolist() if periodic else False,
    )


def _from_fairchem_graph(graph: Any) -> Atoms:
    atoms: Atoms = graph.to_ase_single()
    return atoms
