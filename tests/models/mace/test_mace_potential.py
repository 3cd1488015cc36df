"""Potentials: MACE against MACE's own calculator, its files, and modules of the user's own."""

import pickle

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from mace.calculators import MACECalculator
from mace.modules import MACE, interaction_classes
from torch import nn
from toys import Oscillators, flat, tiny_mace

from stable_plugin import System
from stable_plugin.md.neighbors import Edges
from stable_plugin.models import ModulePotential, find_potential
from stable_plugin.models.base import default_dtype
from stable_plugin.models.mace import MACEPotential, load_mace, save_mace

VARIANTS = {
    "scaled": {},
    "unscaled": {"model": MACE, "atomic_inter_scale": None, "atomic_inter_shift": None},
    "density": {
        "interaction_cls": interaction_classes["RealAgnosticDensityResidualInteractionBlock"],
        "interaction_cls_first": interaction_classes["RealAgnosticDensityInteractionBlock"],
    },
    "repulsive": {"pair_repulsion": True, "distance_transform": "Agnesi"},
    "many-body": {"correlation": 2, "num_interactions": 1, "max_ell": 2},
}
"""Kinds of MACE models that are in use, foundation models among them."""


@pytest.fixture(scope="module")
def system(aspirin_frames):
    return System.from_atoms(aspirin_frames[0])


@pytest.fixture(scope="module")
def potential(system):
    return MACEPotential(tiny_mace(system.numbers, channels=8), system)


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request, system):
    return MACEPotential(tiny_mace(system.numbers, **VARIANTS[request.param]), system)


def calculator_of(module, folder, **settings):
    """MACE's own calculator, on a file that we wrote."""
    path = folder / "saved.model"
    save_mace(module, path)
    with default_dtype(torch.get_default_dtype()):  # the calculator changes the default and leaves it so
        return MACECalculator(model_paths=str(path), device="cpu", default_dtype="float64", **settings)


def assert_equal_to_calculator(potential, calculator, frames, positions):
    energies, forces = potential.energies_and_forces(positions, potential.edges(positions))
    assert forces.abs().max() > 1e-3
    for frame, energy, force in zip(frames, energies, forces, strict=True):
        atoms = Atoms(frame.symbols, positions=frame.positions, calculator=calculator)
        assert energy.item() + potential.constant_energy == pytest.approx(atoms.get_potential_energy(), abs=1e-10)
        np.testing.assert_allclose(force.numpy(), atoms.get_forces(), rtol=0, atol=1e-10)


def test_energies_and_forces_equal_those_of_maces_calculator(variant, aspirin_frames, aspirin_positions, tmp_path):
    calculator = calculator_of(variant.module, tmp_path)
    assert_equal_to_calculator(variant, calculator, aspirin_frames[:3], aspirin_positions[:3])


def test_a_compressed_structure_agrees_too(variant, aspirin_frames, aspirin_positions, tmp_path):
    """Atoms as close as in a failing simulation."""
    calculator = calculator_of(variant.module, tmp_path)
    frame = aspirin_frames[0].copy()
    frame.positions *= 0.6
    assert_equal_to_calculator(variant, calculator, [frame], 0.6 * aspirin_positions[:1])


def test_padding_edges_contribute_nothing_to_any_kind_of_model(variant, aspirin_positions):
    positions = aspirin_positions[:2]
    bare = variant.edges(positions)
    beyond = torch.zeros(100, 3, dtype=positions.dtype)
    beyond[:, 0] = 2.0 * variant.cutoff
    padded = Edges(
        torch.cat([bare.index, torch.zeros(2, 100, dtype=torch.long)], dim=1), torch.cat([bare.shifts, beyond])
    )
    difference = variant.atomic_energies(positions, padded) - variant.atomic_energies(positions, bare)
    assert difference.abs().max() < 1e-13
    forces, bare_forces = (variant.energies_and_forces(positions, some)[1] for some in (padded, bare))
    assert (forces - bare_forces).abs().max() < 1e-13


@pytest.mark.parametrize("head", ["coarse", "fine", None])
def test_a_head_is_chosen_by_name_and_is_the_last_one_otherwise(head, aspirin_frames, aspirin_positions, tmp_path):
    system = System.from_atoms(aspirin_frames[0])
    module = tiny_mace(
        system.numbers,
        heads=["coarse", "fine"],
        atomic_energies=np.array([[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]]),
        atomic_inter_scale=[1.5, 0.7],
        atomic_inter_shift=[0.1, -0.2],
    )
    potential = MACEPotential(module, system, head)
    # C9H8O4, elements in the order H, C, O.
    assert potential.constant_energy == pytest.approx(-8 - 18 - 12 if head == "coarse" else -32 - 45 - 24)
    calculator = calculator_of(module, tmp_path, head=head or "fine")
    assert_equal_to_calculator(potential, calculator, aspirin_frames[:2], aspirin_positions[:2])


def test_a_head_that_does_not_exist_is_named(system):
    with pytest.raises(ValueError, match=r"head='fine' is not one of the model's heads \['Default'\]"):
        MACEPotential(tiny_mace(system.numbers), system, "fine")


