"""Replicas that have failed for good leave the batch that the model is called with."""

import pytest
import torch
from test_cuda_graph import PLAIN, capturing, seeded, with_fixed_edges
from toys import PairRepulsion, as_potential, tiny_mace

from stable_plugin import Langevin, NonFinite, System
from stable_plugin.detectors import Detector
from stable_plugin.md import Simulator
from stable_plugin.md.simulator import _ladder


class FallsAt(Detector):
    """Has each replica fail at a given look, whatever it does."""

    capturable = False

    def __init__(self, looks):
        super().__init__(0.5, None)
        self.looks, self.look = torch.tensor(looks), 0

    def measure(self, positions, velocities):
        self.look += 1
        return (self.look >= self.looks).to(positions)


def mace(frames):
    system = System.from_atoms(frames[0])
    return as_potential(tiny_mace(system.numbers, atomic_inter_scale=20.0), system)


def watched(potential):
    """The potential, and the number of replicas in each call of it."""
    sizes, plain = [], potential.energies_and_forces

    def counting(positions, edges):
        sizes.append(len(positions))
        assert not len(edges.index[0]) or int(edges.index.max()) < positions.shape[0] * positions.shape[1]
        return plain(positions, edges)

    potential.energies_and_forces = counting
    return potential, sizes


LOOKS = [9, 1, 2, 2, 9, 1, 1, 3]
"""Of eight replicas, how many looks of the detector each one lasts; there are four."""


def run(potential, positions, stop_unstable=True, prepare=lambda simulator: simulator):
    simulator = prepare(
        Simulator(potential, Langevin(500.0, 0.5, 1.0), FallsAt(LOOKS), check_every_fs=2.5, execution=PLAIN)
    )
    generator = seeded(1)
    start = simulator.prepare(positions, seeded())
    return simulator.run(start, 20, 5, generator, stop_unstable=stop_unstable), simulator, generator.get_state()


def test_sizes_are_halves_of_each_other():
    assert _ladder(8) == [8, 4, 2, 1]
    assert _ladder(5) == [5, 3, 2, 1]
    assert _ladder(1) == [1]


@pytest.mark.parametrize("prepare", [lambda simulator: simulator, with_fixed_edges, capturing])
def test_the_batch_shrinks_by_halves_and_the_others_go_their_way(aspirin_frames, aspirin_positions, prepare):
    positions = aspirin_positions[:8]
    expected, _, noise = run(mace(aspirin_frames), positions, stop_unstable=False)
    potential, sizes = watched(mace(aspirin_frames))
    window, simulator, noise_after = run(potential, positions, prepare=prepare)
    assert window.unstable_step.tolist() == [-1, 5, 10, 10, -1, 5, 5, 15]
    # Five are left after the first look, three after the second, two after the third.
    assert sorted(set(sizes), reverse=True) == [8, 4, 2]
    if not simulator.capturing:
        assert sizes[1:] == [8] * 10 + [4] * 5 + [2] * 5
    for replica, look in enumerate(LOOKS):
        lasted = min(look, 4)
        torch.testing.assert_close(
            window.positions[:lasted, replica], expected.positions[:lasted, replica], rtol=0.0, atol=1e-9
        )
        assert torch.equal(window.end.positions[replica], window.positions[lasted - 1, replica])
    assert torch.equal(noise_after, noise), "noise is drawn for all, whoever is in the batch"


def test_in_training_the_batch_stays_whole(aspirin_frames, aspirin_positions):
    """There a replica that failed goes on being learned from, and what others do must not hang on it."""
    potential, sizes = watched(mace(aspirin_frames))
    run(potential, aspirin_positions[:8], stop_unstable=False)
    assert set(sizes) == {8}


def test_a_search_at_every_step_finds_the_same_forces_in_a_smaller_batch():
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


def gas():
    """Twelve argon atoms in a small box, close enough to meet."""
    from ase import Atoms

    grid = [[i, j, k] for i in range(3) for j in range(2) for k in range(2)]
    return Atoms(
        "Ar12", positions=2.4 * torch.tensor(grid, dtype=torch.float64).numpy() + 0.5, cell=[7.6] * 3, pbc=True
    )
