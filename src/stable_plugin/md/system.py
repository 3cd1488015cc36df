"""The simulated system: what all replicas have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from math import inf
from numbers import Real

import numpy as np
import torch
from ase import Atoms
from ase.constraints import FixAtoms
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from stable_plugin.md.constraints import common_fixed_atoms
from stable_plugin.md.geometry import check_geometry
from stable_plugin.md.topology import Part, Topology, checked_bonds, find_topology, kind_of_atom

MASS_TOLERANCE = 1e-3
"""Relative difference between masses of the same isotope: files round them."""


@dataclass(frozen=True, repr=False)
class System:
    """The constant part of a simulation, shared by all replicas.

    Attributes:
        numbers: Atomic numbers, (n_atoms,).
        masses: Masses in u, (n_atoms,).
        bonds: Pairs of bonded atoms of molecules, (n_bonds, 2), first index smaller.
        framework: Whether each atom belongs to an extended framework, (n_atoms,): a crystal, a metal, a slab or a network,
            which has no separate molecules.
        symbols: Chemical symbols, n_atoms long.
        cell: Cell vectors, one per row, (3, 3) in Å; arbitrary in directions that are not periodic.
        pbc: Periodic directions.
        charge: Total charge in units of e; None if not specified.
        spin: Spin multiplicity; None if not specified.
        head: Name of the head of a multi-head model; None if not specified.
        fixed: Atoms that are held in place, (n_atoms,); None if all move.
        cells: Cells of all frames, (n_frames, 3, 3) in Å, where they differ; None if all have :attr:`cell`.
    """

    numbers: Tensor
    masses: Tensor
    bonds: Tensor
    framework: Tensor
    symbols: tuple[str, ...]
    cell: Tensor
    pbc: tuple[bool, bool, bool] = (False, False, False)
    charge: int | None = None
    spin: int | None = None
    head: str | None = None
    fixed: Tensor | None = None
    cells: Tensor | None = None

    @classmethod
    def from_atoms(cls, atoms: Atoms, bonds: Sequence[tuple[int, int]] | None = None) -> System:
        """Build the system from one ASE structure; see :meth:`from_frames` for several.

        Args:
            atoms: A structure with its bonds intact.
            bonds: Pairs of bonded atoms; found from their distances and elements by default.

        Returns:
            The system.

        Raises:
            ValueError: If the structure has fewer than two atoms, or an atom without a mass, or :func:`check_geometry`
                rejects it.
        """
        return cls.from_frames([atoms], bonds, "structures")

    @classmethod
    def from_frames(
        cls, frames: Sequence[Atoms], bonds: Sequence[tuple[int, int]] | None = None, name: str = "reference"
    ) -> System:
        """Build the system from reference frames: everything from the first one, but the bonds from all of them.

        Args:
            frames: Structures of one system, with its atoms in the same order.
            bonds: Pairs of bonded atoms; by default those that hold in nearly all frames.
            name: Name of the frames in errors.

        Returns:
            The system.

        Raises:
            ValueError: If the first frame has fewer than two atoms or an atom without a mass, :func:`check_geometry`
                rejects it, or the bonds of the frames differ.
        """
        atoms = frames[0]
        _check_size(atoms, name)
        check_geometry(atoms, "a structure")
        masses = atoms.get_masses()
        if not (np.isfinite(masses) & (masses > 0)).all():
            raise ValueError("structures contain atoms without a mass: set masses with atoms.set_masses().")
        topology = _topology(frames, bonds, name)
        return cls(
            numbers=torch.tensor(atoms.numbers, dtype=torch.long),
            masses=torch.tensor(masses, dtype=torch.float64),
            bonds=torch.tensor(topology.bonds, dtype=torch.long).reshape(-1, 2),
            framework=torch.tensor(topology.framework),
            symbols=tuple(atoms.get_chemical_symbols()),
            cell=torch.tensor(atoms.cell.complete().array, dtype=torch.float64),
            pbc=tuple(atoms.pbc.tolist()),
            charge=_whole_number(atoms, "charge"),
            spin=_whole_number(atoms, "spin"),
            head=atoms.info.get("head"),
        )

    def __repr__(self) -> str:
        formula = Atoms(list(self.symbols)).get_chemical_formula()
        return (
            f"System({formula}, n_bonds={len(self.bonds)}, cell={self.cell.tolist() if self.periodic else None}, "
            f"pbc={self.pbc}, charge={self.charge}, spin={self.spin}, is_extended={self.is_extended})"
        )

    @property
    def is_extended(self) -> bool:
        """Whether atoms form a framework, with molecules beside it or not."""
        return bool(self.framework.any())

    @property
    def parts(self) -> list[Part]:
        """Connected parts: the framework, molecules, ions and free atoms, in the order of their first atoms."""
        labels = self.molecules.cpu().numpy()
        groups = np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels))[:-1])
        framework, numbers = self.framework.tolist(), self.numbers.tolist()
        parts = []
        for group in groups:
            first = int(group[0])
            single = "molecule" if len(group) > 1 else kind_of_atom(numbers[first])
            parts.append(Part("framework" if framework[first] else single, tuple(group.tolist())))
        return parts

    @property
    def periodic(self) -> bool:
        """Whether the system is periodic in any direction."""
        return any(self.pbc)

    @cached_property
    def to_cell(self) -> Tensor:
        """Matrix from positions to fractional coordinates, (3, 3); zero in directions that are not periodic."""
        inverse: Tensor = torch.linalg.inv(self.cell.double().cpu())
        return (inverse * self._repeats.cpu()).to(self.cell.device)

    def inverse_of(self, cell: Tensor) -> Tensor:
        """Return :attr:`to_cell` for other cells, without reading the host.

        Args:
            cell: Cell vectors, one per row, (..., 3, 3) in Å.

        Returns:
            (..., 3, 3) in 1/Å.
        """
        a, b, c = cell.unbind(dim=-2)
        # The columns of the inverse are the reciprocal vectors; torch.linalg.inv would check for singular matrices.
        columns = torch.stack([torch.linalg.cross(*pair) for pair in ((b, c), (c, a), (a, b))], dim=-1)
        volume = (a * columns[..., 0]).sum(dim=-1)
        return columns / volume[..., None, None] * self._repeats.to(cell)

    @cached_property
    def _repeats(self) -> Tensor:
        return torch.tensor(self.pbc, dtype=torch.float64, device=self.cell.device)

    @property
    def minimum_image_cutoff(self) -> float:
        """Largest cutoff in Å at which an atom sees one image of another: half the smallest height of the cell.

        Where replicas differ in their cells, the smallest of :attr:`cells`.
        """
        if not self.periodic:
            return inf
        cells = self.cell[None] if self.cells is None else self.cells
        heights = 1.0 / torch.linalg.vector_norm(torch.linalg.inv(cells.double().cpu()), dim=1)
        return 0.5 * float(heights[:, torch.tensor(self.pbc)].min())

    @property
    def inertia(self) -> Tensor:
        """Masses in u, (n_atoms,), infinite for atoms that are held in place: forces and noise do not move these."""
        return self.masses if self.fixed is None else self.masses.masked_fill(self.fixed, inf)

    @property
    def n_moving(self) -> int:
        """Number of atoms that are not held in place."""
        return self.n_atoms if self.fixed is None else self.n_atoms - int(self.fixed.sum())

    def with_fixed(self, starts: Sequence[Atoms], reference: Sequence[Atoms]) -> System:
        """Return a copy whose atoms are held in place as those of the start frames.

        Args:
            starts: Frames that the simulation starts from.
            reference: Frames that targets are computed from; they may state no constraint.

        Raises:
            ValueError: If the frames disagree, or have a constraint that is not supported.
        """
        fixed, in_reference = common_fixed_atoms(starts, "structures"), common_fixed_atoms(reference, "reference")
        if in_reference is not None and (fixed is None or not torch.equal(fixed, in_reference)):
            raise ValueError(
                "reference holds atoms in place (FixAtoms) that the start frames do not: set the same constraint in both, or "
                "remove it from the reference."
            )
        return self if fixed is None else replace(self, fixed=fixed.to(self.masses.device))

    def with_cells(self, *cells: Tensor | None) -> System:
        """Return a copy that knows the cells which its frames have, see :attr:`cells`.

        Args:
            cells: Cells of frames, each (n_frames, 3, 3) in Å; None for frames in the cell of the system.
        """
        different = [each.to(self.cell) for each in cells if each is not None]
        return replace(self, cells=torch.cat([self.cell[None], *different])) if different else self

    def require_periodic(self, reason: str, remedy: str) -> None:
        """Raise an error unless the system is periodic in all directions.

        Args:
            reason: What needs this, and why, as ``Density needs a volume``.
            remedy: What to do instead.

        Raises:
            ValueError: If it is not.
        """
        if not all(self.pbc):
            raise ValueError(
                f"pbc={list(self.pbc)}, but {reason}, so a system that is periodic in all directions: {remedy}."
            )

    def volume(self, cell: Tensor | None = None) -> Tensor:
        """Return the volume of a cell, (), or of several, (...), in Å³, float64.

        Args:
            cell: Cell vectors, one per row, (..., 3, 3) in Å; those of the system if None.
        """
        volume: Tensor = torch.linalg.det((self.cell if cell is None else cell).double()).abs()
        return volume

    @property
    def n_atoms(self) -> int:
        """Number of atoms in one replica."""
        return len(self.symbols)

    @property
    def angles(self) -> Tensor:
        """Bonded triples (end, center, end), (n_angles, 3)."""
        neighbors: dict[int, list[int]] = {}
        for first, second in self.bonds.tolist():
            neighbors.setdefault(first, []).append(second)
            neighbors.setdefault(second, []).append(first)
        triples = [
            (first, center, second)
            for center in sorted(neighbors)
            for first, second in combinations(sorted(neighbors[center]), 2)
        ]
        return torch.tensor(triples, dtype=torch.long, device=self.bonds.device).reshape(-1, 3)

    @property
    def molecules(self) -> Tensor:
        """Molecule of each atom, (n_atoms,), numbered from zero in the order of their first atoms.

        An ion or free atom is a molecule of its own, and the framework is one.
        """
        network = self.framework.nonzero().squeeze(1)
        within = torch.stack([network[:-1], network[1:]], dim=1)
        first, second = torch.cat([self.bonds, within.to(self.bonds)]).cpu().numpy().T
        joined = coo_array((np.ones(len(first)), (first, second)), shape=(self.n_atoms, self.n_atoms))
        labels = connected_components(joined, directed=False)[1]
        return torch.tensor(labels, dtype=torch.long, device=self.bonds.device)

    @property
    def bond_labels(self) -> list[str]:
        """Names of the bonds, such as ``C1-H14`` (indices from zero)."""
        return [self.label(bond) for bond in self.bonds.tolist()]

    def label(self, atoms: Sequence[int]) -> str:
        """Return the name of some atoms, such as ``C1-H14`` (indices from zero)."""
        return "-".join(f"{self.symbols[atom]}{atom}" for atom in atoms)

    def with_electrons(self, charge: int | None, spin: int | None) -> System:
        """Return a copy with this charge and spin multiplicity where none is specified."""
        return replace(
            self,
            charge=charge if self.charge is None else self.charge,
            spin=spin if self.spin is None else self.spin,
        )

    def separations(self, positions: Tensor, pairs: Tensor, cell: Tensor | None = None) -> Tensor:
        """Return vectors from the second to the first atom of pairs, to its nearest image in a periodic system.

        Exact for vectors shorter than :attr:`minimum_image_cutoff`.

        Args:
            positions: (..., n_atoms, 3) in Å.
            pairs: (n_pairs, 2).
            cell: Cells of the frames, (..., 3, 3) in Å, with the leading axes of the positions; that of the system if None.

        Returns:
            (..., n_pairs, 3) in Å.
        """
        first, second = pairs.to(positions.device).unbind(dim=1)
        vectors = positions[..., first, :] - positions[..., second, :]
        if not self.periodic:
            return vectors
        to_cell = self.to_cell if cell is None else self.inverse_of(cell)
        images = torch.round(vectors @ to_cell.to(positions))
        return vectors - images @ (self.cell if cell is None else cell).to(positions)

    def distances(self, positions: Tensor, pairs: Tensor, cell: Tensor | None = None) -> Tensor:
        """Return the lengths of :meth:`separations`, (..., n_pairs) in Å."""
        lengths: Tensor = torch.linalg.vector_norm(self.separations(positions, pairs, cell), dim=-1)
        return lengths

    def to(self, device: torch.device | str, dtype: torch.dtype) -> System:
        """Return a copy with its tensors on ``device``, and masses and cell in ``dtype``."""
        return replace(
            self,
            numbers=self.numbers.to(device),
            masses=self.masses.to(device, dtype),
            bonds=self.bonds.to(device),
            framework=self.framework.to(device),
            cell=self.cell.to(device, dtype),
            fixed=None if self.fixed is None else self.fixed.to(device),
            cells=None if self.cells is None else self.cells.to(device, dtype),
        )

    def atoms(self, positions: Tensor, velocities: Tensor | None = None, cell: Tensor | None = None) -> Atoms:
        """Return one frame as an ASE structure.

        Args:
            positions: (n_atoms, 3) in Å.
            velocities: (n_atoms, 3) in Å per ASE time.
            cell: Cell of this frame, (3, 3) in Å; that of the system if None.
        """
        frame = Atoms(
            numbers=self.numbers.cpu().numpy(),
            positions=positions.double().cpu().numpy(),
            cell=(self.cell if cell is None else cell).double().cpu().numpy() if self.periodic else None,
            pbc=self.pbc,
        )
        frame.set_masses(self.masses.double().cpu().numpy())
        stated = {"charge": self.charge, "spin": self.spin, "head": self.head}
        frame.info.update({label: value for label, value in stated.items() if value is not None})
        if self.fixed is not None:
            frame.set_constraint(FixAtoms(mask=self.fixed.cpu().numpy()))
        if velocities is not None:
            frame.set_velocities(velocities.double().cpu().numpy())
        return frame


def _check_size(atoms: Atoms, name: str) -> None:
    """Raise an error if there are fewer than two atoms: no force acts on one, nor on all atoms of a crystal alike."""
    if len(atoms) > 1:
        return
    if len(atoms) == 1 and atoms.pbc.any():
        raise ValueError(
            f"{name} have one atom of {atoms.symbols[0]} in a periodic cell, on which no force acts by symmetry, so that "
            "it cannot become unstable: pass a supercell, such as atoms.repeat(3). Training data may contain such cells."
        )
    raise ValueError(f"{name} have {len(atoms)} atom(s): pass structures of at least two.")


def stack_positions(frames: Sequence[Atoms], system: System, name: str) -> Tensor:
    """Return the positions of frames of one system, (n_frames, n_atoms, 3) in Å, float64.

    Args:
        frames: ASE structures.
        system: System that every frame must match, atom by atom.
        name: Name of the argument in errors.

    Raises:
        ValueError: If there is no frame, or one has different atoms or another order, pbc, charge or spin, or
            :func:`check_geometry` rejects it.

    See :func:`~stable_plugin.md.cells.stack_cells` for their cells, which may differ.
    """
    if len(frames) == 0:
        raise ValueError(f"{name} contains no frame: pass at least one structure.")
    for index, frame in enumerate(frames):
        if frame.get_chemical_symbols() != list(system.symbols):
            raise ValueError(
                f"{name}[{index}] is {frame.get_chemical_formula()}, but the simulated system is "
                f"{Atoms(list(system.symbols)).get_chemical_formula()} in a fixed order of atoms: "
                "pass frames of one system, with its atoms in the same order."
            )
        if tuple(frame.pbc.tolist()) != system.pbc:
            raise ValueError(
                f"{name}[{index}] has pbc={frame.pbc.tolist()}, but the simulated system has pbc={list(system.pbc)}: pass "
                "frames that are periodic in the same directions."
            )
        check_geometry(frame, f"{name}[{index}]")
        masses, expected_masses = frame.get_masses(), system.masses.double().cpu().numpy()
        if not np.allclose(masses, expected_masses, rtol=MASS_TOLERANCE):
            atom = int(np.abs(masses / expected_masses - 1.0).argmax())
            raise ValueError(
                f"{name}[{index}] has {frame.symbols[atom]}{atom} with a mass of {masses[atom]:g} u, but the simulated system "
                f"with {expected_masses[atom]:g} u: pass frames with the same isotopes."
            )
    for label, expected in (("charge", system.charge), ("spin", system.spin), ("head", system.head)):
        _check_label(frames, label, expected, name)
    return torch.tensor(np.stack([frame.positions for frame in frames]), dtype=torch.float64)


def _topology(frames: Sequence[Atoms], bonds: Sequence[tuple[int, int]] | None, name: str) -> Topology:
    """Return the topology of the frames that match the first one; :func:`stack_positions` rejects the others."""
    atoms = frames[0]
    if bonds is not None:
        return Topology(checked_bonds(bonds, len(atoms)), np.zeros(len(atoms), dtype=bool))
    return find_topology(
        [each for each in frames if np.array_equal(each.numbers, atoms.numbers) and _is_valid(each, atoms)], name
    )


def _is_valid(frame: Atoms, atoms: Atoms) -> bool:
    same_pbc = bool((frame.pbc == atoms.pbc).all())
    return same_pbc and bool(np.isfinite(frame.positions).all() and np.isfinite(frame.cell.array).all())


def _check_label(frames: Sequence[Atoms], label: str, expected: int | str | None, name: str) -> None:
    """Raise an error unless all frames state what the system has, or none of them states anything."""
    stated = [index for index, frame in enumerate(frames) if frame.info.get(label) is not None]
    if stated and len(stated) < len(frames):
        index = min({*range(len(frames))} - {*stated})
        raise ValueError(
            f"{name}[{stated[0]}] has {label}={frames[stated[0]].info[label]}, but {name}[{index}] states none: set "
            f"atoms.info[{label!r}] in all frames."
        )
    for index in stated:
        if frames[index].info[label] != expected:
            raise ValueError(
                f"{name}[{index}] has {label}={frames[index].info[label]}, but the simulated system has {label}={expected}: "
                f"pass frames with the same {label}, reference frames among them."
            )


def _whole_number(atoms: Atoms, name: str) -> int | None:
    """Return ``atoms.info[name]`` as an integer, None if it is not set."""
    value = atoms.info.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real) or not (number := float(value)).is_integer():
        raise ValueError(f"structures have atoms.info[{name!r}]={value!r}: set a whole number.")
    return int(number)