def test_atomic_energies_sum_to_the_energies(variant, aspirin_positions):
    positions = aspirin_positions[:4]
    edges = variant.edges(positions)
    atomic = variant.atomic_energies(positions, edges)
    energies, _ = variant.energies_and_forces(positions, edges)
    assert atomic.shape == (4, 21)
    assert torch.allclose(atomic.sum(dim=1), energies, rtol=0, atol=1e-10)


def test_forces_are_minus_the_gradient_of_the_atomic_energies(variant, aspirin_positions):
    positions = aspirin_positions[:2].clone().requires_grad_(True)
    edges = variant.edges(positions)
    (gradient,) = torch.autograd.grad(variant.atomic_energies(positions, edges).sum(), positions)
    _, forces = variant.energies_and_forces(positions.detach(), edges)
    assert torch.allclose(forces, -gradient, rtol=0, atol=1e-12)


def test_atomic_energies_are_differentiable_in_the_parameters(potential, aspirin_positions):
    positions = aspirin_positions[:2]
    edges = potential.edges(positions)
    parameters = potential.trainable_parameters()
    atom = potential.atomic_energies(positions, edges)[1, 5]
    gradients = torch.autograd.grad(atom, parameters, allow_unused=True)
    step = 1e-5
    for place in (0, len(parameters) // 2, len(parameters) - 1):
        parameter, gradient = parameters[place], gradients[place]
        index = int(gradient.abs().argmax())
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.view(-1)[index] += sign * step
                ends.append(potential.atomic_energies(positions, edges)[1, 5].item())
                parameter.view(-1)[index] -= sign * step
        assert abs(gradient.view(-1)[index].item()) > 1e-6
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(gradient.view(-1)[index].item(), rel=1e-6)


def test_replicas_of_a_batch_do_not_see_each_other(potential, aspirin_positions):
    together, forces = potential.energies_and_forces(aspirin_positions[:6], potential.edges(aspirin_positions[:6]))
    for replica in range(6):
        alone = aspirin_positions[replica : replica + 1]
        energy, force = potential.energies_and_forces(alone, potential.edges(alone))
        assert energy.item() == pytest.approx(together[replica].item(), abs=1e-12)
        assert torch.allclose(force[0], forces[replica], rtol=0, atol=1e-12)


def test_single_precision_keeps_interaction_energies_that_its_totals_would_lose(system, aspirin_positions):
    """Isolated atoms of -1e6 eV leave a resolution of about 1 eV to a single-precision sum."""
    double = MACEPotential(tiny_mace(system.numbers, atomic_energies=np.array([-1e6, -2e6, -3e6])), system)
    positions = aspirin_positions[:4]
    exact = double.atomic_energies(positions, double.edges(positions)).sum(dim=1).detach()
    single = MACEPotential(double.module.float(), system)
    assert single.dtype == torch.float32
    small = positions.float()
    energies, _ = single.energies_and_forces(small, single.edges(small))
    assert torch.allclose(energies.double(), exact, rtol=1e-4)
    atomic = single.atomic_energies(small, single.edges(small))
    assert torch.allclose(atomic.sum(dim=1), exact, rtol=1e-4)


def test_the_system_takes_the_precision_of_the_model(potential, system):
    assert potential.system.masses.dtype == potential.dtype == torch.float64
    assert MACEPotential(tiny_mace(system.numbers).float(), system).system.masses.dtype == torch.float32


def test_weights_changed_elsewhere_are_seen_at_once(system, aspirin_positions):
    module = tiny_mace(system.numbers)
    potential = MACEPotential(module, system)
    positions = aspirin_positions[:1]
    before, _ = potential.energies_and_forces(positions, potential.edges(positions))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter *= 1.1
    after, _ = potential.energies_and_forces(positions, potential.edges(positions))
    assert abs((after - before).item()) > 1e-6


def test_an_element_that_the_model_does_not_know_is_named(system):
    with pytest.raises(ValueError, match=r"does not know the element\(s\) C, O \(it knows the atomic numbers \[1, 7\]"):
        MACEPotential(tiny_mace([1, 7]), system)


def states(module):
    return [part.training for part in module.modules()], [weight.requires_grad for weight in module.parameters()]


def partly_frozen(system):
    """A model in training, but for one block in evaluation mode and some weights that are held."""
    module = tiny_mace(system.numbers).train()
    module.products.eval()
    for weight in module.readouts.parameters():
        weight.requires_grad_(False)
    return module


def test_frozen_puts_modes_and_gradient_flags_back_as_they_were(system):
    module = partly_frozen(system)
    potential = MACEPotential(module, system)
    before = states(module)
    assert {*before[0]} == {*before[1]} == {True, False}
    with potential.frozen():
        modes, flags = states(module)
        assert not any(modes)
        assert not any(flags)
    assert states(module) == before


def test_frozen_puts_them_back_after_an_error(system):
    module = partly_frozen(system)
    before = states(module)
    with pytest.raises(ZeroDivisionError), MACEPotential(module, system).frozen():
        raise ZeroDivisionError
    assert states(module) == before


def test_trainable_parameters_leave_out_those_that_are_held(system):
    module = partly_frozen(system)
    held = {id(weight) for weight in module.readouts.parameters()}
    trainable = [id(weight) for weight in MACEPotential(module, system).trainable_parameters()]
    assert trainable == [id(weight) for weight in module.parameters() if id(weight) not in held]
    assert held


def test_a_model_comes_back_from_its_file(potential, aspirin_positions, tmp_path):
    path = tmp_path / "aspirin.model"
    potential.module.train()
    save_mace(potential.module, path)
    assert potential.module.training
    assert [entry.name for entry in tmp_path.iterdir()] == ["aspirin.model"]
    loaded = load_mace(path)
    assert not loaded.training
    assert torch.equal(flat(loaded.parameters()), flat(potential.module.parameters()))
    again = MACEPotential(loaded, potential.system)
    edges = potential.edges(aspirin_positions[:2])
    expected, _ = potential.energies_and_forces(aspirin_positions[:2], edges)
    assert torch.equal(again.energies_and_forces(aspirin_positions[:2], edges)[0], expected)


def test_a_file_is_never_overwritten(potential, tmp_path):
    path = tmp_path / "precious.model"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match=r"precious\.model exists and is not overwritten"):
        save_mace(potential.module, path)
    assert path.read_text() == "mine"


