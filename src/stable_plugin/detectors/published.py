"""Published criteria of failure by name, with the numbers that their authors used."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import combinations_with_replacement
from typing import Any, Literal, Self

import torch
from torch import Tensor

from stable_plugin.detectors.base import AnyOf, Detector
from stable_plugin.detectors.condensed import ObservableDeviation
from stable_plugin.detectors.geometry import BondDeviation, IntermolecularContact, rows_per_chunk
from stable_plugin.md.cells import optional
from stable_plugin.md.state import kinetic_temperature
from stable_plugin.md.system import System
from stable_plugin.observables.radial import RadialDistribution
from stable_plugin.runtime import checks

Published = Literal["mdsim", "stable", "mlipaudit", "spice"]
"""Names of the published criteria."""

PUBLISHED: tuple[Published, ...] = ("mdsim", "stable", "mlipaudit", "spice")

MAX_DISTANCE_A = 6.0
"""Upper end of the radial distributions in Å, and the width of 500 bins: Fu et al. and Raja et al."""

BIN_WIDTH_A = 0.012

HYDROGEN = 1
OXYGEN = 8


class BondStretch(BondDeviation):
    r"""Largest elongation of a bond since the first frame of the reference, in Å.

    .. math:: v = \max_b \left( r_b - r_b^\mathrm{first} \right)

    Source: Eastman, Pretti and Markland, arXiv:2601.16331, for potentials trained on SPICE and others: 0.5 Å (the
    default).

    Args:
        threshold: In Å.
        discard: In Å, no limit if None.

    Example:
        >>> import torch
        >>> from ase.build import molecule
        >>> from stable_plugin import System
        >>> from stable_plugin.detectors import BondStretch
        >>> water = molecule("H2O")
        >>> positions = torch.tensor(water.positions)[None]
        >>> detector = BondStretch()
        >>> detector.bind(System.from_atoms(water), reference=positions)
        >>> [round(value, 3) for value in detector.measure(0.8 * positions, torch.zeros_like(positions)).tolist()]
        [-0.194]
    """

    def __init__(self, threshold: float = 0.5, discard: float | None = 3.0) -> None:
        super().__init__(threshold, discard)

    def bind(self, system: System, reference: Tensor, cell: Tensor | None = None) -> None:
        super().bind(system, reference[:1], *optional(None if cell is None else cell[:1]))

    def _deviations(self, positions: Tensor, cell: Tensor | None = None) -> Tensor:
        return self._elongations(positions, cell)


class HydrogenDrift(Detector):
    r"""Largest distance of a hydrogen atom to the nearest heavy atom, in Å.

    .. math:: v = \max_{i \in \mathrm{H}} \min_{j \notin \mathrm{H}} r_{ij}

    over the hydrogen atoms that are bonded to a heavy atom, water excepted.

    Source: the stability benchmark of MLIPAudit (version 0.1): 2.5 Å (the default). The benchmark looks at the whole trajectory and
    counts the frame after which the hydrogen atom stays away; here the first frame counts.

    Args:
        threshold: In Å.
        discard: In Å, no limit if None.

    Example:
        >>> import torch
        >>> from ase.build import molecule
        >>> from stable_plugin import System
        >>> from stable_plugin.detectors import HydrogenDrift
        >>> methane = molecule("CH4")
        >>> positions = torch.tensor(methane.positions)[None]
        >>> detector = HydrogenDrift()
        >>> detector.bind(System.from_atoms(methane), reference=positions)
        >>> moved = positions.clone()
        >>> moved[0, 1] *= 3.0
        >>> [round(value, 2) for value in detector.measure(moved, torch.zeros_like(moved)).tolist()]
        [3.27]
    """

    unit = "Å"

    def __init__(self, threshold: float = 2.5, discard: float | None = None) -> None:
        super().__init__(checks.number("threshold", threshold, above=0), discard)
        self._system: System | None = None

    def applies(self, system: System) -> bool:
        """Return whether a hydrogen atom is bonded to a heavy atom outside water."""
        return len(_bonded_hydrogens(system)) > 0

    def bind(self, system: System, reference: Tensor, cell: Tensor | None = None) -> None:
        self._hydrogens = _bonded_hydrogens(system).to(system.bonds.device)
        if len(self._hydrogens) == 0:
            raise ValueError(f"{self!r} finds no hydrogen atom that is bonded to a heavy atom: use another detector.")
        self._heavy = (system.numbers != HYDROGEN).nonzero().squeeze(1)
        self._system = system

    def measure(self, positions: Tensor, velocities: Tensor, cell: Tensor | None = None) -> Tensor:
        return self._nearest(positions, cell).amax(dim=-1)

    def offending_atoms(
        self, positions: Tensor, velocities: Tensor, cell: Tensor | None = None
    ) -> list[tuple[int, ...]]:
        """Return the hydrogen atom that is furthest from all heavy atoms."""
        worst = torch.nan_to_num(self._nearest(positions, cell), nan=torch.inf).argmax(dim=-1)
        return [(int(atom),) for atom in self._hydrogens[worst]]

    def _nearest(self, positions: Tensor, cell: Tensor | None) -> Tensor:
        """Return the distance of each hydrogen atom to the nearest heavy atom, (n_replicas, n_hydrogens)."""
        if self._system is None:
            raise RuntimeError("HydrogenDrift has no system yet: call bind(system, reference) first.")
        system, n_heavy = self._system, len(self._heavy)
        parts = []
        for some in self._hydrogens.split(rows_per_chunk(len(positions) * n_heavy)):
            pairs = torch.stack([some.repeat_interleave(n_heavy), self._heavy.repeat(len(some))], dim=1)
            distances = system.distances(positions, pairs, cell)
            parts.append(distances.unflatten(-1, (len(some), n_heavy)).amin(dim=-1))
        return torch.cat(parts, dim=-1)


class TemperatureExplosion(Detector):
    r"""Kinetic temperature far above that of the thermostat, or that multiplies between two looks.

    .. math:: v = \max \left( \frac{T(t)}{T_0 + 10\,000\,\mathrm{K}}, \frac{T(t)}{100 \, T(t - \Delta t)} \right), \qquad
        \text{threshold} = 1

    with the temperature T₀ of the thermostat and a look every ``interval_fs``. Stateful: the last temperature is cleared
    when a simulation starts.

    Source: the stability benchmark of MLIPAudit (version 0.1), which looks every 100 steps of 1 fs.

    Args:
        temperature_K: Temperature of the thermostat in K.
        interval_fs: Time Δt between two looks in fs, rounded to checks of the simulator.

    Example:
        >>> import torch
        >>> from ase.build import molecule
        >>> from stable_plugin import System
        >>> from stable_plugin.detectors import TemperatureExplosion
        >>> water = molecule("H2O")
        >>> positions = torch.tensor(water.positions)[None]
        >>> detector = TemperatureExplosion(temperature_K=300.0)
        >>> detector.bind(System.from_atoms(water), reference=positions)
        >>> detector.set_check_interval(100.0)
        >>> [detector.classify(positions, speed * torch.ones_like(positions))[0].item() for speed in (0.01, 0.05, 0.6)]
        [False, False, True]
    """

    capturable = False

    def __init__(self, temperature_K: float, interval_fs: float = 100.0) -> None:
        super().__init__(threshold=1.0)
        self.temperature_K = checks.number("temperature_K", temperature_K, above=0)
        self.interval_fs = checks.number("interval_fs", interval_fs, above=0)
        self._checks_per_look = 1
        self._n_checks = 0
        self._last: Tensor | None = None
        self._value: Tensor | None = None
        self._masses: Tensor | None = None
        self._freedom: int | None = None

    def bind(self, system: System, reference: Tensor, cell: Tensor | None = None) -> None:
        self._masses, self._freedom = system.masses, 3 * system.n_moving
        self.reset(0)

    def set_degrees_of_freedom(self, number: int) -> None:
        self._freedom = number

    def heated(self, ratio: float) -> Self:
        hotter = copy.copy(self)
        hotter.temperature_K = ratio * self.temperature_K
        return hotter

    def set_check_interval(self, interval_fs: float) -> None:
        self._checks_per_look = max(1, round(self.interval_fs / interval_fs))

    def reset(self, n_replicas: int) -> None:
        self._last = self._value = None
        self._n_checks = 0

    def state_dict(self) -> Any:
        return {"last": self._last, "value": self._value, "n_checks": self._n_checks}

    def load_state_dict(self, state: Any) -> None:
        self._last, self._value, self._n_checks = state["last"], state["value"], state["n_checks"]

    def measure(self, positions: Tensor, velocities: Tensor, cell: Tensor | None = None) -> Tensor:
        """Look at the temperatures if it is time, and return the value of the last look, (n_replicas,)."""
        if self._masses is None:
            raise RuntimeError("TemperatureExplosion has no masses yet: call bind(system, reference) first.")
        self._n_checks += 1
        if self._n_checks % self._checks_per_look == 0:
            found = kinetic_temperature(velocities, self._masses.to(velocities), self._freedom)
            self._value = found / (self.temperature_K + 10_000.0)
            if self._last is not None:
                # Replicas at rest stay at rest: 0 is not more than 100 times 0.
                before = self._last.clamp_min(torch.finfo(found.dtype).tiny)
                self._value = torch.maximum(self._value, found / (100.0 * before))
            self._last = found
        nothing = 0.0 * velocities.sum(dim=(-1, -2))
        return nothing if self._value is None else self._value + nothing

    def check_reference(self, frames: Tensor, name: str = "reference", cell: Tensor | None = None) -> None:
        """Accept all frames, as they have no velocities."""


class PublishedRadialDistribution(RadialDistribution):
    """Radial distribution function as Fu et al. and Raja et al. compute it.

    A plain histogram of 500 bins up to 6 Å, with all pairs of the elements, within molecules too. The density counts an atom as its
    own neighbor, so that pairs of like atoms are (N - 1) / N of the usual g(r).

    Args:
        pair: Two elements; all atoms if None.
    """

    def __init__(self, pair: tuple[str, str] | None = None) -> None:
        super().__init__(pair, r_max=MAX_DISTANCE_A, bin_width=BIN_WIDTH_A, smearing=0.0)
        self._scale = 1.0

    def bind(self, system: System, reference: Tensor, cell: Tensor | None = None) -> None:
        if self.pair is None or self.pair[0] == self.pair[1]:
            n_atoms = system.n_atoms if self.pair is None else system.symbols.count(self.pair[0])
            self._scale = (n_atoms - 1) / n_atoms
        super().bind(system, reference, cell)

    def per_frame(self, positions: Tensor, cell: Tensor | None = None) -> Tensor:
        values: Tensor = super().per_frame(positions, cell)
        return values * float(self._scale)


def check_name(name: str) -> Published:
    """Return the name of a published criterion, if it is one.

    Args:
        name: Name to check.

    Raises:
        ValueError: If it is not one.
    """
    for known in PUBLISHED:
        if name == known:
            return known
    raise ValueError(
        f"detector={name!r} is not a published criterion: pass one of {', '.join(PUBLISHED)}, or a Detector."
    )


def published_detector(name: str, system: System, temperature_K: float, *, training: bool = False) -> Detector:
    """Return a published criterion for a system.

    Args:
        name: ``"mdsim"``, ``"stable"``, ``"mlipaudit"`` or ``"spice"``.
        system: The system that is simulated.
        temperature_K: Temperature of the simulation in K.
        training: Whether the detector is for training, for which Raja et al. use tighter limits.

    Raises:
        ValueError: If there is no such criterion, or it was not published for such a system.
    """
    makers: dict[Published, Callable[[], Detector | None]] = {
        "mdsim": lambda: _mdsim(system),
        "stable": lambda: _stable(system, training),
        "mlipaudit": lambda: _mlipaudit(system, temperature_K),
        "spice": lambda: BondStretch(0.5) if len(system.bonds) > 0 else None,
    }
    detector = makers[check_name(name)]()
    if detector is None:
        raise ValueError(
            f"detector={name!r} was not published for a system like {system!r}: pass None for limits from the reference, "
            "or a Detector."
        )
    return detector


def _mdsim(system: System) -> Detector | None:
    """Return the criterion of Fu et al.: molecules, water, and a crystal (LiPS) with all its atoms alike."""
    if _is_molecule(system):
        return BondDeviation(0.5)
    if _is_water(system):
        return _radial_errors(system, interval_fs=100.0, n_samples=10, overlapping=True)
    if all(system.pbc) and len(system.bonds) == 0:
        return _deviation(None, 1.0, interval_fs=12.5, n_samples=80, overlapping=True)
    return None


def _stable(system: System, training: bool) -> Detector | None:
    """Return the criterion of Raja et al.: molecules and water."""
    if _is_molecule(system):
        return BondDeviation(0.25 if training else 0.5)
    if not _is_water(system):
        return None
    if training:
        return IntermolecularContact(1.2)
    return _radial_errors(system, interval_fs=1000.0, n_samples=10, overlapping=False)


def _mlipaudit(system: System, temperature_K: float) -> Detector:
    drift = HydrogenDrift()
    return AnyOf([TemperatureExplosion(temperature_K), *([drift] if drift.applies(system) else [])])


def _radial_errors(system: System, interval_fs: float, n_samples: int, overlapping: bool) -> Detector:
    """Return a detector of the worst pair of elements: 3.0 is exceeded by r_max times the mean error of g(r)."""
    pairs = combinations_with_replacement(sorted(set(system.symbols)), 2)
    return AnyOf([_deviation(pair, 3.0, interval_fs, n_samples, overlapping) for pair in pairs])


def _deviation(
    pair: tuple[str, str] | None, threshold: float, interval_fs: float, n_samples: int, overlapping: bool
) -> ObservableDeviation:
    return ObservableDeviation(
        PublishedRadialDistribution(pair),
        threshold,
        n_samples,
        min_samples=n_samples,
        norm="integral",
        interval_fs=interval_fs,
        overlapping=overlapping,
    )


def _is_molecule(system: System) -> bool:
    return not system.is_extended and len(system.bonds) > 0 and int(system.molecules.max()) == 0


def _is_water(system: System) -> bool:
    return all(system.pbc) and not system.is_extended and all(_water_atoms(system).tolist())


def _water_atoms(system: System) -> Tensor:
    """Return whether each atom belongs to a water molecule, (n_atoms,)."""
    belongs = torch.zeros(system.n_atoms, dtype=torch.bool)
    numbers = system.numbers.tolist()
    for part in system.parts:
        if part.kind == "molecule" and sorted(numbers[atom] for atom in part.atoms) == [HYDROGEN, HYDROGEN, OXYGEN]:
            belongs[list(part.atoms)] = True
    return belongs


def _bonded_hydrogens(system: System) -> Tensor:
    """Return the hydrogen atoms with a bond to a heavy atom, without those of water, (n_hydrogens,)."""
    bonds, is_hydrogen = system.bonds.cpu(), system.numbers.cpu() == HYDROGEN
    mixed = bonds[is_hydrogen[bonds].sum(dim=1) == 1].flatten().unique()
    found: Tensor = mixed[is_hydrogen[mixed] & ~_water_atoms(system)[mixed]]
    return found
