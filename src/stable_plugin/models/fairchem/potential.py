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

try:
    from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch
    from fairchem.core.models.base import HydraModel
    from fairchem.core.models.uma.escn_md import eSCNMDBackbone
    from fairchem.core.units.mlip_unit import InferenceSettings
    from fairchem.core.units.mlip_unit.mlip_unit import Task
except ImportError as error:
    raise ImportError(
        "fairchem models need the package fairchem-core, which is not installed: pip install 'stable-plugin[fairchem]', "
        "or see the README for MACE and fairchem in one environment."
    ) from error

READOUTS = ("energy_block", "energy_ffn")
"""What fairchem's heads call the layers that give energies per atom."""

NEEDS_CHARGE_AND_SPIN = ("omol",)
"""Data sets whose structures are of different charges and spins, so that zero is no safe guess."""


@dataclass(frozen=True)
class _Readout:
    """Which layer gives the energies per atom (None if none does), and what each counts for in the energy."""

    name: str | None
    share: float = 1.0


class FairchemPotential(Potential):
    """A fairchem model applied to replicas of one system.

    Forces are the negative gradient of the energy. While simulating, the experts of a UMA model are merged for the one
    composition there is, by fairchem's own means and on a copy.

    Source of the models: Fu et al., arXiv:2502.12147 (eSEN); Wood et al., arXiv:2506.23971 (UMA).

    Args:
        module: A ``HydraModel`` with an energy head.
        system: What is simulated.
        tasks: What the heads predict, with normalizers and element references; those that the model was set up with if
            not given.
        task_name: Name of the data set whose energies are meant, such as ``omol``; needed if the model knows several.
        conservative: Use the gradient of the energy also for a model that predicts forces directly.

    Raises:
        TypeError: If it is not a fairchem model.
        ValueError: If the model lacks the task, predicts forces directly, or needs a charge and spin that the system
            does not state.
    """

    # Any: the attributes of a fairchem model are not those that nn.Module declares.
    module: Any

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
                f"{type(module).__name__} is not a fairchem HydraModel: give the model that holds the heads."
            )
        super().__init__(module, system)
        if not conservative and _predicts_forces(module):
            raise ValueError(
                "the model predicts forces directly, so they are not the gradient of an energy, which the Boltzmann "
                "estimator needs: use an energy-conserving model, or conservative=True to simulate with the gradient of "
                "its energy head and to train that."
            )
        known = tasks if tasks is not None else list((module.tasks or {}).values())
        self.task = energy_task(known, task_name)
        self.dataset = task_name or self.task.datasets[0]
        self._charge, self._spin = charge_and_spin(system.charge, system.spin, self.dataset)
        self._templates: dict[tuple[int, bool], AtomicData] = {}
        self._readout: _Readout | None = None
        self._merged: nn.Module | None = None

    @property
    def cutoff(self) -> float:
        backbone = self.module.backbone
        takes_graph = isinstance(backbone, eSCNMDBackbone) and self.system.n_atoms <= backbone.max_neighbors
        # A periodic system, and a model that limits or weighs neighbours, leaves the graph to the model.
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
        with _energies_only(model, own_graph=self.cutoff == inf), _captured(model) as captured:
            output = model(self._data(positions, edges))
        energies = output[self.task.name]
        energies = energies["energy"] if isinstance(energies, dict) else energies
        per_atom = self._per_atom(captured, energies.reshape(-1).double(), positions.shape[1])
        return per_atom * float(self.task.normalizer.rmsd)

    def compilable(self) -> Potential:
        raise ValueError(
            f"compile=True is not available for fairchem models (here {type(self.module).__name__}), whose energies "
            "torch.compile cannot follow in one piece. Set compile=False."
        )

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
        data.__keys__ = set(data.__keys__)  # the model adds entries of its own
        if own_graph:
            data.pos = self._wrapped(positions).reshape(-1, 3)
            return data
        data.pos = positions.reshape(-1, 3)
        # fairchem's vectors point from receiver to sender. The cell of the template is one, so that offsets are in Å.
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

    def _wrapped(self, positions: Tensor) -> Tensor:
        """Positions in the cell, where fairchem's graphs look for them."""
        if not self.system.periodic:
            return positions
        cell = self.system.cell
        images = torch.floor(positions.detach() @ self.system.to_cell.to(positions))
        return positions - images @ cell

    def _per_atom(self, captured: dict[str, Tensor], energies: Tensor, n_atoms: int) -> Tensor:
        """Energies per atom, if a head shows them; else the whole energy on the first atom."""
        per_atom = {
            name: values.reshape(-1)[: len(energies) * n_atoms].double().reshape(len(energies), n_atoms)
            for name, values in captured.items()
        }
        if self._readout is None:
            self._readout = _matching_readout(per_atom, energies)
        if self._readout.name is None:
            return torch.cat([energies[:, None], energies.new_zeros(len(energies), n_atoms - 1)], dim=1)
        return per_atom[self._readout.name] * self._readout.share

    def _merge_experts(self) -> Any:
        """A copy with its experts merged for this system, or None for a model that has none to merge."""
        if getattr(self.module.backbone, "num_experts", 0) == 0 or self.module.backbone.mole_type != "so2":
            return None
        with default_dtype(self.dtype):
            merged = _copy(self.module)
            merged.prepare_for_inference(self._template(1, own_graph=True), InferenceSettings(merge_mole=True))
        return merged.to(self.device, self.dtype).requires_grad_(False).eval()


