"""The pieces: one recipe with one objective and one seed each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf

from benchmarks.evidence.architectures import esen, nequip
from benchmarks.recipes import shipped

SEEDS = (0, 1, 2)

OBJECTIVES: dict[str, dict[str, Any]] = {
    # With energies and forces alone as a control, for as many optimizer steps.
    "margin": {"runner.control": True},
    "published": {
        "runner.control": False,
        "runner.stable.objective": "boltzmann",
        "runner.stable.detector": {"_target_": "stable_plugin.BondDeviation"},
        "runner.stable.steps_per_window": 3,
        "runner.stable_trainer.accumulate_grad_batches": 5,
        "runner.stable.schedule.max_windows": 60,
    },
}
"""What each objective sets in a recipe; ``published`` is that of the StABlE paper, with four times the windows."""


@dataclass(frozen=True)
class Case:
    """A system and an architecture.

    Attributes:
        system: Name of the system.
        architecture: Name of the architecture.
        recipe: Name of the recipe that it is a variant of.
        changes: Values of the variant by their place in the recipe.
    """

    system: str
    architecture: str
    recipe: str
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Piece:
    """A case with an objective and a seed: one run of a recipe.

    Attributes:
        case: The case.
        objective: A key of `OBJECTIVES`.
        seed: Seed of the weights and of the simulations.
    """

    case: Case
    objective: str
    seed: int

    @property
    def name(self) -> str:
        """Name of the files of the piece."""
        return f"{self.case.system}-{self.case.architecture}-{self.objective}-{self.seed}"

    def recipe(self) -> DictConfig:
        """Return the recipe that is run."""
        config = shipped(self.case.recipe)
        changes = {**self.case.changes, **OBJECTIVES[self.objective], "seed": self.seed}
        for place, value in changes.items():
            OmegaConf.update(config, place, value, merge=False)
        config.runner.title = f"{self.case.system}, {self.case.architecture}, {self.objective}"
        return config


# 0.3 ns of evaluation.
MOLECULE = {"runner.evaluation.horizons_ps": [10.0], "runner.evaluation.n_replicas": 32}
# Learning steps of other architectures take several times as long as those of MACE.
FEWER_FRAMES = {"runner.stable.margin_frames": 64}
WATER = {"runner.evaluation.horizons_ps": [40.0], "runner.evaluation.n_replicas": 8}

CASES = (
    Case("aspirin", "mace", "aspirin_mace", {**MOLECULE, "runner.evaluation.other_conditions": True}),
    Case(
        "aspirin",
        "esen",
        "aspirin_mace",
        {
            **MOLECULE,
            **FEWER_FRAMES,
            "runner.model": esen(4.5, 60),
            "runner.data.batch_size": 5,
            "runner.stable.learning_rate": 0.001,
        },
    ),
    Case(
        "aspirin",
        "nequip",
        "aspirin_mace",
        {
            **MOLECULE,
            **FEWER_FRAMES,
            "runner.model": nequip(["C", "H", "O"], 4.5, 60),
            "runner.stable.learning_rate": 0.005,
        },
    ),
    Case("water", "mace", "water_mace", WATER),
    Case("peptide", "esen", "peptide_esen", MOLECULE),
)

PIECES = {
    piece.name: piece
    for piece in (Piece(case, objective, seed) for case in CASES for seed in SEEDS for objective in OBJECTIVES)
}
"""All pieces by name, in the order in which they are run."""
