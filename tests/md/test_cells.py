"""Replicas of one composition whose cells differ, in one batch."""

from math import inf

import numpy as np
import pytest
import torch
from ase.build import bulk
from ase.io import read
from springs import observable_gradient
from toys import PairRepulsion, SoftSpheres

from stable_plugin import NonFinite, NoseHooverChain, RadialDistribution, RunawayTemperature, StABlEConfig, System
from stable_plugin.algorithm.assembly import assemble
from stable_plugin.algorithm.estimator import BoltzmannEstimator
from stable_plugin.evaluation import Evaluator
from stable_plugin.evaluation.label_errors import label_errors
from stable_plugin.md import Simulator
from stable_plugin.md.cells import stack_cells
from stable_plugin.md.labels import ENERGY_KEY, FORCES_KEY
from stable_plugin.md.neighbors import edges_within
from stable_plugin.md.system import stack_positions
from stable_plugin.units import BOLTZMANN

STRAINS = (1.0, 0.94, 1.07)


def strained_crystals(strains=STRAINS, rattle=0.05):
    """Return rattled copper crystals of different volumes and shapes."""
    frames = []
    for index, strain in enumerate(strains):
        atoms = bulk("Cu", "fcc", 3.6, cubic=True) * (2, 2, 2)
        cell = atoms.cell.array * strain
        cell[1, 0] += 0.3 * index  # sheared too
        atoms.set_cell(cell, scale_atoms=True)
        atoms.positions += np.random.default_rng(index).normal(scale=rattle, size=(len(atoms), 3))
        frames.append(atoms)
    return frames


def stacked(frames):
    system = System.from_atoms(frames[0])
    cell = stack_cells(frames, system)
    return system.with_cells(cell), stack_positions(frames, system, "frames"), cell


def test_stack_cells_of_equal_cells_is_none():
    frames = strained_crystals((1.0, 1.0))
    frames[1].set_cell(frames[0].cell)
    assert stack_cells(frames, System.from_atoms(frames[0])) is None


def test_minimum_image_cutoff_is_that_of_the_smallest_cell():
    frames = strained_crystals()
    system, _, _ = stacked(frames)
    assert system.minimum_image_cutoff == pytest.approx(
        min(System.from_atoms(frame).minimum_image_cutoff for frame in frames)
    )


def test_distances_are_minimum_images_of_each_cell():
    frames = strained_crystals()
    system, positions, cell = stacked(frames)
    pairs = torch.tensor([[0, 31], [3, 17], [5, 30]])
    distances = system.distances(positions, pairs, cell)
    for frame, own in zip(frames, distances, strict=True):
        expected = [frame.get_distance(i, j, mic=True) for i, j in pairs.tolist()]
        torch.testing.assert_close(own, torch.tensor(expected))


