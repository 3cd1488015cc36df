r"""The failure margin: a loss that raises the energies of frames near failures.

A frame in which a bond, an angle or a contact is far outside of its thermal range must have an energy well above that of
reference frames. How far above follows from the fluctuations of the reference, so no label is needed. The loss is
one-sided: a frame that is high enough exerts no pull, and frames of failures that have been repaired stay constraints.

.. math::

    u(x) = \max_d \frac{v_d(x) - \langle v_d \rangle_\mathrm{ref}}{t_d - \langle v_d \rangle_\mathrm{ref}}, \qquad
    m(x) = \min(c\,u^2, m_\mathrm{max}), \qquad
    L = \frac{1}{N} \sum_i h\!\left(m(x_i) - \frac{U(x_i) - \langle U \rangle_\mathrm{ref}}{kT}\right)

with the value v and the threshold t of each detector d, and Huber's function h of the positive part. Where there are several
molecules, each failure i in a frame has its own u, m, and energy U, that of the molecules that fail.

=============================================  ====================================================
Equation                                       Code
=============================================  ====================================================
u, severity                                    :meth:`FailureMargin.severity`
m, margin in kT                                :func:`margin_kT`
x_i, frames near failures                      :meth:`FailureMargin.near_failures`
U over the atoms that fail                     ``NearFailures.atoms``
h, Huber's function                            :func:`one_sided_huber`
∇θ L = ∇θ Σ_ia w_ia U_a(x_i)                   :meth:`FailureMargin.estimate`, one backward pass
=============================================  ====================================================

A harmonic coordinate at its limit, z standard deviations off, has an energy of z²/2 kT; the limits of the default
detectors are at z ≈ 6, and ``c`` asks for two thirds of that energy: the rest of the molecule may be below its mean, and
bonds are softer than harmonic. The margin of frames from a hotter window has the energy of the additional thermal motion
added to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stable_plugin.algorithm.estimator import BoltzmannEstimator, Estimate, SurrogateTerm
from stable_plugin.algorithm.frame_buffer import NearFailures
from stable_plugin.detectors import Detector
from stable_plugin.md.cells import optional
from stable_plugin.md.internal_coordinates import equivalent_atoms
from stable_plugin.md.system import System
from stable_plugin.units import BOLTZMANN

MARGIN_AT_THRESHOLD_KT = 12.0
"""The constant c: margin of a frame at the threshold of a detector."""

MAX_MARGIN_KT = 16.0
"""With this energy, a state has a probability of 6e-6; more would only distort the potential."""

MIN_SEVERITY = 0.5
"""Frames below this severity are thermal."""

DENSE_SEVERITY = 0.7
"""Frames above this severity are kept as often as the detector looks: a bond breaks within 10 fs."""

MAX_SEVERITY = 4.0
"""Frames above this severity are fragments, and what holds them together no longer matters."""

HUBER_KT = 3.0
"""Shortfall in kT up to which the loss is quadratic."""

LEVEL_FRAMES = 64
"""Frames whose mean energy tells how much thermal energy a hotter window has."""

FRAMEWORK_RADIUS_A = 4.0
"""Distance from the failing atoms up to which the energies of a framework count."""


def margin_kT(severity: Tensor) -> Tensor:
    """Return the smallest energy above the reference of frames of a severity, in kT, with the shape of the severity."""
    return (MARGIN_AT_THRESHOLD_KT * severity.square()).clamp_max(MAX_MARGIN_KT)


def one_sided_huber(shortfall: Tensor) -> Tensor:
    """Return the loss of shortfalls in kT: zero below zero, quadratic up to :data:`HUBER_KT`, then linear.

    Source: P. J. Huber, Ann. Math. Statist. 35, 73 (1964).
    """
    positive = shortfall.clamp_min(0.0)
    return torch.where(positive < HUBER_KT, positive.square() / (2.0 * HUBER_KT), positive - HUBER_KT / 2.0)


class FailureMargin:
    """Finds frames near failures, and estimates the gradient of the margin loss on them.

    In a system of several molecules, the energies of the molecules that fail count alone, because the thermal noise of all
    others would drown them; in a framework, those of the surroundings of the atoms that fail.

    Args:
        estimator: Computes energies and gradients of the potential in training.
        detector: Detector of unstable replicas, bound to the system.
        reference: Reference frames, (n_frames, n_atoms, 3) in Å.
        cell: Cells of these frames, (n_frames, 3, 3) in Å; that of the system if None.
        n_reference: Reference frames, drawn anew for each estimate, whose mean energy is the zero of the margin.

    Raises:
        ValueError: If no part of the detector has failures that cost energy.
    """

    def __init__(
        self,
        estimator: BoltzmannEstimator,
        detector: Detector,
        reference: Tensor,
        cell: Tensor | None = None,
        n_reference: int = 32,
    ) -> None:
        self.estimator = estimator
        self.context = estimator.context
        self.detectors = [each for each in detector.parts if each.supports_margin]
        if not self.detectors:
            raise ValueError(
                f"detector={detector!r} has no part whose failures cost energy, such as BondLimits, AngleLimits or "
                "ContactLimits: pass one of them, None for the default, or set objective='boltzmann'."
            )
        self._reference, self._reference_cell, self._n_reference = reference, cell, n_reference
        self._typical = [self._values(each, reference, cell).mean() for each in self.detectors]
        self._molecules = _Molecules(estimator.potential.system)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(str, self.detectors))})"

    def severity(self, positions: Tensor, cell: Tensor | None = None) -> Tensor:
        """Return how near to a failure frames are, (n_frames,).

        The severity is zero at the mean value of the reference, and one at the threshold.

        Args:
            positions: (n_frames, n_atoms, 3) in Å.
            cell: Cells of the frames, (n_frames, 3, 3) in Å; that of the system if None.
        """
        return torch.stack([self._severity_by(number, positions, cell) for number in range(len(self.detectors))]).amax(
            0
        )

    def near_failures(
        self, positions: Tensor, valid: Tensor, stride: int, cell: Tensor | None = None, heating: float = 1.0
    ) -> NearFailures:
        """Return the frames of a window that are near a failure or beyond it.

        Args:
            positions: Frames, (n_times, n_replicas, n_atoms, 3) in Å.
            valid: Which of them are usable, (n_times, n_replicas).
            stride: Every how many frames those below :data:`DENSE_SEVERITY` are taken, too.
            cell: Cells of the frames, (n_times, n_replicas, 3, 3) in Å; that of the system if None.
            heating: Temperature of the window over that of the reference. The margin of frames of a hotter window is larger
                by what the frames that are not near failures have more energy than the reference.
        """
        sparse = torch.zeros(len(positions), 1, dtype=torch.bool, device=positions.device)
        sparse[stride - 1 :: stride] = True
        frames, sparse = positions[valid], sparse.expand_as(valid)[valid]
        cells = None if cell is None else cell[valid]
        worst = self.severity(frames, cells)
        kept = (worst > DENSE_SEVERITY) | (sparse & (worst > MIN_SEVERITY))
        kept = kept & (worst < MAX_SEVERITY)
        near, near_cells = frames[kept], None if cells is None else cells[kept]
        frame, severity, atoms = self._failures(near, worst[kept], near_cells)
        margin = margin_kT(severity)
        if heating > 1.0:
            margin = margin + self._thermal_kT(atoms, self._energy_gain(frames, worst, cells), heating)
        return NearFailures(near, frame, margin, atoms, near_cells)

    def estimate(self, frames: NearFailures | None, generator: torch.Generator) -> tuple[Estimate, Tensor]:
        """Return the loss of frames with its gradient, and how far each falls short of its margins, (n_frames,) in kT.

        Every process calls this, also one without frames.

        Args:
            frames: Frames of this process.
            generator: Random stream that draws reference frames.
        """
        reference, cell = self._draw_reference(generator)
        frames = self._none(reference) if frames is None else frames.to(reference.device)
        levels = self._molecules.mean(self.estimator.atomic_energies(reference, cell))
        energies = self.estimator.atomic_energies(frames.positions, frames.cell)
        atoms = frames.atoms.to(energies)
        kT = BOLTZMANN * self.estimator.temperature_K
        above = (atoms * (energies - levels)[frames.frame]).sum(dim=1) / kT
        shortfall = (frames.margin.to(energies) - above).requires_grad_(True)
        n_all = max(self.context.count(len(frames.margin), energies.device), 1)
        with torch.enable_grad():
            loss = one_sided_huber(shortfall).sum() / n_all
        (upstream,) = torch.autograd.grad(loss, shortfall)
        raised = frames.sums(-upstream[:, None] * atoms / kT)
        short = frames.sums(upstream) > 0.0
        raised = raised[short]
        # The mean of the reference is lowered by as much as the frames are raised.
        lowered = -self._molecules.mean(raised.sum(dim=0, keepdim=True)).expand(len(reference), -1) / len(reference)
        weights = torch.cat([raised, lowered])
        gradients = self.estimator.combine(
            torch.cat([frames.positions[short].to(reference), reference]),
            [SurrogateTerm(0.0, weights.new_empty(0), weights, 1.0)],
            self._joined_cells(frames.select(short), cell, len(reference)),
        ).gradients
        estimate = Estimate(float(self.context.sum(loss.detach())), weights.new_empty(0), gradients, 1.0)
        return estimate, frames.sums(shortfall.detach().clamp_min(0.0))

    def _failures(self, frames: Tensor, worst: Tensor, cell: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the failures in frames of a severity, as numbers of frames, severities, and atoms that count in each."""
        if self._molecules.is_one_molecule or len(frames) == 0:
            everything = torch.ones(frames.shape[:2], dtype=torch.bool, device=frames.device)
            return torch.arange(len(frames), device=frames.device), worst, everything
        by_molecule = self._severity_by_molecule(frames, cell)
        frame, molecule = (by_molecule > MIN_SEVERITY).nonzero(as_tuple=True)
        found = [(frame, by_molecule[frame, molecule], self._molecules.members(molecule))]
        for number, detector in enumerate(self.detectors):
            if detector.by_coordinate(frames[:1], *optional(None if cell is None else cell[:1])) is not None:
                continue
            severity = self._severity_by(number, frames, cell)
            (frame,) = (severity > MIN_SEVERITY).nonzero(as_tuple=True)
            own, cells = frames[frame], None if cell is None else cell[frame]
            if len(own):
                failing = detector.offending_atoms(own, torch.zeros_like(own), *optional(cells))
                found.append((frame, severity[frame], self._molecules.around(own, failing, cells)))
        frame, severity, atoms = (torch.cat(parts) for parts in zip(*found, strict=True))
        return frame, severity, atoms

    def _severity_by_molecule(self, frames: Tensor, cell: Tensor | None) -> Tensor:
        """Return the severities of molecules by their own coordinates, (n_frames, n_molecules)."""
        worst = frames.new_full((len(frames), self._molecules.n_molecules), -torch.inf, dtype=torch.float64)
        for detector, typical in zip(self.detectors, self._typical, strict=True):
            found = detector.by_coordinate(frames, *optional(cell))
            if found is not None:
                values, atoms = found
                severity = _severity(values.double(), typical, detector.threshold)
                molecule = self._molecules.labels[atoms[:, 0]].expand(len(frames), -1)
                worst = worst.scatter_reduce(1, molecule, severity, "amax")
        return worst

    def _severity_by(self, number: int, positions: Tensor, cell: Tensor | None) -> Tensor:
        """Return the severities of frames by one of the detectors, (n_frames,)."""
        detector = self.detectors[number]
        return _severity(self._values(detector, positions, cell), self._typical[number], detector.threshold)

    def _energy_gain(self, frames: Tensor, worst: Tensor, cell: Tensor | None) -> Tensor:
        """Return the energy of atoms that are not near a failure, less that in the reference, (n_atoms,) in eV; zero without any."""
        calm = (worst < MIN_SEVERITY)[:, None].expand(frames.shape[:2])
        if not self._molecules.is_one_molecule:
            by_molecule = self._severity_by_molecule(frames, cell)[:, self._molecules.labels]
            calm = torch.where(self._molecules.framework, calm, by_molecule < MIN_SEVERITY)
        hot, cold = (_evenly(each) for each in (calm.any(dim=1), self._reference.new_ones(len(self._reference)) > 0))
        cells = None if self._reference_cell is None else self._reference_cell[cold]
        before = self._molecules.mean(self.estimator.atomic_energies(self._reference[cold], cells))
        energies = self.estimator.atomic_energies(frames[hot], None if cell is None else cell[hot])
        return self._molecules.mean(energies - before, calm[hot])

    def _thermal_kT(self, atoms: Tensor, gain: Tensor, heating: float) -> Tensor:
        """Return the energy of additional thermal motion, (n_failures,) in units of kT, from zero to that of equipartition.

        It is measured, as replicas that have just been heated have not reached equipartition.
        """
        fixed = self.estimator.potential.system.fixed
        if fixed is not None:
            n_modes = 3 * (atoms & ~fixed).sum(dim=1)
        else:
            n_modes = 3 * atoms.sum(dim=1) - (6 if self._molecules.is_one_molecule else 0)
        most = 0.5 * (heating - 1.0) * n_modes.clamp_min(0).to(gain)
        measured = (atoms.to(gain) * gain).sum(dim=1) / (BOLTZMANN * self.estimator.temperature_K)
        return measured.clamp_min(0.0).minimum(most)

    def _draw_reference(self, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        drawn = torch.randperm(len(self._reference), generator=generator)[: self._n_reference]
        return self._reference[drawn], None if self._reference_cell is None else self._reference_cell[drawn]

    def _joined_cells(self, frames: NearFailures, cell: Tensor | None, n_reference: int) -> Tensor | None:
        """Return the cells of frames and of the reference, or None if all are that of the system."""
        if cell is None and frames.cell is None:
            return None
        own = self.estimator.potential.system.cell
        frame_cells = own.expand(len(frames), 3, 3) if frames.cell is None else frames.cell.to(own)
        return torch.cat([frame_cells, own.expand(n_reference, 3, 3) if cell is None else cell.to(own)])

    def _none(self, reference: Tensor) -> NearFailures:
        empty = reference[:0]
        return NearFailures(empty, empty[:, 0, 0].long(), empty[:, 0, 0], empty[:, :, 0].bool())

    @staticmethod
    def _values(detector: Detector, positions: Tensor, cell: Tensor | None) -> Tensor:
        return detector.measure(positions, torch.zeros_like(positions), *optional(cell)).double()


def _severity(values: Tensor, typical: Tensor, threshold: float) -> Tensor:
    return ((values - typical) / (threshold - typical)).nan_to_num(nan=torch.inf)


def _evenly(chosen: Tensor) -> Tensor:
    """Return up to :data:`LEVEL_FRAMES` of the chosen frames, evenly spread, as their numbers."""
    numbers = chosen.nonzero()[:, 0]
    spread = torch.linspace(0, max(len(numbers) - 1, 0), min(LEVEL_FRAMES, len(numbers)), dtype=torch.float64)
    return numbers[spread.round().long().to(numbers.device)]


class _Molecules:
    """Molecules and framework of a system, and which of its atoms have the same mean energy."""

    def __init__(self, system: System) -> None:
        self._system = system
        self.labels = system.molecules
        self.n_molecules = int(self.labels.max()) + 1
        self.framework = system.framework.to(self.labels.device)
        self.is_one_molecule = self.n_molecules == 1 and not system.is_extended
        # Atoms of a framework have sites of their own, as those of a surface.
        classes = torch.tensor(equivalent_atoms(system), device=self.labels.device)
        own = int(classes.max()) + 1 + torch.arange(system.n_atoms, device=classes.device)
        _, self._classes = torch.where(self.framework, own, classes).unique(return_inverse=True)

    def mean(self, values: Tensor, counted: Tensor | None = None) -> Tensor:
        """Return the mean over frames and equivalent atoms, (n_atoms,); zero where none counts.

        Args:
            values: (n_frames, n_atoms).
            counted: Which of them count, (n_frames, n_atoms); all if None.
        """
        weights = torch.ones_like(values) if counted is None else counted.to(values)
        total, weight = (self._class_sum(each.sum(dim=0)) for each in (weights * values, weights))
        return (total / weight.clamp_min(1.0))[self._classes]

    def members(self, molecules: Tensor) -> Tensor:
        """Return the atoms of molecules, (n_molecules, n_atoms).

        Args:
            molecules: Their labels, (n_molecules,).
        """
        return self.labels == molecules[:, None]

    def _class_sum(self, per_atom: Tensor) -> Tensor:
        return per_atom.new_zeros(len(per_atom)).index_add(0, self._classes, per_atom)

    def around(self, frames: Tensor, failing: Sequence[tuple[int, ...]], cell: Tensor | None) -> Tensor:
        """Return the atoms of the molecules, and of the surroundings in a framework, that atoms belong to.

        Args:
            frames: (n_frames, n_atoms, 3) in Å.
            failing: Atoms of each frame.
            cell: Cells of the frames, (n_frames, 3, 3) in Å; that of the system if None.
        """
        near = torch.zeros(frames.shape[:2], dtype=torch.bool, device=frames.device)
        everyone = torch.arange(frames.shape[1], device=frames.device)
        for number, atoms in enumerate(failing):
            for atom in atoms:
                if self.framework[atom]:
                    pairs = torch.stack([torch.full_like(everyone, atom), everyone], dim=1)
                    own = None if cell is None else cell[number : number + 1]
                    near[number] |= (
                        self._system.distances(frames[number : number + 1], pairs, own)[0] < FRAMEWORK_RADIUS_A
                    )
                else:
                    near[number] |= self.labels == self.labels[atom]
        return near
