"""SchNetPack's model files: load and save."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import nn

from stable_plugin.md.system import System
from stable_plugin.models.base import save_new
from stable_plugin.models.schnet.potential import SchNetPotential

# After stable_plugin.models.schnet.potential, whose error says what to install if schnetpack is missing.
from schnetpack.utils import load_model  # isort: skip


class SchNetModel(nn.Module):
    """A SchNetPack model with the units of its energies and lengths, which its files do not contain.

    Args:
        network: A ``NeuralNetworkPotential``.
        energy_unit: Unit of its energies, as SchNetPack spells it: ``eV``, ``kcal/mol``, ``Hartree``.
        length_unit: Unit of its positions: ``Ang``, ``Bohr``.
    """

    def __init__(self, network: nn.Module, energy_unit: str, length_unit: str = "Ang") -> None:
        super().__init__()
        self.network = network
        self.energy_unit = energy_unit
        self.length_unit = length_unit

    def extra_repr(self) -> str:
        """Return the arguments for ``repr``."""
        return f"energy_unit={self.energy_unit!r}, length_unit={self.length_unit!r}"

    def forward(self, inputs: Any) -> Any:
        """Return the output of the network."""
        return self.network(inputs)

    def stable_potential(self, system: System) -> SchNetPotential:
        """Return the potential that simulates ``system``."""
        return SchNetPotential(self.network, system, self.energy_unit, self.length_unit)


def load_schnet(
    source: str | Path, device: str = "cpu", energy_unit: str | None = None, length_unit: str = "Ang"
) -> SchNetModel:
    """Load a model file of SchNetPack, such as ``best_model``.

    Such a file is a pickle: loading one runs code that it contains. Load files you trust.

    Args:
        source: Path of the file.
        device: Device of the loaded model.
        energy_unit: Unit of its energies, as SchNetPack spells it: ``eV``, ``kcal/mol``, ``Hartree``.
        length_unit: Unit of its positions: ``Ang``, ``Bohr``.

    Returns:
        The model.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a SchNetPack model, or the unit is not passed.
    """
    if energy_unit is None:
        raise ValueError(
            "energy_unit=None: files of SchNetPack do not say in which unit their energies are: pass energy_unit='eV' or "
            "'kcal/mol', whichever the model was trained in."
        )
    if not Path(source).is_file():
        raise FileNotFoundError(f"model={str(source)!r} is not a file: pass an existing file of SchNetPack.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            network = load_model(str(source), device=device)
        network.output_modules  # noqa: B018
    except Exception as error:  # unpickling runs code of the file, which can raise anything
        raise ValueError(
            f"{source} cannot be read as a SchNetPack model ({type(error).__name__}: {error}): pass a file that spktrain writes."
        ) from error
    return SchNetModel(network, energy_unit, length_unit)


def save_schnet(model: SchNetModel, path: str | Path) -> None:
    """Write a model file that SchNetPack's own tools open.

    The file appears complete or not at all.

    Args:
        model: The model.
        path: A path that does not exist yet.

    Raises:
        FileExistsError: If there is a file already.
    """
    save_new(model.network, path)
