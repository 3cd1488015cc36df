"""Observables of the energy: heat of vaporization and heat capacity."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from ase import units
from torch import Tensor

from stable_plugin.md.cells import optional
from stable_plugin.md.centers import MolecularCenters
from stable_plugin.md.system import System
from stable_plugin.observables.gas_phase import GasPhase, PureLiquid
from stable_plugin.observables.potential import PotentialObservable
from stable_plugin.runtime import checks
from stable_plugin.units import BOLTZMANN

if TYPE_CHECKING:
    from stable_plugin.models.base import Potential

KJ_PER_MOL = units.kJ / units.mol
"""In eV."""


class HeatOfVaporization(PotentialObservable):
    r"""Heat of vaporization of a liquid of one substance, in kJ/mol.

    .. math:: \Delta H = \langle U \rangle_\mathrm{gas} - \frac{1}{N} \langle U \rangle_\mathrm{liquid} + k_B T

    The gas is ideal, and the volume of the liquid is neglected. Nuclei are classical: compare with an experimental value
    from which the quantum corrections have been removed, where they matter.

    The mean energy of the gas is that of one molecule, which is simulated when it is first needed, for 1 ps, and again
    when the potential has changed too much for its frames to be reweighted. Its response to the parameters is part of the
    gradient.

    Source: Wang, Martinez and Pande, J. Phys. Chem. Lett. 5, 1885 (2014), with the gradients of liquid and gas.

    Input of ``update``: ``positions``, (n_frames, n_atoms, 3) in Å, wrapped or not.

    Output of ``compute``: (1,) in kJ/mol.

    Args:
        target_kJ_per_mol: Heat of vaporization to reproduce in kJ/mol; 44.0 for water at 298 K.
        n_replicas: Molecules of the gas that are simulated at once.
        timestep_fs: Timestep of this simulation in fs.
        seed: Seed of its random numbers.
        kwargs: ``scale`` in kJ/mol, and arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If an argument is out of range, or the system is no liquid of one kind of neutral molecules.

    Example:
        >>> from stable_plugin import HeatOfVaporization, StABlECallback
        >>> callback = StABlECallback(objective="both", observables=[HeatOfVaporization(44.0, scale=1.0)])
    """

    def __init__(
        self,
        target_kJ_per_mol: float,
        n_replicas: int = 32,
        timestep_fs: float = 0.5,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        self.target_kJ_per_mol = checks.number("target_kJ_per_mol", target_kJ_per_mol)
        self.n_replicas = checks.count("n_replicas", n_replicas, at_least=2)
        self.timestep_fs = checks.number("timestep_fs", timestep_fs, above=0)
        self.seed = checks.seed(seed)
        super().__init__([self.target_kJ_per_mol], **kwargs)

    def bind(self, system: System, reference: Tensor, cell: Tensor | None = None) -> None:
        system.require_periodic(
            "HeatOfVaporization needs a liquid", "set cell and pbc of the frames, or leave HeatOfVaporization out"
        )
        super().bind(system, reference, cell)
        self._liquid = PureLiquid(system)
        found = self._liquid.separate(reference, cell)
        self._starts = found[torch.linspace(0, len(found) - 1, self.n_replicas).round().long()]

    def attach(self, potential: Potential, temperature_K: float, chunk: int = 32) -> None:
        super().attach(potential, temperature_K, chunk)
        self._gas = GasPhase(potential, self._liquid, self._starts, temperature_K, self.timestep_fs, self.seed)

    def of_frames(self, positions: Tensor, cell: Tensor | None = None) -> Tensor:
        liquid = _energies(self.potential, positions, cell) / self._liquid.number
        kT = BOLTZMANN * self._temperature_K
        return ((self._gas.mean_energy() - liquid + kT) / KJ_PER_MOL)[:, None]

    def standard_error(self) -> Tensor:
        return torch.hypot(super().standard_error(), self.total.new_tensor(self._gas.standard_error() / KJ_PER_MOL))

    def axis(self) -> dict[str, Any]:
        return {"kind": "bars", "x": ["ΔH"], "xlabel": "", "ylabel": "heat of vaporization / kJ/mol"}


class HeatCapacity(PotentialObservable):
    r"""Heat capacity at constant volume, from the fluctuation of the energy, in J/(mol K).

    .. math:: C_V = \frac{1}{n} \left( \frac{\langle U^2 \rangle - \langle U \rangle^2}{k_B T^2} + \frac{3}{2} N k_B \right)

    n is the number of molecules, or that of atoms in a framework; N that of atoms that move. Nuclei are
    classical: a stiff bond has the heat capacity of a soft one, unlike in an experiment.

    A variance needs frames that have forgotten where they started; in short windows it is too small.

    Source: Allen and Tildesley, Computer Simulation of Liquids, 2nd ed. (2017), section 2.5.

    Input of ``update``: ``positions``, (n_frames, n_atoms, 3) in Å, wrapped or not.

    Output of ``compute``: (1,) in J/(mol K).

    Args:
        target_J_per_mol_K: Heat capacity to reproduce in J/(mol K).
        kwargs: ``scale`` in J/(mol K), and arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If an argument is not a positive number.

    Example:
        >>> import torch
        >>> from ase.build import bulk
        >>> from ase.calculators.emt import EMT
        >>> from stable_plugin import HeatCapacity, System
        >>> from stable_plugin.models import find_potential
        >>> copper = bulk("Cu", cubic=True)
        >>> frames = torch.tensor(copper.positions).repeat(2, 1, 1)  # no fluctuation, so 3/2 R of the kinetic energy is left
        >>> capacity = HeatCapacity(target_J_per_mol_K=24.4)
        >>> capacity.bind(System.from_atoms(copper), frames)
        >>> capacity.attach(find_potential(EMT(), capacity.system), temperature_K=300.0)
        >>> capacity.update(frames)
        >>> round(capacity.compute().item(), 2)
        12.47
    """

    products: Tensor

    def __init__(self, target_J_per_mol_K: float, **kwargs: Any) -> None:
        self.target_J_per_mol_K = checks.number("target_J_per_mol_K", target_J_per_mol_K, above=0)
        super().__init__([self.target_J_per_mol_K], **kwargs)
        # Products of the block means of U and U², weighted by the frames of each block.
        self.add_state("products", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self._zero: float | None = None

    def bind(self, system: System, reference: Tensor, cell: Tensor | None = None) -> None:
        super().bind(system, reference, cell)
        self._n_molecules = MolecularCenters(system).number
        self._first_frame = reference[:1], None if cell is None else cell[:1]

    def attach(self, potential: Potential, temperature_K: float, chunk: int = 32) -> None:
        super().attach(potential, temperature_K, chunk)
        self._zero = None

    @property
    def n_means(self) -> int:
        return 2

    def of_frames(self, positions: Tensor, cell: Tensor | None = None) -> Tensor:
        energies = _energies(self.potential, positions, cell)
        if self._zero is None:
            # A variance is the difference of squares, and loses digits where the mean is far from zero. The same frame in
            # all processes that train together.
            frame, own_cell = self._first_frame
            self._zero = float(_energies(self.potential, frame.to(positions), own_cell))
        return torch.stack([energies - self._zero, (energies - self._zero).square()], dim=1)

    def of_means(self, means: Tensor) -> Tensor:
        variance = means[1] - means[0].square()
        kinetic = 1.5 * self.system.n_moving * BOLTZMANN
        per_molecule = (variance / (BOLTZMANN * self._temperature_K**2) + kinetic) / self._n_molecules
        return 1000.0 * per_molecule[None] / KJ_PER_MOL

    def _add_block(self, total: Tensor, n_frames: int) -> None:
        super()._add_block(total, n_frames)
        self.products = self.products + total.prod() / n_frames

    def standard_error(self) -> Tensor:
        means = (self.total / self.count).requires_grad_(True)
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(self.of_means(means).sum(), means)
        spread = self.squares / self.count - means.detach().square()
        together = self.products / self.count - means.detach().prod()
        variance = (slope.square() * spread).sum() + 2.0 * slope.prod() * together
        return (
            (variance.clamp_min(0.0) / (self.blocks - 1)).sqrt()[None]
            if self.blocks > 1
            else means.new_full((1,), torch.nan)
        )

    def axis(self) -> dict[str, Any]:
        return {"kind": "bars", "x": ["Cv"], "xlabel": "", "ylabel": "heat capacity / J/(mol K)"}


def _energies(potential: Potential, positions: Tensor, cell: Tensor | None) -> Tensor:
    return potential.energies(positions, potential.edges(positions, *optional(cell))).double()
