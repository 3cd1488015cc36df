"""Training data from files that ASE reads."""

from __future__ import annotations

import logging
from typing import Any

from ase import Atoms
from ase.data import chemical_symbols
from pytorch_lightning import LightningDataModule

from stable_plugin.md.frames import Frames, read_all, split_isolated
from stable_plugin.md.labels import ENERGY_KEY, FORCES_KEY, STRESS_KEY, find_keys, isolated_energies, read_labeled
from stable_plugin.runtime import checks

log = logging.getLogger(__name__)


class ExtxyzDataModule(LightningDataModule):
    """Labeled structures for a LightningModule of this package, which builds the graphs that its model needs.

    Args:
        train: Training frames: files (extxyz, or anything ASE reads) or structures, as
            :func:`~stable_plugin.md.frames.read_frames` takes them.
        valid: Validation frames.
        batch_size: Frames per optimizer step.
        energy_key: Key of the total energy in eV.
        forces_key: Key of the forces in eV/Å.
        stress_key: Key of the stress in eV/Å³ as ASE defines it, 6 numbers in Voigt order or 9; frames may lack it. Modules with a
            ``stress_weight`` train on it.

    Attributes:
        train_frames: Labeled training frames, without isolated atoms.
        valid_frames: Labeled validation frames; None without validation.
        isolated_energies: Energies of the isolated atoms among the training frames, in eV by atomic number.

    Raises:
        ValueError: If there are fewer than two frames, or one has no energy or forces.
    """

    def __init__(
        self,
        train: Frames,
        valid: Frames | None = None,
        batch_size: int = 10,
        energy_key: str = ENERGY_KEY,
        forces_key: str = FORCES_KEY,
        stress_key: str = STRESS_KEY,
    ) -> None:
        super().__init__()
        self.batch_size = checks.count("batch_size", batch_size)
        # Read now, so that errors in the files show up before anything long starts.
        frames, isolated = split_isolated(read_all(train, "train"))
        if frames:
            energy_key, forces_key, stress_key = find_keys(frames, "train", energy_key, forces_key, stress_key)
        keys = energy_key, forces_key, stress_key
        self.train_frames: list[Atoms] = read_labeled(frames, "train", *keys, least=2)
        self.isolated_energies = isolated_energies(isolated, "train", energy_key)
        if self.isolated_energies:
            named = (f"{chemical_symbols[number]} {energy:g} eV" for number, energy in self.isolated_energies.items())
            log.info("train: isolated atoms %s", ", ".join(named))
        self.valid_frames: list[Atoms] | None = None if valid is None else read_labeled(valid, "valid", *keys)

    def __repr__(self) -> str:
        valid = None if self.valid_frames is None else f"<{len(self.valid_frames)} frames>"
        return f"{type(self).__name__}(train=<{len(self.train_frames)} frames>, valid={valid}, batch_size={self.batch_size})"

    def train_dataloader(self) -> Any:
        return self._module().dataloader(self.train_frames, self.batch_size, shuffle=True)

    def val_dataloader(self) -> Any:
        if self.valid_frames is None:
            return []
        return self._module().dataloader(self.valid_frames, self.batch_size, shuffle=False)

    def _module(self) -> Any:
        assert self.trainer is not None
        module = self.trainer.lightning_module
        if not hasattr(module, "dataloader"):
            raise TypeError(
                f"{type(module).__name__} has no method dataloader(frames, batch_size, shuffle), which builds the graphs "
                "of its model: use a module of stable_plugin.models, or your own data module."
            )
        return module
