"""Replicas that have been stopped leave the batch of the model call."""

import pytest
import torch
from ase import Atoms
from captured import PLAIN, capturing, seeded, with_fixed_edges
from toys import PairRepulsion, as_potential, tiny_mace

from stable_plugin import Langevin, NonFinite, System
from stable_plugin.detectors import Detector
from stable_plugin.md import Simulator
from stable_plugin.md.simulator import _batch_sizes


class FailsAtCheck(Detector):
    """Flags each replica at a given check."""

    capturable = False

    def __init__(self, checks):
        super().__init__(0.5, None)
        self.checks, self.n_done = torch.tensor(checks), 0

    def measure(self, positions, velocities):
        self.n_done += 1
        return (self.n_done >= self.checks).to(positions)


def mace(frames):
    system = System.from_atoms(frames[0])
    return as_potential(tiny_mace(system.numbers, atomic_inter_scale=20.0), system)


def recording_sizes(potential):
    """Return the potential, and a list of the number of replicas in each call of it."""
    sizes, plain = [], potential.energies_and_forces

    def recording(positions, edges):
        sizes.append(len(positions))
        assert not len(edges.index[0]) or int(edges.index.max()) < positions.shape[0] * positions.shape[1]
        return plain(positions, edges)

    potential.energies_and_forces = recording
    return potential, sizes


FAILED_CHECKS = [9, 1, 2, 2, 9, 1, 1, 3]
"""The check that each of eight replicas fails at; there are four."""


def run(potential, positions, stop_unstable=True, prepare=lambda simulator: simulator):
    detector = FailsAtCheck(FAILED_CHECKS)
    simulator = prepare(Simulator(potential, Langevin(500.0, 0.5, 1.0), detector, check_every_fs=2.5, execution=PLAIN))
    generator = seeded(1)
    start = simulator.prepare(positions, seeded())
    return simulator.run(start, 20, 5, generator, stop_unstable=stop_unstable), simulator, generator.get_state()


def test_batch_sizes_are_halves():
    assert _batch_sizes(8) == [8, 4, 2, 1]
    assert _batch_sizes(5) == [5, 3, 2, 1]
    assert _batch_sizes(1) == [1]


@pytest.mark.parametrize("prepare", [lambda simulator: simulator, with_fixed_edges, capturing])
def test_batch_shrinks_and_trajectories_stay(aspirin_frames, aspirin_positions, prepare):
    positions = aspirin_positions[:8]
    expected, _, noise = run(mace(aspirin_frames), positions, stop_unstable=False)
    potential, sizes = recording_sizes(mace(aspirin_frames))
    window, simulator, noise_after = run(potential, positions, prepare=prepare)
    assert window.unstable_step.tolist() == [-1, 5, 10, 10, -1, 5, 5, 15]
    # Five are left after the first check, three after the second, two after the third.
    assert sorted(set(sizes), reverse=True) == [8, 4, 2]
    if not simulator.capturing:
        assert sizes[1:] == [8] * 10 + [4] * 5 + [2] * 5
    for replica, check in enumerate(FAILED_CHECKS):
        n_frames = min(check, 4)
        torch.testing.assert_close(
            window.positions[:n_frames, replica], expected.positions[:n_frames, replica], rtol=0.0, atol=1e-9
        )
        assert torch.equal(window.end.positions[replica], window.positions[n_frames - 1, replica])
    assert torch.equal(noise_after, noise), "noise is drawn for all replicas, in the batch or not"


def test_batch_stays_whole_in_training(aspirin_frames, aspirin_positions):
    """A replica that failed is still learned from, and must not change the rounding of the others."""
    potential, sizes = recording_sizes(mace(aspirin_frames))
    run(potential, aspirin_positions[:8], stop_unstable=False)
    assert set(sizes) == {8}


def gas():
    """Twelve argon atoms in a small box, close enough to meet."""
    grid = torch.tensor([[i, j, k] for i in range(3) for j in range(2) for k in range(2)], dtype=torch.float64)
    return Atoms("Ar12", positions=2.4 * grid.numpy() + 0.5, cell=[7.6] * 3, pbc=True)


def test_smaller_batch_with_search_at_every_step():
    system = System.from_atoms(gas())
    start = torch.tensor(gas().positions).repeat(4, 1, 1)
    ends = []
    for active in (torch.ones(4, dtype=torch.bool), torch.tensor([True, False, False, False])):
        simulator = Simulator(
            PairRepulsion(system),
            Langevin(3000.0, 2.0, 1.0),
            NonFinite(),
            check_every_fs=10.0,
            skin_A=0.0,
            execution=PLAIN,
        )
        window = simulator.run(simulator.prepare(start, seeded()), 20, 10, seeded(1), active=active, stop_unstable=True)
        assert simulator.repeated_blocks > 0
        ends.append(window.end.positions[0])
    torch.testing.assert_close(*ends, rtol=0.0, atol=1e-9)
