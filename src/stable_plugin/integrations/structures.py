"""Structures behind the data that a trainer trains on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ase import Atoms
from torch.utils.data import IterableDataset

from stable_plugin.models import families


def training_structures(module: Any, dataloader: Any) -> list[Atoms]:
    """Return the structures behind a training dataloader.

    A data module with ``train_frames`` has the structures as they were read, with constraints and masses that graphs do not
    hold. Otherwise the dataset is read instead of the loader, because iterating the loader would advance the random numbers
    that shuffle it. Graphs are converted by the family of models that they belong to.

    Args:
        module: The LightningModule; its method ``stable_structures(dataloader)`` is called first, if it has one.
        dataloader: The training dataloader.

    Returns:
        ASE structures, in the order of the dataset.

    Raises:
        TypeError: If no structures are found in the dataset, or it can only be iterated over.
    """
    if hasattr(module, "stable_structures"):
        return list(module.stable_structures(dataloader))
    frames = _source_frames(module)
    if frames is not None:
        return frames
    dataset = getattr(dataloader, "dataset", None)
    if isinstance(dataset, IterableDataset) or not (dataset is None or hasattr(dataset, "__len__")):
        raise TypeError(
            f"the training data ({type(dataloader).__name__} of {type(dataset).__name__}) can only be iterated over, and to "
            "read it here would change what is trained on: pass structures=, as ASE Atoms or the path of a file."
        )
    items: Sequence[Any] = [] if dataset is None else [dataset[index] for index in range(len(dataset))]
    if items and all(isinstance(item, Atoms) for item in items):
        return list(items)
    for family in families() if items else ():
        structures = family.structures(module, items)
        if structures is not None:
            return structures
    raise TypeError(
        f"no structures found in the training data ({type(dataloader).__name__} of {type(dataset).__name__}): pass "
        "structures=, as ASE Atoms or the path of a file."
    )


def _source_frames(module: Any) -> list[Atoms] | None:
    """Return the training frames of the data module that a LightningModule is trained with, if it keeps them."""
    try:
        trainer = module.trainer
    except (AttributeError, RuntimeError):  # not attached to a Trainer
        return None
    frames = getattr(getattr(trainer, "datamodule", None), "train_frames", None)
    return None if frames is None else list(frames)
