"""SchNetPack models applied to replicas of one system."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stable_plugin.md.neighbors import Edges
from stable_plugin.md.system import System
from stable_plugin.models.base import Potential
from stable_plugin.models.family import not_installed

try:
    from schnetpack import properties
    from schnetpack.atomistic import Atomwise, Forces, Response
    from schnetpack.transform import AddOffsets
    from schnetpack.units import convert_units
except ImportError as error:
    raise not_installed("schnet", "SchNetPack", "schnetpack") from error


class SchNetPotential(Potential):
    """A SchNetPack model applied to replicas of one system.

    Source of the model: Schütt, Sauceda, Kindermans, Tkatchenko and Müller, J. Chem. Phys. 148, 241722 (2018).

    Args:
        module: A ``NeuralNetworkPotential`` whose energy is the sum of atomic ones.
        system: What is simulated.
        energy_unit: Unit of the model's energies, as SchNetPack spells it: ``eV``, ``kcal/mol``, ``Hartree``.
        length_unit: Unit of the model's positions: ``Ang``, ``Bohr``.

    Raises:
        ValueError: If the energy is not a sum of atomic ones with constant offsets, or depends on charge and spin.
    """

    # Any: nn.Module does not declare the attributes of a SchNetPack model.
    module: Any

    def __init__(self, module: Any, system: System, energy_unit: str, length_unit: str = "Ang") -> None:
        super().__init__(module, system)
        self._units = {"energy_unit": energy_unit, "length_unit": length_unit}
        self._energy_eV = float(convert_units(energy_unit, "eV"))
        self._length_A = float(convert_units(length_unit, "Ang"))
        if len(getattr(module.representation, "electronic_embeddings", ())) > 0:
            raise ValueError(
                f"{type(module.representation).__name__} has electronic_embeddings, and energies that depend on charge or spin "
                "are not simulated: use a model without them."
            )
        self._key = energy_key(module)
        self._readout = _readout(module, self._key)
        self._offsets = _offsets(module, self._key)
        self._constants: dict[int, dict[str, Tensor]] = {}

    def settings(self) -> dict[str, Any]:
        return self._units

    @property
    def cutoff(self) -> float:
        return float(self.module.representation.cutoff) * self._length_A

    @property
    def constant_energy(self) -> float:
        if not self.module.do_postprocessing:
            return 0.0
        return self._energy_eV * sum(self._offset(each) for each in self._offsets)

    def atomic_energies(self, positions: Tensor, edges: Edges) -> Tensor:
        sender, receiver = edges.index
        inputs = {
            **self._entries(len(positions)),
            properties.R: positions.reshape(-1, 3) / self._length_A,
            properties.idx_i: sender,
            properties.idx_j: receiver,
            properties.offsets: edges.shifts / self._length_A,
        }
        for part in (*self.module.input_modules, self.module.representation):
            inputs = part(inputs)
        energies: Tensor = self._readout.outnet(inputs["scalar_representation"])
        return self._energy_eV * energies.double().reshape(positions.shape[:2])

    def _offset(self, transform: AddOffsets) -> float:
        """Return what a transform adds to the energy of one replica, in the unit of the model."""
        mean = float(transform.mean) * self.system.n_atoms if transform.add_mean else 0.0
        atoms = float(transform.atomref[self.system.numbers].double().sum()) if transform.add_atomrefs else 0.0
        return mean + atoms

    def _entries(self, n_replicas: int) -> dict[str, Tensor]:
        """Return the part of the inputs that depends on neither positions nor weights."""
        if n_replicas not in self._constants:
            n_atoms = self.system.n_atoms
            replicas = torch.arange(n_replicas, device=self.device)
            self._constants[n_replicas] = {
                properties.Z: self.system.numbers.repeat(n_replicas),
                properties.idx_m: replicas.repeat_interleave(n_atoms),
                properties.n_atoms: torch.full((n_replicas,), n_atoms, device=self.device),
                # Only stresses read it.
                properties.cell: torch.zeros(n_replicas, 3, 3, dtype=self.dtype, device=self.device),
            }
        return self._constants[n_replicas]


def energy_key(module: Any) -> str:
    """Return the name of the energy among the outputs of a model.

    Args:
        module: A ``NeuralNetworkPotential``.
    """
    for part in module.output_modules:
        if isinstance(part, (Forces, Response)):
            return str(part.energy_key)
    keys = [part.output_key for part in module.output_modules if isinstance(part, Atomwise)]
    return str(keys[0]) if len(keys) == 1 else str(properties.energy)


def _readout(module: Any, key: str) -> Any:
    """Return the output module that computes the energy."""
    for part in module.output_modules:
        if isinstance(part, Atomwise) and part.output_key == key and part.aggregation_mode == "sum" and part.n_out == 1:
            return part
    kinds = ", ".join(type(part).__name__ for part in module.output_modules)
    raise ValueError(
        f"the energy {key!r} of the model is not the sum of an Atomwise output (output modules: {kinds}): use a model in which "
        "it is."
    )


def _offsets(module: Any, key: str) -> list[AddOffsets]:
    """Return the transforms that add constants to the energy.

    Args:
        module: A ``NeuralNetworkPotential``.
        key: Name of the energy.

    Raises:
        ValueError: If a transform changes the energy in another way.
    """
    found = []
    for part in module.postprocessors:
        if isinstance(part, AddOffsets) and part._property == key and part.is_extensive:
            found.append(part)
        elif key in (getattr(part, "_property", None), getattr(part, "output_key", None)):
            raise ValueError(
                f"the model changes its energy by the postprocessor {type(part).__name__}, which is not a constant: remove it."
            )
    return found
