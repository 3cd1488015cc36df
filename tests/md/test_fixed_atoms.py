"""Atoms that are held in place, and masses, as the structures say."""

from math import inf, nan

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.constraints import FixAtoms, FixBondLength, FixCartesian
from toys import Oscillators, PairRepulsion

from stable_plugin import BondLengths, Langevin, NonFinite, NoseHooverChain, RunawayTemperature, StABlEConfig, System
from stable_plugin.evaluation import Evaluator
from stable_plugin.integrations.build import build_training_loop
from stable_plugin.md import Simulator
from stable_plugin.md.constraints import fixed_atoms
from stable_plugin.md.frames import read_frames
from stable_plugin.md.system import stack_positions
from stable_plugin.models import ModulePotential

FIXED = [0, 3]


def chain(n_frames=4, constraint=True, spread=0.02):
    frames = []
    for seed in range(n_frames):
        atoms = Atoms("OHOHOH", positions=[[1.1 * i, 0.3 * (i % 2), 0.0] for i in range(6)])
        atoms.rattle(spread, seed=seed)
        if constraint:
            atoms.set_constraint(FixAtoms(FIXED))
        frames.append(atoms)
    return frames


class Repelling(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.strength = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def stable_potential(self, system):
        potential = PairRepulsion(system)
        potential.module = self
        return potential


def system_of(frames):
    return System.from_frames(frames).with_fixed(frames, frames)


@pytest.mark.parametrize("integrator", [Langevin(600.0, 0.5, 20.0), NoseHooverChain(600.0, 0.5)])
def test_fixed_atoms_rest_exactly_and_the_others_move(integrator):
    frames = chain()
    system = system_of(frames)
    simulator = Simulator(PairRepulsion(system), integrator, NonFinite())
    assert integrator.n_fixed == 0
    assert simulator.integrator.degrees_of_freedom(6) == 12
    generator = torch.Generator().manual_seed(0)
    start = simulator.prepare(stack_positions(frames, system, "frames"), generator)
    window = simulator.run(start, 200, 50, generator)
    moving = [atom for atom in range(6) if atom not in FIXED]
    assert torch.equal(window.positions[:, :, FIXED], start.positions[:, FIXED].expand(4, -1, -1, -1))
    assert (window.velocities[:, :, FIXED] == 0.0).all()
    assert (start.velocities[:, FIXED] == 0.0).all()
    assert ((window.positions[-1] - start.positions)[:, moving].abs().amax(dim=-1) > 1e-3).all()


def test_moving_atoms_do_not_depend_on_fixed_masses_being_there():
    """Without forces between atoms, those that move draw the noise that they would draw without a constraint."""
    free, held = chain(constraint=False), chain()
    ends = []
    for frames in (free, held):
        system = system_of(frames)
        simulator = Simulator(ModulePotential(Oscillators(1.0), system), Langevin(300.0, 0.5, 5.0), NonFinite())
        generator = torch.Generator().manual_seed(3)
        start = simulator.prepare(stack_positions(frames, system, "frames"), generator)
        ends.append(simulator.run(start, 50, 50, generator).end)
    moving = [atom for atom in range(6) if atom not in FIXED]
    assert torch.equal(ends[0].positions[:, moving], ends[1].positions[:, moving])


def test_temperature_counts_moving_atoms():
    frames = chain(1) * 400
    system = system_of(frames)
    potential = ModulePotential(Oscillators(0.0), system)
    simulator = Simulator(potential, Langevin(350.0, 0.5, 50.0), NonFinite())
    generator = torch.Generator().manual_seed(1)
    start = simulator.prepare(stack_positions(frames, system, "frames"), generator)
    window = simulator.run(start, 400, 400, generator)
    detector = RunawayTemperature(1e4)
    detector.bind(system, window.positions[0])
    temperatures = detector.measure(window.positions[0], window.velocities[0])
    error = 350.0 * np.sqrt(2.0 / (3 * 4 * 400))  # of a mean over 400 replicas with 12 degrees of freedom
    assert temperatures.mean().item() == pytest.approx(350.0, abs=4 * error)
    # ASE counts the same degrees of freedom.
    written = system.atoms(window.positions[0, 0], window.velocities[0, 0])
    assert written.get_temperature() == pytest.approx(temperatures[0].item(), rel=1e-9)


def test_constraints_survive_file_simulation_and_trajectory(tmp_path):
    ase.io.write(tmp_path / "starts.extxyz", chain())
    frames = read_frames(tmp_path / "starts.extxyz")
    assert fixed_atoms(frames[0], "x").nonzero()[0].tolist() == FIXED
    evaluator = Evaluator(
        frames, n_replicas=2, horizons_ps=[0.1], detector=NonFinite(), observables=[BondLengths()],
        integrator=Langevin(600.0, 0.5, 5.0),
    )  # fmt: skip
    evaluator.evaluate(Repelling(), trajectories=tmp_path)
    written = ase.io.read(tmp_path / "stable_replica00.extxyz", ":")
    for frame in written:
        assert fixed_atoms(frame, "x").nonzero()[0].tolist() == FIXED
        np.testing.assert_allclose(frame.positions[FIXED], frames[0].positions[FIXED], atol=1e-7)
    assert np.abs(written[-1].positions - frames[0].positions).max() > 1e-3


def test_training_holds_atoms_of_the_start_frames():
    config = StABlEConfig(
        objective="boltzmann", structures=chain(), reference=chain(constraint=False), n_replicas=4, window_ps=0.02, record_every_fs=5.0,
        detector=NonFinite(), observables=BondLengths(), integrator=Langevin(600.0, 0.5, 5.0),
    )  # fmt: skip
    loop = build_training_loop(config, Repelling(), None)
    loop.simulation_phase()
    expected = torch.tensor(np.stack([frame.positions for frame in chain()]))[:, FIXED]
    assert torch.equal(loop.replicas.state.positions[:, FIXED], expected)
    assert (loop.replicas.state.positions - expected.mean()).abs().max() > 0


class Drifting(Langevin):
    """An integrator that says nothing of fixed atoms."""

    holds_fixed_atoms = False


def test_integrator_that_moves_fixed_atoms_is_refused():
    system = system_of(chain())
    with pytest.raises(
        ValueError, match=r"integrator=Drifting.*does not hold atoms in place.*use Langevin or NoseHoover"
    ):
        Simulator(PairRepulsion(system), Drifting(300.0), NonFinite())
    free = System.from_frames(chain(constraint=False))
    assert Simulator(PairRepulsion(free), drifting := Drifting(300.0), NonFinite()).integrator is drifting


def test_constraints_that_are_not_supported_are_named():
    atoms = chain(1)[0]
    atoms.set_constraint(FixCartesian(2, (True, True, True)))
    assert fixed_atoms(atoms, "x").nonzero()[0].tolist() == [2]
    for constraint, name in (
        (FixCartesian(2, (True, False, False)), "FixCartesian"),
        (FixBondLength(0, 1), "FixBondLength"),
    ):
        atoms.set_constraint(constraint)
        with pytest.raises(ValueError, match=rf"structures\[0\] has the constraint {name}.*use FixAtoms, or remove"):
            system_of([atoms]).with_fixed([atoms], [atoms])


def test_frames_with_other_constraints_are_named():
    frames = chain()
    frames[2].set_constraint(FixAtoms([1]))
    with pytest.raises(ValueError, match=r"structures\[2\] holds 1 atoms in place \(FixAtoms\) and structures\[0\] 2"):
        system_of(frames)
    with pytest.raises(ValueError, match=r"reference holds atoms in place \(FixAtoms\) that the start frames do not"):
        System.from_frames(chain()).with_fixed(chain(constraint=False), chain())
    for frame in frames:
        frame.set_constraint(FixAtoms(range(6)))
    with pytest.raises(ValueError, match=r"structures hold all atoms in place"):
        system_of(frames)


def test_frames_with_other_isotopes_are_named():
    frames = chain(2, constraint=False)
    masses = frames[1].get_masses()
    masses[1] = 2.014
    frames[1].set_masses(masses)
    with pytest.raises(
        ValueError, match=r"frames\[1\] has H1 with a mass of 2\.014 u, but .* with 1\.008 u: pass frames"
    ):
        stack_positions(frames, System.from_frames(frames), "frames")


def test_the_isotope_that_is_named_is_the_one_that_differs():
    frames = [Atoms("AuH", positions=[[0, 0, 0], [0, 0, 1.6]]) for _ in range(2)]
    masses = frames[1].get_masses()
    frames[1].set_masses(masses + np.array([0.09, 0.05]))  # within rounding for gold, but not for hydrogen
    with pytest.raises(ValueError, match=r"frames\[1\] has H1 with a mass of 1\.058 u"):
        stack_positions(frames, System.from_frames(frames), "frames")


@pytest.mark.parametrize("value", [0.5, nan, inf, "one", True, np.bool_(True)])
def test_charge_is_a_whole_number(value):
    atoms = chain(1, constraint=False)[0]
    for whole in (1, 1.0, np.int64(1), np.float32(1)):
        atoms.info["charge"] = whole
        assert System.from_atoms(atoms).charge == 1
    atoms.info["charge"] = value
    with pytest.raises(ValueError, match=r"structures have atoms\.info\['charge'\]=.*: set a whole number"):
        System.from_atoms(atoms)


@pytest.mark.parametrize(("label", "values"), [("charge", (1, 0)), ("spin", (1, 3)), ("head", ("dft", "mp"))])
def test_frames_that_state_other_labels_are_named(label, values):
    frames = chain(3, constraint=False)
    for frame in frames:
        frame.info[label] = values[0]
    system = System.from_frames(frames)
    assert getattr(system, label) == values[0]
    frames[2].info[label] = values[1]
    with pytest.raises(
        ValueError, match=rf"starts\[2\] has {label}={values[1]}, but the simulated system has {label}={values[0]}"
    ):
        stack_positions(frames, system, "starts")
    del frames[2].info[label]
    with pytest.raises(
        ValueError, match=rf"starts\[0\] has {label}={values[0]}, but starts\[2\] states none: set atoms\.info"
    ):
        stack_positions(frames, system, "starts")
    with pytest.raises(
        ValueError, match=rf"starts\[0\] has {label}={values[0]}, but the simulated system has {label}=None"
    ):
        stack_positions(frames[:2], System.from_atoms(chain(1, constraint=False)[0]), "starts")
