"""fairchem models with an energy head: eSEN, UMA, AllScAIP."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from stable_plugin.md.neighbors import Edges
from stable_plugin.md.system import System
from stable_plugin.models.base import Potential, default_dtype
from stable_plugin.models.family import not_installed

try:
    from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch
    from fairchem.core.models.base import HydraModel
    from fairchem.core.models.uma.escn_md import eSCNMDBackbone
    from fairchem.core.units.mlip_unit import InferenceSettings
    from fairchem.core.units.mlip_unit.mlip_unit import Task
except ImportError as error:
    raise not_installed("fairchem", "fairchem", "fairchem-core") from error

READOUTS = ("energy_block", "energy_ffn")
"""Names of the layers of fairchem's heads that output energies per atom."""

NEEDS_CHARGE_AND_SPIN = ("omol",)
"""Data sets of structures with various charges and spins, for which zero is not a safe default."""


@dataclass(frozen=True)
class _AtomicReadout:
    """The layer that outputs energies per atom, and the factor that turns their sum into the energy.

    Attributes:
        layer: Name of the layer; None if no layer does.
        weight: One for a head that sums over atoms, 1 / n_atoms for a head that averages.
    """

    layer: str | None
    weight: float = 1.0


class FairchemPotential(Potential):
    """A fairchem model applied to replicas of one system.

    Forces are the negative gradient of the energy. While simulating, fairchem merges the experts of a UMA model for the
    composition of the system, on a copy of the model.

    Source of the models: Fu et al., arXiv:2502.12147 (eSEN); Wood et al., arXiv:2506.23971 (UMA).

    Args:
        module: A ``HydraModel`` with an energy head.
        system: What is simulated.
        tasks: Outputs of the heads, with normalizers and element references; those of the model itself if not given.
        task_name: Name of the data set whose energies are used, such as ``omol``; required if the model knows several.
        conservative: Use the gradient of the energy even if the model predicts forces directly.

    Raises:
        TypeError: If the module is not a fairchem model.
        ValueError: If the model lacks the task, predicts forces directly, or needs a charge and spin that the system
            does not state.
    """

    # Any: nn.Module does not declare the attributes of a fairchem model.
    module: Any
    sees_cells = True
    uncompilable = "fairchem models, whose energies cannot be traced as one graph"

    def __init__(
        self,
        module: Any,
        system: System,
        tasks: Sequence[Task] | None = None,
        task_name: str | None = None,
        conservative: bool = False,
    ) -> None:
        if not isinstance(module, HydraModel):
            raise TypeError(
                f"{type(module).__name__} is not a fairchem HydraModel: pass the model that contains the heads."
            )
        super().__init__(module, system)
        if not conservative and _predicts_forces(module):
            raise ValueError(
                "the model predicts forces directly: they are not the gradient of an energy, which the Boltzmann estimator "
                "needs. Use an energy-conserving model, or conservative=True to simulate with the gradient of its energy "
                "head and to train that."
            )
        self._tasks = tasks if tasks is not None else list((module.tasks or {}).values())
        self._conservative = conservative
        self.task = energy_task(self._tasks, task_name)
        self.dataset = task_name or self.task.datasets[0]
        self._charge, self._spin = resolve_charge_and_spin(system.charge, system.spin, self.dataset)
        self._templates: dict[tuple[int, bool], AtomicData] = {}
        self._readout: _AtomicReadout | None = None
        self._merged: nn.Module | None = None

    @property
    def cutoff(self) -> float:
        backbone = self.module.backbone
        takes_graph = isinstance(backbone, eSCNMDBackbone) and self.system.n_atoms <= backbone.max_neighbors
        # The model builds the graph of a periodic system, and any graph in which it limits or weighs neighbors.
        return float(backbone.cutoff) if takes_graph and not self.system.periodic else inf

    @property
    def constant_energy(self) -> float:
        energy = float(self.task.normalizer.mean)
        if self.task.element_references is not None:
            references = self.task.element_references.element_references
            energy += float(references[self.system.numbers.to(references.device)].double().sum())
        return energy

    def atomic_energies(self, positions: Tensor, edges: Edges) -> Tensor:
        model = self.simulated_module
        with _energies_only(model, own_graph=self.cutoff == inf), _record_readouts(model) as recorded:
            output = model(self._data(positions, edges))
        energies = output[self.task.name]
        energies = energies["energy"] if isinstance(energies, dict) else energies
        per_atom = self._per_atom(recorded, energies.reshape(-1).double(), positions.shape[1])
        return per_atom * float(self.task.normalizer.rmsd)

    @torch.no_grad()
    def shift_energies(self, per_atom_eV: float) -> bool:
        bias = self._readout_bias()
        if bias is None or self._readout is None:
            return False
        bias += per_atom_eV / (float(self.task.normalizer.rmsd) * self._readout.weight)
        return True

    def _readout_bias(self) -> Tensor | None:
        """Return the constant in the last layer of the energy head; None if it has none, or the head is not used yet."""
        if self._readout is None or self._readout.layer is None:
            return None
        layers = [part for part in self.module.output_heads.get_submodule(self._readout.layer).modules()]
        last = [part for part in layers if isinstance(part, nn.Linear)][-1:]
        return last[0].bias if last else None

    def of_system(self, system: System) -> Potential:
        return type(self)(self.module, system, self._tasks, self.dataset, self._conservative)

    def settings(self) -> dict[str, Any]:
        return {"task_name": self.dataset, "charge": self._charge, "spin": self._spin}

    @contextmanager
    def simulating(self) -> Iterator[None]:
        with self.frozen():
            self._merged = self._merge_experts()
            try:
                yield
            finally:
                self._merged = None

    @property
    def simulated_module(self) -> nn.Module:
        return self.module if self._merged is None else self._merged

    def _data(self, positions: Tensor, edges: Edges) -> AtomicData:
        own_graph = self.cutoff == inf
        key = (len(positions), own_graph)
        if key not in self._templates:
            self._templates[key] = self._template(len(positions), own_graph)
        data = copy.copy(self._templates[key])
        data.__keys__ = set(data.__keys__)  # the model adds entries
        if own_graph:
            data.pos = self._wrapped(positions, edges.cell).reshape(-1, 3)
            if edges.cell is not None and self.system.periodic:
                data.cell = edges.cell.to(data.cell)
            return data
        data.pos = positions.reshape(-1, 3)
        # fairchem's edge vectors point from receiver to sender. The template has a unit cell, so offsets are in Å.
        data.edge_index, data.cell_offsets = edges.index, -edges.shifts
        data.nedges = torch.zeros(len(positions), dtype=torch.long, device=self.device)
        data.nedges[0] = edges.index.shape[1]
        return data

    def _template(self, n_replicas: int, own_graph: bool) -> AtomicData:
        cell = self.system.cell if own_graph and self.system.periodic else torch.eye(3)
        per_atom = torch.zeros(self.system.n_atoms, dtype=torch.long)
        graph = AtomicData(
            pos=torch.zeros(self.system.n_atoms, 3, dtype=self.dtype),
            atomic_numbers=self.system.numbers.cpu(),
            cell=cell.to("cpu", self.dtype)[None],
            pbc=torch.tensor([self.system.pbc]),
            natoms=torch.tensor([self.system.n_atoms]),
            edge_index=torch.empty(2, 0, dtype=torch.long),
            cell_offsets=torch.empty(0, 3, dtype=self.dtype),
            nedges=torch.tensor([0]),
            charge=torch.tensor([self._charge]),
            spin=torch.tensor([self._spin]),
            fixed=per_atom,
            tags=per_atom.clone(),
            dataset=self.dataset,
        )
        return atomicdata_list_to_batch([graph] * n_replicas).to(self.device)

    def _wrapped(self, positions: Tensor, cells: Tensor | None) -> Tensor:
        """Return positions wrapped into their cells, where fairchem's graph construction expects them."""
        if not self.system.periodic:
            return positions
        to_cell = self.system.to_cell if cells is None else self.system.inverse_of(cells)
        images = torch.floor(positions.detach() @ to_cell.to(positions))
        return positions - images @ (self.system.cell if cells is None else cells).to(positions)

    def _per_atom(self, recorded: dict[str, Tensor], energies: Tensor, n_atoms: int) -> Tensor:
        """Return energies per atom if a layer outputs them; the whole energy on the first atom otherwise."""
        per_atom = {
            name: values.reshape(-1)[: len(energies) * n_atoms].double().reshape(len(energies), n_atoms)
            for name, values in recorded.items()
        }
        if self._readout is None:
            self._readout = _matching_readout(per_atom, energies)
        if self._readout.layer is None:
            return torch.cat([energies[:, None], energies.new_zeros(len(energies), n_atoms - 1)], dim=1)
        return per_atom[self._readout.layer] * self._readout.weight

    def _merge_experts(self) -> Any:
        """Return a copy with its experts merged for this system, or None for a model without mergeable experts."""
        if getattr(self.module.backbone, "num_experts", 0) == 0 or self.module.backbone.mole_type != "so2":
            return None
        with default_dtype(self.dtype):
            merged = _copy(self.module)
            merged.prepare_for_inference(self._template(1, own_graph=True), InferenceSettings(merge_mole=True))
        return merged.to(self.device, self.dtype).requires_grad_(False).eval()