def test_edges_within_equals_edges_of_single_frames():
    frames = strained_crystals()
    system, positions, cell = stacked(frames)
    edges = edges_within(positions, 4.1, system, cell)
    flat = positions.reshape(-1, 3)
    lengths = (flat[edges.index[1]] - flat[edges.index[0]] + edges.shifts).norm(dim=1)
    for replica, frame in enumerate(frames):
        alone = edges_within(positions[replica : replica + 1], 4.1, System.from_atoms(frame))
        points = positions[replica]
        expected = (points[alone.index[1]] - points[alone.index[0]] + alone.shifts).norm(dim=1)
        own = lengths[edges.index[0] // len(frame) == replica]
        torch.testing.assert_close(own.sort().values, expected.sort().values)


def test_simulator_batch_equals_single_runs():
    frames = strained_crystals()
    system, positions, cell = stacked(frames)
    velocities = 0.02 * torch.randn(positions.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def run(system, positions, velocities, cell=None):
        simulator = Simulator(
            PairRepulsion(system, cutoff=3.0), NoseHooverChain(600.0, timestep_fs=2.0), NonFinite(),
            check_every_fs=10.0, skin_A=0.3,
        )  # fmt: skip
        start = simulator.prepare(positions, torch.Generator(), velocities, cell)
        return simulator.run(start, 200, 50, torch.Generator())

    together = run(system, positions, velocities, cell)
    assert together.frame_cells().shape == (12, 3, 3)
    for index, frame in enumerate(frames):
        one = slice(index, index + 1)
        alone = run(System.from_atoms(frame), positions[one], velocities[one])
        assert alone.frame_cells() is None
        torch.testing.assert_close(together.positions[:, one], alone.positions, rtol=0.0, atol=1e-8)
        assert (alone.positions[-1] - positions[one]).abs().max() > 0.1, "nothing moved"


class OwnGraph(PairRepulsion):
    """Soft spheres that build their own graph, as fairchem models of periodic systems do."""

    sees_cells = True

    @property
    def cutoff(self):
        return inf

    def atomic_energies(self, positions, edges):
        return super().atomic_energies(positions, edges_within(positions, self._cutoff, self.system, edges.cell))


@pytest.mark.parametrize("max_replicas", [None, 2])
def test_simulator_passes_cells_to_models_with_their_own_graph(max_replicas):
    system, positions, cell = stacked(strained_crystals())
    velocities = 0.02 * torch.randn(positions.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    velocities[0] *= 10.0  # unstable at once, so that it leaves the batch
    windows = []
    for kind in (PairRepulsion, OwnGraph):
        detector = RunawayTemperature(1e4)
        detector.bind(system, positions, cell)
        simulator = Simulator(kind(system, cutoff=3.0), NoseHooverChain(600.0, 2.0), detector, check_every_fs=10.0)
        simulator.forces.max_replicas = max_replicas
        start = simulator.prepare(positions, torch.Generator(), velocities, cell)
        windows.append(simulator.run(start, 100, 50, torch.Generator(), stop_unstable=True))
    expected, window = windows
    assert window.stopped.tolist() == expected.stopped.tolist() == [True, False, False]
    torch.testing.assert_close(window.positions, expected.positions, rtol=0.0, atol=1e-8)
    assert (window.positions[-1, 1:] - positions[1:]).abs().max() > 0.1, "nothing moved"


def test_radial_distribution_uses_the_volume_of_each_frame():
    frames = strained_crystals()
    system, positions, cell = stacked(frames)
    g = RadialDistribution(("Cu", "Cu"), r_max=3.0, bin_width=0.1)
    g.bind(system, positions, cell)
    values = g.per_frame(positions, cell)
    for frame, own in zip(frames, values, strict=True):
        alone = RadialDistribution(("Cu", "Cu"), r_max=3.0, bin_width=0.1)
        alone.bind(System.from_atoms(frame), torch.tensor(frame.positions)[None])
        torch.testing.assert_close(own, alone.known_target)
    torch.testing.assert_close(g.known_target, values.mean(dim=0))


def test_estimator_gradient_equals_covariance_of_single_frames():
    frames = strained_crystals()
    system, positions, cell = stacked(frames)
    potential = PairRepulsion(system, cutoff=3.0)
    values = torch.tensor([[1.0], [3.0], [2.5]], dtype=torch.float64)
    estimate = BoltzmannEstimator(potential, 300.0, chunk=2).estimate(
        positions, [values], [torch.zeros(1)], lambda mean, target: mean.sum(), cell=cell
    )
    # U is linear in its strength, so dU/dstrength = U / strength of each frame in its own cell.
    slopes = []
    for frame in frames:
        alone = PairRepulsion(System.from_atoms(frame), cutoff=3.0)
        at = torch.tensor(frame.positions)[None]
        slopes.append(alone.energies(at, alone.edges(at)).item() / 0.5)
    expected = -np.cov(values[:, 0], slopes)[0, 1] / (BOLTZMANN * 300.0)
    assert estimate.gradients[0].item() == pytest.approx(expected, rel=1e-9)


def test_training_loop_of_different_cells_keeps_them():
    frames = strained_crystals()
    system, positions, cell = stacked(frames)
    config = StABlEConfig(
        objective="boltzmann", n_replicas=6, window_ps=0.02, record_every_fs=10.0, integrator=NoseHooverChain(600.0, timestep_fs=2.0),
        check_every_fs=10.0, detector=RunawayTemperature(1.0), observables=RadialDistribution(r_max=3.0),
    )  # fmt: skip
    loop = assemble(PairRepulsion(system, cutoff=3.0), positions, positions, config, cell=cell, reference_cell=cell)
    estimate = observable_gradient(loop)
    assert estimate is not None
    assert np.isfinite(estimate.gradients[0].item()) and estimate.gradients[0].item() != 0.0
    for state in (loop.replicas.state, loop.replicas.learning_start):
        assert {round(float(each.det()), 6) for each in state.cell} <= {round(float(each.det()), 6) for each in cell}
    restored = assemble(PairRepulsion(system, cutoff=3.0), positions, positions, config, cell=cell, reference_cell=cell)
    restored.load_state_dict(loop.state_dict())
    torch.testing.assert_close(
        observable_gradient(restored).gradients, observable_gradient(loop).gradients, rtol=0.0, atol=0.0
    )


def test_evaluator_of_different_cells(tmp_path):
    frames = strained_crystals()
    module = SoftSpheres(0.5)
    for frame in frames:
        potential = module.stable_potential(System.from_atoms(frame))
        at = torch.tensor(frame.positions)[None]
        energies, forces = potential.energies_and_forces(at, potential.edges(at))
        frame.info[ENERGY_KEY], frame.arrays[FORCES_KEY] = energies.item(), forces[0].numpy()
    system, _, _ = stacked(frames)
    errors = label_errors(module.stable_potential(system), frames)
    assert max(each.abs().max().item() for each in errors) < 1e-10
    evaluator = Evaluator(
        frames, detector=NonFinite(), observables=[RadialDistribution(r_max=3.0)], n_replicas=3,
        horizons_ps=[0.1],
    )  # fmt: skip
    evaluation = evaluator.evaluate(module, trajectories=tmp_path)
    assert evaluation.summaries[0]["force_mae_mev_per_A"] is None
    written = [read(tmp_path / f"stable_replica{replica:02d}.extxyz") for replica in range(3)]
    for frame, back in zip(frames, written, strict=True):
        np.testing.assert_allclose(back.cell.array, frame.cell.array, atol=1e-6)


def test_edges_of_own_graph_rejects_different_cells():
    frames = strained_crystals()
    system, positions, cell = stacked(frames)
    potential = PairRepulsion(system, cutoff=float("inf"))
    with pytest.raises(ValueError, match=r"cells of the replicas differ.*same cell"):
        potential.edges(positions, cell)
