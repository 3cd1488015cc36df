"""MACE as a LightningModule: MACE's own model, data pipeline, losses and parameter groups."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError, MeanSquaredError, MetricCollection

from stable_plugin.md.labels import ENERGY_KEY, FORCES_KEY, STRESS_KEY
from stable_plugin.md.system import System
from stable_plugin.models.base import default_dtype
from stable_plugin.models.isolated_atoms import E0s, check_mode, require_elements
from stable_plugin.models.lightning_module import PotentialModule
from stable_plugin.models.mace.files import load_mace, quiet_e3nn, save_mace
from stable_plugin.models.mace.heads import choose_head, heads_of, isolated_atoms, shift_isolated_atoms
from stable_plugin.models.mace.potential import MACEPotential
from stable_plugin.runtime import checks

# After stable_plugin.models.mace.files, whose error says what to install if mace is missing.
from e3nn import o3  # isort: skip
from mace import data as mace_data  # isort: skip
from mace import modules as mace_modules  # isort: skip
from mace.tools import AtomicNumberTable, torch_geometric  # isort: skip
from mace.tools.scripts_utils import get_params_options  # isort: skip

MAX_CHANNELS = 10_000
"""More is a typing error that would take all memory before it failed."""

ARCHITECTURE = (
    "r_max", "hidden_irreps", "max_ell", "correlation", "num_interactions", "num_bessel", "num_polynomial_cutoff",
    "radial_MLP", "MLP_irreps", "scaling", "dtype", "seed",
)  # fmt: skip
"""Arguments of a new model."""

DTYPES = {"float32": torch.float32, "float64": torch.float64}


class MACEModule(PotentialModule):
    """A LightningModule that trains a MACE model on energies and forces.

    A new model takes its elements, isolated-atom energies, scale and average number of neighbors from the training frames,
    as ``mace_run_train`` does. An existing one is fine-tuned unchanged.

    Args:
        model: A MACE model, the path of a ``.model`` file, or the name of a foundation model; a new one if not given.
        r_max: Cutoff in Å.
        hidden_irreps: Channels of the messages.
        max_ell: Highest degree of the spherical harmonics of an edge.
        correlation: Correlation order of each layer.
        num_interactions: Number of layers.
        num_bessel: Number of radial basis functions.
        num_polynomial_cutoff: Order of the cutoff polynomial.
        radial_MLP: Widths of the radial network.
        MLP_irreps: Width of the last readout.
        head: Head of a multi-head ``model`` that frames are trained on which name none (``atoms.info["head"]``); the one
            that MACE's own calculator takes if not given.
        E0s: Energies of isolated atoms: in eV by atomic number; ``isolated``, those of the isolated atoms in the data;
            ``average``, fitted to the training frames; or ``model``, those of an existing model. If None: a new model takes
            those of the data, or their average if some are missing; an existing model keeps its own, unless the labels are
            evidently those of another code, and then they are fitted, with a warning.
        scaling: Name of one of MACE's scalings.
        dtype: ``float32`` or ``float64``.
        loss: One of MACE's losses; ``WeightedEnergyForcesLoss`` if not given, or ``WeightedEnergyForcesStressLoss`` with a
            ``stress_weight``.
        energy_weight: Weight of the energies in that default loss.
        forces_weight: Weight of the forces in that default loss.
        stress_weight: Weight of the stresses in that default loss, of the frames that have them.
        lr: Learning rate of the default optimizer, Adam (amsgrad) over MACE's parameter groups.
        weight_decay: Weight decay of that optimizer.
        optimizer: Maps parameters or groups of them to an optimizer; replaces the default.
        scheduler: Maps the optimizer to a learning-rate scheduler, stepped once an epoch.
        trainable: Names of the parameters to train, as patterns like ``"readouts.*"``; the others are frozen. All are trained if None.
        lora_rank: Rank of the changes of weight matrices, a few for a pretrained model (LoRA); other weights are frozen then. Weights
            change as a whole if None.
        seed: Seed of the weights of a new model.

    Raises:
        ValueError: If an argument is out of range.
    """

    potential_suffix = ".model"
    model_argument = "model"

    def __init__(
        self,
        model: nn.Module | str | Path | None = None,
        r_max: float = 5.0,
        hidden_irreps: str = "32x0e + 32x1o",
        max_ell: int = 3,
        correlation: int = 3,
        num_interactions: int = 2,
        num_bessel: int = 8,
        num_polynomial_cutoff: int = 5,
        radial_MLP: Sequence[int] = (64, 64, 64),
        MLP_irreps: str = "16x0e",
        head: str | None = None,
        E0s: E0s = None,
        scaling: str = "rms_forces_scaling",
        dtype: str = "float32",
        loss: nn.Module | None = None,
        energy_weight: float = 1.0,
        forces_weight: float = 100.0,
        stress_weight: float = 0.0,
        lr: float = 0.01,
        weight_decay: float = 5e-7,
        optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
        scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
        trainable: str | Sequence[str] | None = None,
        lora_rank: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["model", "loss", "optimizer", "scheduler"])
        checks.number("r_max", r_max, above=0, at_most=100)
        for name, count, least, most in (
            ("max_ell", max_ell, 0, 11),
            ("correlation", correlation, 1, 8),
            ("num_interactions", num_interactions, 1, 100),
            ("num_bessel", num_bessel, 1, 1000),
            ("num_polynomial_cutoff", num_polynomial_cutoff, 1, 1000),
            *(("radial_MLP", width, 1, 100_000) for width in radial_MLP),
        ):
            checks.count(name, count, at_least=least, at_most=most)
        for name, irreps in (("hidden_irreps", hidden_irreps), ("MLP_irreps", MLP_irreps)):
            _check_irreps(name, irreps)
        check_mode(E0s)
        checks.number("lr", lr, above=0)
        for name, number in (
            ("energy_weight", energy_weight), ("forces_weight", forces_weight), ("stress_weight", stress_weight),
            ("weight_decay", weight_decay),
        ):  # fmt: skip
            checks.number(name, number, at_least=0)
        checks.seed(seed)
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is not known: use one of {sorted(DTYPES)}.")
        if scaling not in mace_modules.scaling_classes:
            raise ValueError(f"scaling={scaling!r} is not known: use one of {sorted(mace_modules.scaling_classes)}.")
        if loss is None and stress_weight > 0:
            loss = mace_modules.WeightedEnergyForcesStressLoss(energy_weight, forces_weight, stress_weight)
        self.loss = loss or mace_modules.WeightedEnergyForcesLoss(energy_weight, forces_weight)
        self.optimizer, self.scheduler = optimizer, scheduler
        self.check_optimizer()
        # Any: nn.Module does not declare the attributes of a MACE model.
        self.model: Any = load_mace(model) if isinstance(model, str | Path) else model
        if self.model is not None:
            choose_head(heads_of(self.model), head)
            self.warn_unused(ARCHITECTURE)
        self._statistics: dict[str, Any] | None = None
        self.metrics = nn.ModuleDict({stage: _metrics() for stage in ("valid", "test")})

    def load_potential(self, path: str | Path) -> None:
        """Replace the model by that of a ``.model`` file."""
        self.model = load_mace(path)

    def save_potential(self, path: Path) -> None:
        """Write a ``.model`` file."""
        with self.unfrozen():
            save_mace(self.model, path)

    def shift_energies(self, per_atom_eV: float) -> None:
        """Add a constant in eV to the energy of every isolated atom, which changes no force."""
        shift_isolated_atoms(self.model, per_atom_eV, self._head_index())

    def isolated_atoms(self) -> dict[int, float]:
        return isolated_atoms(self.model, self._head_index())

    def shift_isolated_atoms(self, shifts: Mapping[int, float]) -> None:
        shift_isolated_atoms(self.model, shifts, self._head_index())

    def _head_index(self) -> int:
        heads = heads_of(self.model)
        return heads.index(choose_head(heads, self.options.head))

    @property
    def model_dtype(self) -> torch.dtype:
        """Precision of the model."""
        if self.model is None:
            return DTYPES[self.options.dtype]
        parameters: Iterator[Tensor] = self.model.parameters()
        return next(parameters).dtype

    def build(self, frames: Sequence[Atoms]) -> None:
        self._statistics = self._measure(frames)
        self.model = self._build(self._statistics)

    def dataloader(self, frames: Sequence[Atoms], batch_size: int, shuffle: bool) -> Any:
        """Return a dataloader over MACE graphs.

        Args:
            frames: Labeled structures.
            batch_size: Structures per batch.
            shuffle: Whether to draw them in random order.
        """
        assert self.model is not None
        numbers, cutoff = self.model.atomic_numbers.tolist(), float(self.model.r_max)
        return self._loader(frames, numbers, cutoff, batch_size, shuffle)

    def stable_potential(self, system: System) -> MACEPotential:
        """Return the potential that StABlE training simulates with."""
        assert self.model is not None
        return MACEPotential(self.model, system, self.options.head)

    def forward(self, batch: Any, training: bool = False) -> dict[str, Tensor]:
        """Return the output of MACE for one of its batches."""
        with_stress = hasattr(self.loss, "stress_weight")
        output: dict[str, Tensor] = self.model(batch.to_dict(), training=training, compute_stress=with_stress)
        return output

    def training_loss(self, batch: Any) -> Tensor:
        loss: Tensor = self.loss(batch, self(batch, training=True))
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.training_loss(batch)
        self.log("train/loss", loss, batch_size=batch.num_graphs, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "valid")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def make_optimizer(self) -> torch.optim.Optimizer:
        if self.optimizer is None and self.options.lora_rank is None:
            return torch.optim.Adam(**get_params_options(self._mace_options(), self.model))
        return super().make_optimizer()

    def default_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=self.options.lr, amsgrad=True)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.refuse_mixed_precision(
            "MACE, whose tensor products do not mix precisions: use precision='32-true' with dtype='float32', or '64-true' "
            "with dtype='float64'."
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mace_statistics"] = self._statistics

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.model is None:
            self._statistics = checkpoint["mace_statistics"]
            if self._statistics is None:
                raise ValueError(
                    "the checkpoint is of a fine-tuned model and does not contain its architecture: pass model=, the model "
                    "that fine-tuning started from."
                )
            self.model = self._build(self._statistics)

    def _evaluate(self, batch: Any, stage: str) -> None:
        # Forces are a gradient, which Lightning's inference mode forbids; tensors made in it must be copied first.
        with torch.inference_mode(False), torch.enable_grad():
            batch = batch.clone()
            output = self(batch)
        loss = self.loss(batch, output)
        metrics: Any = self.metrics[stage]
        n_atoms = batch.ptr[1:] - batch.ptr[:-1]
        pairs = {
            "energy": (output["energy"] / n_atoms, batch.energy / n_atoms),
            "forces": (output["forces"].reshape(-1), batch.forces.reshape(-1)),
        }
        has_stress = batch.stress_weight.reshape(-1) > 0
        if output.get("stress") is not None and has_stress.any():
            pairs["stress"] = output["stress"][has_stress], batch.stress[has_stress]
        for name, metric in metrics.items():
            if name.split("_")[0] not in pairs:
                continue
            metric.update(*(tensor.detach() for tensor in pairs[name.split("_")[0]]))
            self.log(f"{stage}/{name}", metric, batch_size=batch.num_graphs)
        self.log(f"{stage}/loss", loss.detach(), batch_size=batch.num_graphs, prog_bar=True)

    def _mace_options(self) -> Namespace:
        return Namespace(
            lr=self.options.lr,
            weight_decay=self.options.weight_decay,
            amsgrad=True,
            beta=0.9,
            lr_params_factors="{}",
            freeze=None,
        )

    def _loader(
        self, frames: Sequence[Atoms], numbers: Sequence[int], cutoff: float, batch_size: int, shuffle: bool
    ) -> Any:
        table = AtomicNumberTable(list(numbers))
        keys = mace_data.KeySpecification(
            info_keys={"energy": ENERGY_KEY, "stress": STRESS_KEY}, arrays_keys={"forces": FORCES_KEY}
        )
        for frame in frames:
            unknown = sorted(set(frame.numbers.tolist()) - set(numbers))
            if unknown:
                raise ValueError(
                    f"a frame {frame.get_chemical_formula()} contains the atomic number(s) {unknown}, which the model does "
                    f"not know (it knows {list(numbers)}): train a new model on frames that contain them."
                )
        with default_dtype(self.model_dtype):
            graphs: Any = [
                mace_data.AtomicData.from_config(
                    mace_data.config_from_atoms(frame, keys, head_name=self._head_of(frame)),
                    table,
                    cutoff,
                    heads=self._heads(),
                )
                for frame in frames
            ]
        return torch_geometric.dataloader.DataLoader(graphs, batch_size=batch_size, shuffle=shuffle)

    def _heads(self) -> list[str]:
        return heads_of(self.model)

    def _head_of(self, frame: Atoms) -> str:
        return choose_head(self._heads(), frame.info.get("head") or self.options.head)

    def _measure(self, frames: Sequence[Atoms]) -> dict[str, Any]:
        """Return what MACE measures on the data, as plain numbers that a checkpoint can store."""
        numbers = sorted({int(z) for frame in frames for z in frame.numbers})
        mode: Any = self.options.E0s
        if mode == "model":
            raise ValueError("E0s='model' is for an existing model: pass model=, or another value of E0s.")
        if mode is None and set(numbers) <= set(self.isolated_energies):
            mode = "isolated"
        if mode in (None, "average"):
            keys = mace_data.KeySpecification(info_keys={"energy": ENERGY_KEY}, arrays_keys={"forces": FORCES_KEY})
            configs = [mace_data.config_from_atoms(frame, keys) for frame in frames]
            by_number = mace_data.compute_average_E0s(configs, AtomicNumberTable(numbers))
        else:
            by_number = require_elements(
                self.isolated_energies if mode == "isolated" else mode,
                frames,
                "add their energies in eV or frames of isolated atoms, or use 'average'.",
            )
        energies = np.array([by_number[z] for z in numbers])
        loader = self._loader(frames, numbers, self.options.r_max, batch_size=len(frames), shuffle=False)
        with default_dtype(self.model_dtype):
            neighbors = mace_modules.compute_avg_num_neighbors(loader)
            _, scale = mace_modules.scaling_classes[self.options.scaling](loader, energies)
        return {
            "atomic_numbers": numbers,
            "atomic_energies": energies.tolist(),
            "avg_num_neighbors": float(neighbors),
            "scale": float(np.squeeze(scale)),
        }

    def _build(self, statistics: dict[str, Any]) -> nn.Module:
        options = self.options
        interaction = mace_modules.interaction_classes["RealAgnosticResidualInteractionBlock"]
        with default_dtype(DTYPES[options.dtype]), torch.random.fork_rng(devices=[]), quiet_e3nn():
            torch.manual_seed(options.seed)
            return mace_modules.ScaleShiftMACE(
                r_max=options.r_max,
                num_bessel=options.num_bessel,
                num_polynomial_cutoff=options.num_polynomial_cutoff,
                max_ell=options.max_ell,
                interaction_cls=interaction,
                interaction_cls_first=interaction,
                num_interactions=options.num_interactions,
                num_elements=len(statistics["atomic_numbers"]),
                hidden_irreps=o3.Irreps(options.hidden_irreps),
                MLP_irreps=o3.Irreps(options.MLP_irreps),
                atomic_energies=np.array(statistics["atomic_energies"]),
                avg_num_neighbors=statistics["avg_num_neighbors"],
                atomic_numbers=statistics["atomic_numbers"],
                correlation=options.correlation,
                gate=nn.functional.silu,
                radial_MLP=list(options.radial_MLP),
                atomic_inter_scale=statistics["scale"],
                # The default of mace_run_train.
                atomic_inter_shift=0.0,
            )


def _check_irreps(name: str, irreps: str) -> None:
    try:
        parsed = o3.Irreps(irreps)
        channels = max((each.mul for each in parsed), default=0)
        if not 0 < channels <= MAX_CHANNELS:
            raise ValueError(f"{channels} channels")
    except Exception as error:  # the parser of e3nn raises errors of many types
        raise ValueError(
            f"{name}={irreps!r} is not a valid list of irreducible representations ({error}): use for instance "
            f"'16x0e + 16x1o', with up to {MAX_CHANNELS} channels."
        ) from error


def _metrics() -> MetricCollection:
    return MetricCollection(
        {
            "energy_mae": MeanAbsoluteError(),
            "energy_rmse": MeanSquaredError(squared=False),
            "forces_mae": MeanAbsoluteError(),
            "forces_rmse": MeanSquaredError(squared=False),
            "stress_mae": MeanAbsoluteError(),
        },
        compute_groups=False,
    )
