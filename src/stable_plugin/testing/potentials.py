"""Conformance tests of potentials."""

from __future__ import annotations

from collections.abc import Sequence
from math import isinf
from pathlib import Path
from typing import Any, ClassVar

import ase.io
import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError
from ase.constraints import FixAtoms
from ase.geometry import find_mic
from torch import Tensor, nn

from stable_plugin.detectors import NonFinite
from stable_plugin.md import Langevin, Simulator
from stable_plugin.md.constraints import fixed_atoms
from stable_plugin.md.frames import read_frames
from stable_plugin.md.labels import ENERGY_KEY, FORCES_KEY
from stable_plugin.md.neighbors import Edges
from stable_plugin.md.system import System, stack_positions
from stable_plugin.models import find_potential, get_family, load_potential
from stable_plugin.testing.host_reads import HostReads
from stable_plugin.testing.tools import (
    Case,
    KeptModule,
    assert_close,
    assert_raises,
    finite_difference,
    largest_value,
    module_states,
    rattled_ethanol,
    skip,
    small_water_box,
)


class PotentialConformance:
    """Tests of a potential against its family's own calculator, and of the properties that simulations rely on.

    A subclass defines :meth:`make_module` and :meth:`make_calculator`, and changes the attributes where the defaults,
    which suit double precision, do not apply.

    Attributes:
        family: Name of the family in the registry; None for a module that defines ``stable_potential`` itself.
        energy_tolerance: Largest difference of two energies in eV that should be equal.
        force_tolerance: Largest difference of two forces in eV/Å that should be equal.
        calculator_tolerance: Largest difference from the calculator in eV and eV/Å if that computes in a lower precision;
            None for the two above.
        gradient_tolerance: Largest difference of a derivative and its finite difference, relative to the largest
            derivative; None in single precision, in which finite differences are too noisy.
        rotation_tolerance: Largest change in eV and eV/Å when the system is rotated; infinite for a model that is not
            equivariant by construction.
        capturable: Whether a force call must be free of host synchronizations, so that it can be part of a CUDA graph.
        suffix: Suffix of the family's files; None if it has none.
        graph_labels: Charge, spin and head as far as the family's training graphs hold them.
    """

    family: str | None = None
    energy_tolerance = 1e-9
    force_tolerance = 1e-9
    calculator_tolerance: float | None = None
    gradient_tolerance: float | None = 1e-5
    rotation_tolerance = 1e-9
    capturable = True
    suffix: str | None = None
    graph_labels: ClassVar[dict[str, int | str]] = {}
    _kept: KeptModule

    def make_module(self) -> nn.Module:
        """Return the module under test; called once for each class, as the tests restore its weights."""
        raise NotImplementedError(f"{type(self).__name__} must define make_module().")

    def make_calculator(self, module: nn.Module, atoms: Atoms) -> Calculator:
        """Return an independent ASE calculator of the same model, usually the family's own.

        Args:
            module: What :meth:`make_module` returned.
            atoms: The structure it will be used for.
        """
        raise NotImplementedError(f"{type(self).__name__} must define make_calculator().")

    def make_structures(self) -> dict[str, Atoms]:
        """Return the structures under test by name; change it for models that do not know H, C and O."""
        return {"molecule": rattled_ethanol(), "periodic": small_water_box()}

    def save(self, module: nn.Module, path: Path) -> None:
        """Save the module to a file of the family.

        Args:
            module: What :meth:`make_module` returned.
            path: A path that does not exist yet, with :attr:`suffix`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define save(), or leave suffix=None.")

    def make_load_arguments(self) -> dict[str, Any]:
        """Return the arguments that :func:`~stable_plugin.models.load_potential` needs for such a file."""
        return {}

    def make_graphs(self, module: nn.Module, frames: Sequence[Atoms]) -> tuple[nn.Module, Sequence[Any]] | None:
        """Return what the family's trainer trains, and the graphs that it makes of frames; None if it has no trainer.

        Args:
            module: What :meth:`make_module` returned.
            frames: Structures with energies (``info["REF_energy"]``) and forces (``arrays["REF_forces"]``).
        """
        return None

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Run tests with an argument ``structure`` on every structure, and those with ``periodic`` on periodic ones."""
        structures = self.make_structures()
        if "structure" in metafunc.fixturenames:
            metafunc.parametrize("structure", sorted(structures))
        if "periodic" in metafunc.fixturenames:
            metafunc.parametrize("periodic", sorted(name for name, each in structures.items() if each.pbc.any()))

    def test_energies_and_forces_equal_calculator(self, structure: str) -> None:
        """Energies, up to the constant, and forces are those of the family's own calculator."""
        case = self._case(structure)
        energies, forces = case.energies_and_forces()
        calculator = self.make_calculator(case.module, case.atoms)
        assert forces.abs().max() > 10 * self.force_tolerance, "the forces are too small to compare"
        for index, positions in enumerate(case.positions):
            atoms = case.atoms.copy()
            atoms.positions = positions.double().numpy()
            atoms.calc = calculator
            total = energies[index].item() + case.potential.constant_energy
            assert abs(total - atoms.get_potential_energy()) <= (self.calculator_tolerance or self.energy_tolerance)
            tolerance = self.calculator_tolerance or self.force_tolerance
            assert_close(forces[index], torch.tensor(atoms.get_forces()), tolerance)

    def test_forces_are_minus_the_gradient(self, structure: str) -> None:
        """Forces are minus the finite differences of the energy, along random directions."""
        tolerance = self._needs_double_precision()
        case = self._case(structure)
        _, forces = case.energies_and_forces()
        direction = torch.randn(forces.shape, generator=torch.Generator().manual_seed(1)).to(case.positions)

        def energies(step: float) -> Tensor:
            return case.energies_and_forces(case.positions + step * direction)[0].double()

        slopes = -(forces * direction).sum(dim=(1, 2)).double()
        assert_close(finite_difference(energies), slopes, tolerance * slopes.abs().max().item())

    def test_stress_equals_calculator(self, periodic: str) -> None:
        """Stresses, the strain derivatives over the volume, are those of the family's own calculator."""
        case = self._case(periodic)
        calculator = self.make_calculator(case.module, case.atoms)
        if not case.atoms.pbc.all():
            skip("the structure has no volume")
        volume = case.atoms.get_volume()
        with case.potential.frozen():
            derivative = case.potential.strain_derivative(case.positions)
        for index, positions in enumerate(case.positions):
            atoms = case.atoms.copy()
            atoms.positions = positions.double().numpy()
            atoms.calc = calculator
            try:
                stress = torch.tensor(atoms.get_stress(voigt=False))
            except PropertyNotImplementedError:
                skip("the calculator has no stress")
            tolerance = (self.calculator_tolerance or self.energy_tolerance) * len(atoms) / volume
            assert_close(derivative[index] / volume, stress, tolerance)

    def test_strain_derivative_is_that_of_finite_differences(self, periodic: str) -> None:
        """Derivatives with respect to strain are finite differences of the energies in strained cells."""
        tolerance = self._needs_double_precision()
        case = self._case(periodic)
        potential, cell = case.potential, case.potential.system.cell.expand(len(case.positions), 3, 3)
        if isinf(potential.cutoff) and not potential.sees_cells:
            assert_raises(ValueError, "cells", lambda: potential.strain_derivative(case.positions))
            return
        direction = torch.randn(3, 3, generator=torch.Generator().manual_seed(4)).to(case.positions)
        direction = direction + direction.T

        def energies(step: float) -> Tensor:
            deformation = torch.eye(3).to(direction) + step * direction
            edges = potential.edges(case.positions @ deformation, cell @ deformation)
            return potential.energies(case.positions @ deformation, edges).double()

        with potential.frozen():
            derivative = potential.strain_derivative(case.positions)
            slopes = (derivative * direction).sum(dim=(1, 2)).double()
            assert_close(finite_difference(energies), slopes, tolerance * slopes.abs().max().item())

    def test_atomic_energies_sum_to_energies(self, structure: str) -> None:
        """Energies per atom have one entry an atom and add up to the energies of the replicas."""
        case = self._case(structure)
        with case.potential.frozen():
            atomic = case.potential.atomic_energies(case.positions, case.edges())
            energies = case.potential.energies(case.positions, case.edges())
        assert atomic.shape == case.positions.shape[:2]
        assert energies.shape == case.positions.shape[:1]
        assert_close(atomic.sum(dim=1), energies, self.energy_tolerance)
        assert_close(case.energies_and_forces()[0], energies, self.energy_tolerance)

    def test_energies_are_differentiable_in_weights(self, structure: str) -> None:
        """Gradients for the weights of single atomic energies are those of finite differences."""
        tolerance = self._needs_double_precision()
        case = self._case(structure)
        parameters, edges = case.potential.trainable_parameters(), case.edges()
        generator = torch.Generator().manual_seed(2)
        directions = [
            torch.randn(each.shape, generator=generator).to(each) * largest_value(each) for each in parameters
        ]

        def energies(step: float) -> Tensor:
            with torch.no_grad():
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter.add_(step * direction)
                try:
                    return case.potential.atomic_energies(case.positions, edges)[:, :2].double()
                finally:
                    for parameter, direction in zip(parameters, directions, strict=True):
                        parameter.sub_(step * direction)

        with case.potential.evaluating():
            numeric = finite_difference(energies)
            atomic = case.potential.atomic_energies(case.positions, edges)[:, :2]
            for place in np.ndindex(*atomic.shape):
                gradients = torch.autograd.grad(atomic[place], parameters, retain_graph=True, allow_unused=True)
                slope = sum(
                    (gradient * direction).sum().item()
                    for gradient, direction in zip(gradients, directions, strict=True)
                    if gradient is not None
                )
                assert abs(slope - numeric[place].item()) <= tolerance * numeric.abs().max().item()
        assert numeric.abs().max() > 0, "the energies do not depend on the weights"

    def test_periodic_images_are_equivalent(self, periodic: str) -> None:
        """Moving atoms by cell vectors changes neither energies nor forces."""
        case = self._case(periodic)
        images = torch.randint(-2, 3, case.positions.shape, generator=torch.Generator().manual_seed(3))
        images = images * torch.tensor(case.atoms.pbc)
        moved = case.positions + images.to(case.positions) @ case.potential.system.cell
        self._assert_same(case.energies_and_forces(moved), case.energies_and_forces())

    def test_replicas_of_different_cells_equal_calculator(self, periodic: str) -> None:
        """Each replica has the energy and the forces of the calculator in its own cell."""
        case = self._case(periodic)
        strained = []
        for index, positions in enumerate(case.positions):
            atoms = case.atoms.copy()
            atoms.positions = positions.double().numpy()
            atoms.set_cell(atoms.cell.array * (1.0 + 0.03 * index), scale_atoms=True)
            strained.append(atoms)
        case.positions = torch.tensor(np.stack([atoms.positions for atoms in strained])).to(case.positions)
        cell = torch.tensor(np.stack([atoms.cell.array for atoms in strained])).to(case.positions)
        if isinf(case.potential.cutoff) and not case.potential.sees_cells:
            assert_raises(ValueError, "cells", lambda: case.potential.edges(case.positions, cell))
            return
        with case.potential.frozen():
            edges = case.potential.edges(case.positions, cell)
            energies, forces = case.potential.energies_and_forces(case.positions, edges)
        calculator = self.make_calculator(case.module, case.atoms)
        for index, atoms in enumerate(strained):
            atoms.calc = calculator
            total = energies[index].item() + case.potential.constant_energy
            assert abs(total - atoms.get_potential_energy()) <= (self.calculator_tolerance or self.energy_tolerance)
            tolerance = self.calculator_tolerance or self.force_tolerance
            assert_close(forces[index], torch.tensor(atoms.get_forces()), tolerance)

    def test_shifted_energies_have_the_same_forces(self, structure: str) -> None:
        """A constant per atom changes the energies by it and the forces not at all, if the model takes one."""
        case = self._case(structure)
        energies, forces = case.energies_and_forces()
        before = case.potential.constant_energy
        if not case.potential.shift_energies(0.25):
            skip("the model keeps no constant per atom")
        shifted, same_forces = case.energies_and_forces()
        change = shifted.double() - energies.double() + case.potential.constant_energy - before
        assert_close(change, torch.full_like(change, 0.25 * len(case.atoms)), max(self.energy_tolerance, 1e-5))
        assert_close(same_forces, forces, self.force_tolerance)

    def test_structure_is_the_same_in_files_and_simulation(self, structure: str, tmp_path: Path) -> None:
        """Charge, spin, masses, cell, periodic directions and fixed atoms of a file are those of its trajectories."""
        case = self._case(structure)
        atoms = case.atoms.copy()
        atoms.info = {"charge": 1, "spin": 2, **atoms.info}
        masses = atoms.get_masses()
        masses[-1] += 1.0  # another isotope
        atoms.set_masses(masses)
        atoms.set_constraint(FixAtoms([1]))
        ase.io.write(tmp_path / "start.extxyz", [atoms, atoms])
        frames = read_frames(tmp_path / "start.extxyz")
        system = System.from_frames(frames).with_fixed(frames, frames)
        potential = find_potential(case.module, system)
        simulator = Simulator(potential, Langevin(300.0), NonFinite())
        start = simulator.prepare(stack_positions(frames, system, "frames"), torch.Generator().manual_seed(0))
        end = simulator.run(start, 10, 10, torch.Generator().manual_seed(1)).end
        ase.io.write(tmp_path / "end.extxyz", potential.system.atoms(end.positions[0], end.velocities[0]))
        written = read_frames(tmp_path / "end.extxyz")[0]
        assert str(written.symbols) == str(atoms.symbols)
        assert written.pbc.tolist() == atoms.pbc.tolist()
        for mine, theirs in ((written.cell.array, atoms.cell.array), (written.get_masses(), masses)):
            assert_close(torch.tensor(mine), torch.tensor(theirs), 1e-4)
        for label in ("charge", "spin", "head"):
            assert written.info.get(label) == atoms.info.get(label), label
        assert fixed_atoms(written, "written").nonzero()[0].tolist() == [1]
        assert_close(torch.tensor(written.positions[1]), torch.tensor(atoms.positions[1]), 1e-5)
        assert np.abs(written.positions - atoms.positions).max() > 1e-4, "nothing moved"

    def test_structure_is_the_same_in_training_graphs(self, structure: str) -> None:
        """What the family's trainer is given, and what StABlE training takes from its dataset, is the same structure."""
        case = self._case(structure)
        atoms = case.atoms.copy()
        atoms.info |= {ENERGY_KEY: 0.0, **self.graph_labels}
        atoms.arrays[FORCES_KEY] = np.zeros((len(atoms), 3))
        made = self.make_graphs(case.module, [atoms, atoms])
        if made is None:
            skip("the family has no trainer")
        found = get_family(str(self.family)).structures(*made)
        assert found is not None and len(found) == 2
        assert str(found[1].symbols) == str(atoms.symbols)
        assert found[1].pbc.tolist() == atoms.pbc.tolist()
        assert {label: found[1].info.get(label) for label in self.graph_labels} == self.graph_labels
        moved = find_mic(found[1].positions - atoms.positions, atoms.cell, atoms.pbc)[1]  # some families wrap positions
        assert_close(torch.tensor(moved), torch.zeros(len(atoms)), 1e-5)
        periodic = atoms.pbc  # some families change the cell vectors of the other directions, which mean nothing
        assert_close(torch.tensor(found[1].cell.array[periodic]), torch.tensor(atoms.cell.array[periodic]), 1e-5)

    def test_replicas_are_independent(self, structure: str) -> None:
        """The result of a replica does not depend on the others in the batch, nor on its place among them."""
        case = self._case(structure)
        energies, forces = case.energies_and_forces()
        for index in range(len(case.positions)):
            alone = case.energies_and_forces(case.positions[index : index + 1])
            self._assert_same(alone, (energies[index : index + 1], forces[index : index + 1]))
        self._assert_same(case.energies_and_forces(case.positions.flip(0)), (energies.flip(0), forces.flip(0)))

    def test_potential_of_another_system_is_that_of_the_same_model(self, structure: str) -> None:
        """As an observable makes that of a molecule from that of its liquid."""
        case = self._case(structure)
        potential = case.potential.of_system(System.from_atoms(case.atoms))
        assert type(potential) is type(case.potential)
        with potential.frozen():
            found = potential.energies_and_forces(case.positions, potential.edges(case.positions))
        self._assert_same(found, case.energies_and_forces())

    def test_permuted_atoms_have_permuted_forces(self, structure: str) -> None:
        """Energies do not depend on the order of the atoms, and forces follow it."""
        case = self._case(structure)
        order = np.random.default_rng(4).permutation(len(case.atoms))
        permuted = Case(case.module, case.atoms[order])
        energies, forces = case.energies_and_forces()
        self._assert_same(permuted.energies_and_forces(case.positions[:, order]), (energies, forces[:, order]))

    def test_rotated_replicas_have_rotated_forces(self, structure: str) -> None:
        """Energies do not depend on the orientation and the place of the system, and forces rotate with it."""
        if isinf(self.rotation_tolerance):
            skip("the model is not equivariant")
        case = self._case(structure)
        rotation, _ = np.linalg.qr(np.random.default_rng(5).normal(size=(3, 3)))
        rotation *= np.linalg.det(rotation)  # proper: chiral models tell mirror images apart
        turned = case.atoms.copy()
        turned.set_cell(turned.cell.array @ rotation.T, scale_atoms=False)
        turned.positions = turned.positions @ rotation.T
        matrix = torch.tensor(rotation.T).to(case.positions)
        energies, forces = case.energies_and_forces()
        positions = case.positions @ matrix + torch.tensor([0.3, -0.2, 0.1]).to(case.positions)
        rotated_energies, rotated_forces = Case(case.module, turned).energies_and_forces(positions)
        assert_close(rotated_energies, energies, self.rotation_tolerance)
        assert_close(rotated_forces, forces @ matrix, self.rotation_tolerance)

    def test_edges_beyond_the_cutoff_contribute_nothing(self, structure: str) -> None:
        """Padding edges, which neighbor lists of fixed size contain, change no energy and no force."""
        case = self._case(structure)
        edges, cutoff = case.edges(), case.potential.cutoff
        if isinf(cutoff):
            skip("the potential takes no edges")
        shifts = edges.shifts.new_zeros(100, 3)
        shifts[:, 0] = cutoff * torch.linspace(1.001, 2.0, 100).to(shifts)
        index = torch.arange(100).remainder(case.positions.shape[0] * case.positions.shape[1]).expand(2, 100)
        padded = Edges(torch.cat([edges.index, index], dim=1), torch.cat([edges.shifts, shifts]))
        with case.potential.frozen():
            result = case.potential.energies_and_forces(case.positions, padded)
        self._assert_same(result, case.energies_and_forces())

    def test_weights_changed_in_place_take_effect(self, structure: str) -> None:
        """Weights that an optimizer changes are used by the next call, in a simulation too."""
        case = self._case(structure)
        before, _ = case.energies_and_forces(within=case.potential.simulating)
        with torch.no_grad():
            for parameter in case.module.parameters():
                parameter.mul_(1.05)
        frozen, _ = case.energies_and_forces()
        simulated, _ = case.energies_and_forces(within=case.potential.simulating)
        assert (frozen - before).abs().max() > 10 * self.energy_tolerance
        # Merged experts and the like round differently.
        assert_close(simulated, frozen, 10 * self.energy_tolerance)

    def test_contexts_restore_modes_and_gradients(self) -> None:
        """Modes and gradient flags are restored as they were, after an error too, and by every context."""
        case = self._case(next(iter(self.make_structures())))
        case.module.train()
        *_, last = case.module.modules()
        last.eval()
        parameters = list(case.module.parameters())
        parameters[0].requires_grad_(False)
        before = module_states(case.module)
        for context in (case.potential.evaluating, case.potential.frozen, case.potential.simulating):
            try:
                with context():
                    modes, flags = module_states(case.potential.module)
                    assert not any(modes)
                    assert context == case.potential.evaluating or not any(flags)
                    raise ZeroDivisionError
            except ZeroDivisionError:
                assert module_states(case.module) == before, context
        assert all(parameter is not parameters[0] for parameter in case.potential.trainable_parameters())

    def test_force_calls_leave_no_trace(self, structure: str) -> None:
        """A simulation neither moves the positions nor leaves gradients or other weights in the model."""
        case = self._case(structure)
        positions = case.positions.clone()
        weights = [parameter.detach().clone() for parameter in case.module.parameters()]
        energies, forces = case.energies_and_forces(within=case.potential.simulating)
        assert not energies.requires_grad and not forces.requires_grad
        assert torch.equal(case.positions, positions)
        for parameter, weight in zip(case.module.parameters(), weights, strict=True):
            assert parameter.grad is None
            assert torch.equal(parameter, weight)

    def test_compilable_potential_gives_the_same_energies(self, structure: str) -> None:
        """The potential for torch.compile shares the weights, or a ValueError says what to set instead."""
        case = self._case(structure)
        try:
            compilable = case.potential.compilable()
        except ValueError as error:
            assert "compile=False" in str(error), error
            return
        with torch.no_grad():
            for parameter in case.module.parameters():
                parameter.mul_(1.05)
        with case.potential.frozen(), compilable.frozen():
            energies = compilable.energies(case.positions, case.edges())
            expected = case.potential.energies(case.positions, case.edges())
        assert_close(energies, expected, self.energy_tolerance)

    def test_force_call_does_not_wait_for_the_device(self, structure: str) -> None:
        """A force call reads no value on the host and has no shape that depends on values."""
        if not self.capturable:
            skip("capturable = False")
        case = self._case(structure)
        edges = case.edges()
        with case.potential.simulating():
            for _ in range(3):  # TorchScript optimizes in the first calls
                case.potential.energies_and_forces(case.positions, edges)
            with HostReads() as reads:
                case.potential.energies_and_forces(case.positions, edges)
        assert reads.count == 0, reads.names

    def test_file_round_trip_keeps_energies(self, structure: str, tmp_path: Path) -> None:
        """The registry recognizes a saved model, and loads it with the same energies and forces."""
        case, path = self._case(structure), self._saved(tmp_path)
        with torch.no_grad():
            for parameter in case.module.parameters():
                parameter.copy_((1.05 * parameter).float())  # files of some families are in single precision
        self.save(case.module, path)
        loaded = load_potential(path, **self.make_load_arguments())
        assert get_family(str(self.family)).owns(find_potential(loaded, case.potential.system).module)
        self._assert_same(Case(loaded, case.atoms).energies_and_forces(), case.energies_and_forces())
        assert [each.name for each in tmp_path.iterdir()] == [path.name], "nothing else is left in the folder"

    def test_save_does_not_overwrite(self, tmp_path: Path) -> None:
        """An existing file is kept, and the error names it."""
        path = self._saved(tmp_path)
        path.write_text("mine")
        assert_raises(FileExistsError, path.name, lambda: self.save(self._module(), path))
        assert path.read_text() == "mine"

    def test_loader_names_unknown_arguments(self, tmp_path: Path) -> None:
        """An argument that the loader does not have is named, with its value."""
        path = self._saved(tmp_path)
        assert_raises(
            TypeError, "no_such_argument=1", lambda: load_potential(path, family=self.family, no_such_argument=1)
        )

    def test_registry_finds_the_module(self, structure: str) -> None:
        """The potential is found wherever the model is inside another module."""
        case = self._case(structure)
        found = find_potential(nn.Sequential(nn.Identity(), nn.ModuleList([case.module])), case.potential.system)
        assert type(found) is type(case.potential)
        assert found.module is case.potential.module
        assert self.family is None or get_family(self.family).owns(found.module)
        assert repr(found).startswith(f"{type(found).__name__}(")
        assert case.atoms.get_chemical_formula() in repr(found)

    def _case(self, structure: str) -> Case:
        return Case(self._module(), self.make_structures()[structure])

    def _module(self) -> nn.Module:
        """Return the module of this class, in the state in which it was made."""
        kept: KeptModule | None = type(self).__dict__.get("_kept")
        if kept is None:
            kept = KeptModule(self.make_module())
            type(self)._kept = kept
        return kept.restored()

    def _saved(self, folder: Path) -> Path:
        if self.suffix is None:
            skip("suffix = None: the family has no files")
        return folder / f"saved{self.suffix}"

    def _needs_double_precision(self) -> float:
        if self.gradient_tolerance is None:
            skip("gradient_tolerance = None")
        return self.gradient_tolerance

    def _assert_same(self, result: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
        assert_close(result[0], expected[0], self.energy_tolerance)
        assert_close(result[1], expected[1], self.force_tolerance)