def energy_task(tasks: Sequence[Task], task_name: str | None = None) -> Task:
    """Return the task that predicts the energy of a data set.

    Args:
        tasks: All tasks of a model.
        task_name: Name of the data set; optional if the model knows only one.

    Raises:
        ValueError: If there is no such task, or several and no name.
    """
    energies = [task for task in tasks if task.property == "energy"]
    datasets = sorted({dataset for task in energies for dataset in task.datasets})
    if not datasets:
        raise ValueError("the model has no energy task: load it with load_fairchem, or pass tasks=.")
    if task_name is None and len(datasets) > 1:
        raise ValueError(f"the model predicts energies for {datasets}: choose one with task_name=.")
    chosen = datasets[0] if task_name is None else task_name
    for task in energies:
        if chosen in task.datasets:
            return task
    raise ValueError(f"task_name={task_name!r} is not a task of the model: choose one of {datasets}.")


def _matching_readout(per_atom: dict[str, Tensor], energies: Tensor) -> _AtomicReadout:
    """Return the layer whose energies per atom add up to the energies that the head returned."""
    for layer, values in per_atom.items():
        for weight in (1.0, 1.0 / values.shape[1]):
            if torch.allclose(weight * values.sum(dim=1), energies, rtol=1e-4, atol=1e-4):
                return _AtomicReadout(layer, weight)
    return _AtomicReadout(None)


