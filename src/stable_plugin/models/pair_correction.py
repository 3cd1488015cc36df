"""A potential with a correction of few parameters: pair potentials, which measured curves and a pressure can determine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from ase import Atoms
from ase.data import atomic_numbers
from ase.neighborlist import neighbor_list
from torch import Tensor, nn

from stable_plugin.md.neighbors import Edges
from stable_plugin.md.system import System
from stable_plugin.models.base import Potential
from stable_plugin.models.registry import find_potential, load_potential
from stable_plugin.runtime import checks

MIN_INTERVALS = 4
"""Intervals that one cubic B-spline spans."""


class PairCorrected(nn.Module):
    r"""A model plus a pair potential for each of some pairs of elements, to be trained on observables alone.

    .. math:: U(\mathbf{r}) = U_\mathrm{model}(\mathbf{r}) + \sum_{i<j} u_{ij}(r_{ij}), \qquad u(r) = \sum_k c_k B_k(r)

    The :math:`B_k` are cubic B-splines between the smallest distance of the pair and the cutoff; u, u' and u'' are zero at both
    ends. Gradients of observables from a few dozen frames are noisy: a few coefficients a pair can follow them where the
    thousands of weights of a network cannot. All coefficients are zero at first.

    Train it with ``FineTuningModule(model, trainable="correction.*")`` and ``StABlECallback(objective="boltzmann", ...)``. The result
    is simulated as any other potential. A copy of the model that is trained on its energies and forces, see
    :class:`~stable_plugin.integrations.lightning.PseudoLabeledDataModule`, takes up a part of it, and is written in its own format.

    Source: pair potentials from g(r), Lyubartsev and Laaksonen, Phys. Rev. E 52, 3730 (1995); as a part of a network
    potential that is trained by reweighting, Thaler and Zavadlav, Nat. Commun. 12, 6884 (2021).

    Args:
        model: The model, the path of its file, or the name of a pretrained one.
        pairs: Smallest distance in Å of each pair of elements, such as ``{"O-O": 2.0, "O-H": 1.3}``. It leaves out pairs
            within a molecule: nothing changes at smaller distances.
        cutoff: Largest distance in Å, at most the cutoff of the model.
        spacing: Distance of the splines in Å; rounded so that they fill the range.

    Attributes:
        model: The model.
        correction: Coefficients of each pair in eV.

    Raises:
        ValueError: If a pair or a distance is not valid.

    Example:
        >>> from stable_plugin.models import NoInteraction, PairCorrected
        >>> model = PairCorrected(NoInteraction(), {"O-O": 2.0, "O-H": 1.3}, cutoff=3.5)
        >>> {name: len(coefficients) for name, coefficients in model.correction.items()}
        {'O-O': 3, 'O-H': 6}
    """

    def __init__(
        self, model: nn.Module | str | Path, pairs: Mapping[str, float], cutoff: float, spacing: float = 0.25
    ) -> None:
        super().__init__()
        self.cutoff = checks.number("cutoff", cutoff, above=0)
        checks.number("spacing", spacing, above=0)
        if not isinstance(pairs, Mapping) or not pairs:
            raise ValueError(
                f"pairs={pairs!r} must name pairs and their smallest distances in Å, such as {{'O-O': 2.0}}."
            )
        self.splines = {name: _Splines(name, r_min, self.cutoff, spacing) for name, r_min in pairs.items()}
        twice = [name for name in self.splines if "-".join(reversed(name.split("-"))) in self.splines.keys() - {name}]
        if twice:
            raise ValueError(f"pairs={dict(pairs)!r} names {' and '.join(twice)}, which are the same: remove one.")
        self.model = load_potential(model) if isinstance(model, str | Path) else model
        self.correction = nn.ParameterDict(
            [(name, nn.Parameter(torch.zeros(splines.n_coefficients))) for name, splines in self.splines.items()]
        )

    def extra_repr(self) -> str:
        """Return the arguments for ``repr``."""
        return f"pairs={ {name: splines.r_min for name, splines in self.splines.items()} }, cutoff={self.cutoff:g}"

    def stable_potential(self, system: System) -> PairCorrectedPotential:
        """Return the potential that simulates ``system``."""
        return PairCorrectedPotential(self, system)

    @torch.no_grad()
    def pair_energies(self, name: str, distances: Tensor) -> Tensor:
        """Return the pair potential of two elements, in eV.

        Args:
            name: The pair, as in ``pairs``.
            distances: In Å, (n,).
        """
        return self.splines[name](distances, self.correction[name])

    def force_metric(self, frames: Sequence[Atoms]) -> Tensor:
        r"""Return what changes of the coefficients do to the forces, for :class:`~stable_plugin.algorithm.normalized_descent.NormalizedDescent`.

        .. math:: G_{kl} = \Big\langle \frac{1}{3N} \frac{\partial \mathbf{F}}{\partial c_k} \cdot \frac{\partial \mathbf{F}}{\partial c_l} \Big\rangle

        The root of :math:`\Delta c^T G \Delta c` is the root mean square of the changes of the force components in eV/Å.

        Args:
            frames: Structures over which it is averaged.

        Returns:
            The metric over all coefficients, in the order of ``correction``, in 1/Å², (n, n).
        """
        per_frame = [self._force_derivatives(frame) for frame in frames]
        products = [derivatives.T @ derivatives / len(derivatives) for derivatives in per_frame]
        return torch.stack(products).mean(dim=0)

    def _force_derivatives(self, frame: Atoms) -> Tensor:
        """Return the derivatives of the forces with respect to the coefficients, (3 n_atoms, n) in 1/Å."""
        first, second, distances, vectors = map(torch.from_numpy, neighbor_list("ijdD", frame, self.cutoff))
        numbers = torch.from_numpy(frame.numbers)
        columns = []
        for splines in self.splines.values():
            joined = splines.joins(numbers[first], numbers[second])
            r = distances[joined].requires_grad_(True)
            units = vectors[joined] / distances[joined, None]
            for coefficients in torch.eye(splines.n_coefficients, dtype=torch.float64):
                (slopes,) = torch.autograd.grad(splines(r, coefficients).sum(), r)
                forces = torch.zeros(len(frame), 3, dtype=torch.float64)
                columns.append(forces.index_add_(0, first[joined], slopes[:, None] * units).flatten())
        return torch.stack(columns, dim=1)


class PairCorrectedPotential(Potential):
    """A potential plus pair potentials, applied to replicas of one system.

    Args:
        module: The model and its correction.
        system: What is simulated.
        base: Potential of the model for this system; found in the model if None.

    Raises:
        ValueError: If the model builds its own graph, or its cutoff is below that of the pairs.
    """

    module: PairCorrected

    def __init__(self, module: PairCorrected, system: System, base: Potential | None = None) -> None:
        super().__init__(module, system)
        self.base = find_potential(module.model, system) if base is None else base
        if self.base.cutoff == torch.inf or self.base.cutoff < module.cutoff:
            own = "builds its own graph" if self.base.cutoff == torch.inf else f"has a cutoff of {self.base.cutoff:g} Å"
            raise ValueError(
                f"cutoff={module.cutoff:g}: {type(module.model).__name__} {own}, and pairs are taken from its edges: use a "
                "model that takes edges, and a cutoff that is not longer than its own."
            )

    @property
    def cutoff(self) -> float:
        return self.base.cutoff

    @property
    def constant_energy(self) -> float:
        return self.base.constant_energy

    def shift_energies(self, per_atom_eV: float) -> bool:
        return self.base.shift_energies(per_atom_eV)

    def shift_isolated_atoms(self, shifts: Mapping[int, float]) -> bool:
        return self.base.shift_isolated_atoms(shifts)

    def compilable(self) -> PairCorrectedPotential:
        return PairCorrectedPotential(self.module, self.system, self.base.compilable())

    @contextmanager
    def simulating(self) -> Iterator[None]:
        with self.frozen(), self.base.simulating():
            yield

    def atomic_energies(self, positions: Tensor, edges: Edges) -> Tensor:
        flat, n_atoms = positions.reshape(-1, 3), positions.shape[1]
        sender, receiver = edges.index
        distances = (flat[receiver] - flat[sender] + edges.shifts).norm(dim=1)
        first, second = self.system.numbers[sender % n_atoms], self.system.numbers[receiver % n_atoms]
        energies = torch.zeros_like(distances)
        for name, splines in self.module.splines.items():
            own = splines(distances, self.module.correction[name])
            energies = energies + torch.where(splines.joins(first, second), own, 0.0)
        # Each pair is two edges.
        pairs = torch.zeros_like(flat[:, 0]).index_add(0, receiver, 0.5 * energies).reshape(positions.shape[:2])
        return self.base.atomic_energies(positions, edges) + pairs


class _Splines:
    """Cubic B-splines at even distances, all within a range.

    Args:
        name: The pair of elements, for errors.
        r_min: Lower end of the range in Å.
        cutoff: Upper end of the range in Å.
        spacing: Width of an interval in Å; rounded so that intervals fill the range.
    """

    def __init__(self, name: str, r_min: float, cutoff: float, spacing: float) -> None:
        ends = name.split("-")
        if len(ends) != 2 or not all(end in atomic_numbers for end in ends):
            raise ValueError(f"pairs: {name!r} is not a pair of elements: write for instance 'O-H'.")
        self.numbers = (atomic_numbers[ends[0]], atomic_numbers[ends[1]])
        self.r_min = checks.number(f"pairs[{name!r}]", r_min, at_least=0)
        self.n_intervals = round((cutoff - self.r_min) / spacing)
        if self.n_intervals < MIN_INTERVALS:
            raise ValueError(
                f"spacing={spacing:g} leaves {max(self.n_intervals, 0)} intervals between {self.r_min:g} Å and the cutoff of "
                f"{cutoff:g} Å for {name}, and a spline needs {MIN_INTERVALS}: pass a smaller spacing or distance, or a larger cutoff."
            )
        self.width = (cutoff - self.r_min) / self.n_intervals
        self.n_coefficients = self.n_intervals - MIN_INTERVALS + 1

    def joins(self, first: Tensor, second: Tensor) -> Tensor:
        """Return which pairs of atomic numbers are these elements, in either order, (n,)."""
        one, other = self.numbers
        return ((first == one) & (second == other)) | ((first == other) & (second == one))

    def __call__(self, distances: Tensor, coefficients: Tensor) -> Tensor:
        """Return the sum of the splines, (n,).

        Args:
            distances: (n,) in Å.
            coefficients: (n_coefficients,).
        """
        x = (distances - self.r_min) / self.width
        interval = x.detach().floor().clamp(0, self.n_intervals - 1)
        t = x - interval
        # The four splines on an interval; those that would reach out of the range have no coefficient.
        pieces = torch.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], dim=1) / 6
        padded = nn.functional.pad(coefficients.to(distances), (3, 3))
        index = interval.long()[:, None] + torch.arange(4, device=distances.device)
        return torch.where((x > 0) & (x < self.n_intervals), (pieces * padded[index]).sum(dim=1), 0.0)