def energy_task(tasks: Sequence[Task], task_name: str | None = None) -> Task:
    """The task that predicts the energy of a data set.

    Args:
        tasks: All tasks of a model.
        task_name: Name of the data set; may be left out if the model knows only one.

    Raises:
        ValueError: If there is none, or more than one to choose from.
    """
    energies = [task for task in tasks if task.property == "energy"]
    datasets = sorted({dataset for task in energies for dataset in task.datasets})
    if not datasets:
        raise ValueError("the model has no energy task: load it with load_fairchem, or give tasks=.")
    if task_name is None and len(datasets) > 1:
        raise ValueError(f"the model predicts energies for {datasets}: choose one with task_name=.")
    chosen = datasets[0] if task_name is None else task_name
    for task in energies:
        if chosen in task.datasets:
            return task
    raise ValueError(f"task_name={task_name!r} is not a task of the model: choose one of {datasets}.")


def _matching_readout(per_atom: dict[str, Tensor], energies: Tensor) -> _Readout:
    for name, values in per_atom.items():
        for share in (1.0, 1.0 / values.shape[1]):
            if torch.allclose(share * values.sum(dim=1), energies, rtol=1e-4, atol=1e-4):
                return _Readout(name, share)
    return _Readout(None)


def charge_and_spin(charge: int | None, spin: int | None, dataset: str) -> tuple[int, int]:
    """Total charge and spin multiplicity as fairchem wants them: zero where a data set does not care.

    Args:
        charge: In units of e, if known.
        spin: If known.
        dataset: Name of the data set.

    Raises:
        ValueError: If one is not known, and the data set has structures of several.
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
    """Keep the heads from differentiating, which frees the graph that our own derivative needs; put back after."""
    wanted: list[tuple[Any, str, Any]] = []
    configs = set()
    for part in module.modules():
        config = getattr(part, "regress_config", None)
        if config is not None and id(config) not in configs:
            configs.add(id(config))
            wanted += [(config, name, False) for name in ("forces", "stress", "hessian")]
        wanted += [(part, name, False) for name in ("regress_forces", "regress_stress") if hasattr(part, name)]
    if isinstance(module.backbone, eSCNMDBackbone):
        wanted += [(module.backbone, "otf_graph", own_graph), (module.backbone, "always_use_pbc", False)]
    before = [(part, name, getattr(part, name)) for part, name, _ in wanted]
    for part, name, value in wanted:
        setattr(part, name, value)
    try:
        yield
    finally:
        for part, name, value in before:
            setattr(part, name, value)


@contextmanager
def _captured(module: Any) -> Iterator[dict[str, Tensor]]:
    """The energies per atom that pass through the heads, by the name of the layer."""
    found: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, part in module.output_heads.named_modules():
            if name.split(".")[-1] in READOUTS:
                handle = part.register_forward_hook(lambda _, __, output, name=name: found.__setitem__(name, output))
                stack.callback(handle.remove)
        yield found


def _copy(module: nn.Module) -> Any:
    """A deep copy without what a training forward leaves behind: figures, and tensors that cannot be copied."""
    left: dict[int, Any] = {}
    for part in module.modules():
        for name in ("fig", "axs"):
            if hasattr(part, name):
                left[id(getattr(part, name))] = None
        routing = getattr(part, "global_mole_tensors", None)
        if routing is not None and routing.expert_mixing_coefficients is not None:
            left[id(routing.expert_mixing_coefficients)] = None
    return copy.deepcopy(module, left)