def resolve_charge_and_spin(charge: int | None, spin: int | None, dataset: str) -> tuple[int, int]:
    """Return the total charge and spin multiplicity that fairchem expects: zero if the data set does not use them.

    Args:
        charge: Total charge in units of e, if known.
        spin: Spin multiplicity, if known.
        dataset: Name of the data set.

    Raises:
        ValueError: If one is unknown, and the data set uses them.
    """
    missing = [name for name, value in (("charge", charge), ("spin", spin)) if value is None]
    if missing and dataset in NEEDS_CHARGE_AND_SPIN:
        raise ValueError(
            f"task_name={dataset!r} needs the total charge and the spin multiplicity, but the structures have no "
            f"{' and no '.join(missing)}: set atoms.info['charge'] and atoms.info['spin'], or the arguments charge= and "
            "spin= (0 and 1 for a neutral closed shell)."
        )
    return charge or 0, spin or 0


def _predicts_forces(module: Any) -> bool:
    config = getattr(module.backbone, "regress_config", None)
    return bool(config.direct_forces if config is not None else getattr(module.backbone, "direct_forces", False))


@contextmanager
def _energies_only(module: Any, own_graph: bool) -> Iterator[None]:
    """Turn off the forces of the heads, whose derivative frees the graph that ours needs; restore them afterwards."""
    changes: list[tuple[Any, str, Any]] = []
    configs = set()
    for part in module.modules():
        config = getattr(part, "regress_config", None)
        if config is not None and id(config) not in configs:
            configs.add(id(config))
            changes += [(config, name, False) for name in ("forces", "stress", "hessian")]
        changes += [(part, name, False) for name in ("regress_forces", "regress_stress") if hasattr(part, name)]
    if isinstance(module.backbone, eSCNMDBackbone):
        changes += [(module.backbone, "otf_graph", own_graph), (module.backbone, "always_use_pbc", False)]
    before = [(part, name, getattr(part, name)) for part, name, _ in changes]
    for part, name, value in changes:
        setattr(part, name, value)
    try:
        yield
    finally:
        for part, name, value in before:
            setattr(part, name, value)


@contextmanager
def _record_readouts(module: Any) -> Iterator[dict[str, Tensor]]:
    """Record the energies per atom that the heads compute, by the name of the layer."""
    recorded: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, part in module.output_heads.named_modules():
            if name.split(".")[-1] in READOUTS:
                handle = part.register_forward_hook(lambda _, __, output, name=name: recorded.__setitem__(name, output))
                stack.callback(handle.remove)
        yield recorded


def _copy(module: nn.Module) -> Any:
    """Return a deep copy without what a training step leaves behind: figures, and tensors that cannot be copied."""
    # deepcopy takes an entry of its memo as the copy of the object with that id.
    memo: dict[int, Any] = {}
    for part in module.modules():
        for name in ("fig", "axs"):
            if hasattr(part, name):
                memo[id(getattr(part, name))] = None
        routing = getattr(part, "global_mole_tensors", None)
        if routing is not None and routing.expert_mixing_coefficients is not None:
            memo[id(routing.expert_mixing_coefficients)] = None
    return copy.deepcopy(module, memo)