@pytest.mark.parametrize("name", ["nothing.model", "folder/nothing"])
def test_a_missing_file_is_named(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"no MACE model at .*{name}"):
        load_mace(tmp_path / name)


def test_a_file_of_another_module_is_refused(tmp_path):
    path = tmp_path / "linear.model"
    torch.save(nn.Linear(2, 2), path)
    with pytest.raises(ValueError, match=r"linear\.model contains a Linear, not a MACE model"):
        load_mace(path)


@pytest.mark.parametrize("content", ["text", "pickle", "cut"])
def test_a_corrupted_file_is_refused_with_what_to_do(content, potential, tmp_path):
    path = tmp_path / "broken.model"
    if content == "text":
        path.write_text("these are no weights")
    elif content == "pickle":
        path.write_bytes(pickle.dumps({"weights": 1})[:-3])
    else:
        whole = tmp_path / "whole.model"
        save_mace(potential.module, whole)
        path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(
        ValueError, match=r"broken\.model does not load under the installed e3nn .*install e3nn==0\.5\.1"
    ):
        load_mace(path)


def test_the_default_precision_is_put_back_even_after_an_error():
    before = torch.get_default_dtype()
    other = torch.float64 if before == torch.float32 else torch.float32
    with pytest.raises(ZeroDivisionError), default_dtype(other):
        assert torch.get_default_dtype() == other
        raise ZeroDivisionError
    assert torch.get_default_dtype() == before


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.other = nn.Linear(1, 1)
        self.inner = inner


def test_a_mace_model_is_found_wherever_it_sits(system):
    module = tiny_mace(system.numbers)
    for outer in (module, Wrapper(module), Wrapper(Wrapper(module))):
        found = find_potential(outer, system)
        assert isinstance(found, MACEPotential)
        assert found.module is module


def test_a_module_may_name_its_potential_itself(system):
    class Own(Wrapper):
        def stable_potential(self, system):
            return ModulePotential(self.other, system)

    outer = Own(tiny_mace(system.numbers))
    assert find_potential(outer, system).module is outer.other


def test_a_module_without_a_potential_is_told_what_to_do(system):
    with pytest.raises(TypeError, match=r"no potential found in Linear: .*method stable_potential\(system\)"):
        find_potential(nn.Linear(1, 1), system)


NITROGEN = System.from_atoms(molecule("N2"))


class PerReplica(Oscillators):
    def forward(self, positions):
        return super().forward(positions).sum(dim=1)


@pytest.mark.parametrize("make", [Oscillators, PerReplica])
def test_a_module_may_give_energies_per_atom_or_per_replica(make):
    potential = ModulePotential(make(3.0), NITROGEN)
    positions = torch.tensor([[[0.1, 0, 0], [0, 0.2, 0]], [[0, 0, 0.3], [0, 0, 0]]], dtype=torch.float64)
    energies, forces = potential.energies_and_forces(positions, potential.edges(positions))
    assert energies.tolist() == pytest.approx([1.5 * 0.05, 1.5 * 0.09])
    assert torch.allclose(forces, -3.0 * positions)
    assert potential.atomic_energies(positions, potential.edges(positions)).shape == (2, 2)
    assert potential.constant_energy == 0.0
    assert not energies.requires_grad


def test_a_module_with_energies_of_another_shape_is_refused():
    class Wrong(Oscillators):
        def forward(self, positions):
            return super().forward(positions)[:, :, None]

    positions = torch.zeros(3, 2, 3, dtype=torch.float64)
    potential = ModulePotential(Wrong(1.0), NITROGEN)
    with pytest.raises(
        ValueError, match=r"Wrong returned energies of shape \(3, 2, 1\) for positions of shape \(3, 2, 3"
    ):
        potential.atomic_energies(positions, potential.edges(positions))
