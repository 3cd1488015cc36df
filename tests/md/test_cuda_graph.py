"""Captured blocks with a stand-in for CUDA graphs; ``make test-cuda`` tests them on a device."""

import logging

import pytest
import torch
from ase import Atoms
from ase.build import molecule
from captured import PLAIN, Refuser, capturing, seeded, with_fixed_edges
from torch.utils._python_dispatch import TorchDispatchMode
from toys import PairRepulsion, as_potential, tiny_mace, triatomic

from stable_plugin import (
    AngleLimits,
    AnyOf,
    BondDeviation,
    BondLimits,
    ChiralityLimits,
    ClosestContact,
    ContactLimits,
    CoordinationNumber,
    IntermolecularContact,
    Langevin,
    LindemannCriterion,
    MomentumLimits,
    NonFinite,
    NoseHooverChain,
    ObservableDeviation,
    PlaneLimits,
    RadialDistribution,
    RingLimits,
    RunawayTemperature,
    System,
    TemperatureLimits,
)
from stable_plugin.md import Execution, Simulator


def aspirin_simulator(frames, integrator=None, **changes):
    system = System.from_atoms(frames[0])
    potential = as_potential(tiny_mace(system.numbers, atomic_inter_scale=20.0), system)
    detector = AnyOf([BondDeviation(0.2, 0.8), RunawayTemperature(3000.0)])
    detector.bind(system, torch.tensor(frames[0].positions)[None])
    return Simulator(
        potential, integrator or Langevin(500.0, 0.5, 1.0), detector, check_every_fs=5.0, block_steps=5, **changes
    )


def trajectory(simulator, positions, n_windows=3, n_steps=43):
    """Return windows between which the weights change; their length is not a multiple of a block."""
    generator = seeded(1)
    state, windows = simulator.prepare(positions, seeded()), []
    for _ in range(n_windows):
        window = simulator.run(simulator.refresh(state), n_steps, 20, generator)
        state = window.end
        windows.append(window)
        with torch.no_grad():
            for parameter in simulator.potential.module.parameters():
                parameter.mul_(1.01)
    return windows, generator.get_state()


def same(windows, expected):
    return all(
        torch.equal(getattr(mine, name), getattr(other, name))
        for mine, other in zip(windows, expected, strict=True)
        for name in ("positions", "velocities", "valid", "unstable_step", "stopped")
    ) and torch.equal(windows[-1].end.forces, expected[-1].end.forces)


@pytest.mark.parametrize("integrator", [Langevin(500.0, 0.5, 1.0), NoseHooverChain(500.0, 0.5)])
def test_captured_run_matches_eager_run(aspirin_frames, aspirin_positions, integrator):
    positions = aspirin_positions[:3]
    plain = with_fixed_edges(aspirin_simulator(aspirin_frames, integrator))
    expected, noise = trajectory(plain, positions)
    simulator = capturing(aspirin_simulator(aspirin_frames, integrator))
    windows, noise_after = trajectory(simulator, positions)
    assert same(windows, expected)
    assert torch.equal(noise_after, noise)
    assert (windows[0].positions[0] - windows[1].positions[0]).abs().max() > 0.01
    assert simulator.graphs.captures == 2, "with and without a check by the detector, and not again for new weights"


def test_captured_run_flags_like_eager_run():
    def run(prepare):
        potential = triatomic(10.0)
        detector = BondDeviation(0.3, 1.0)
        positions = torch.tensor(Atoms("OHH", [[0, 0, 0], [1, 0, 0], [-0.3, 0.95, 0]]).positions).repeat(4, 1, 1)
        detector.bind(potential.system, positions)
        simulator = prepare(Simulator(potential, Langevin(300.0, 0.5, 1.0), detector, check_every_fs=2.0))
        start = simulator.prepare(positions, seeded())
        velocities = start.velocities.clone()
        velocities[1, 1, 0] += 4.0
        velocities[2, 1, 0] += 1.5
        return simulator.run(start.replace(velocities=velocities), 60, 4, seeded(1))

    window, expected = run(capturing), run(with_fixed_edges)
    assert same([window], [expected])
    assert window.unstable.tolist()[1:3] == [True, True]
    assert window.stopped.any()
    assert not window.stopped.all()


def test_replaced_tensors_are_captured_again(aspirin_frames, aspirin_positions):
    simulator = capturing(aspirin_simulator(aspirin_frames))
    start = simulator.prepare(aspirin_positions[:2], seeded())
    generator = seeded(1)
    simulator.run(start, 20, 20, generator)
    simulator.run(start, 20, 20, generator)
    assert simulator.graphs.captures == 2
    simulator.run(simulator.prepare(aspirin_positions[:3], seeded()), 20, 20, generator)
    assert simulator.graphs.captures == 4, "another number of replicas"
    module = simulator.potential.module
    parameter = next(iter(module.parameters()))
    parameter.data = 1.01 * parameter.data
    simulator.run(simulator.prepare(aspirin_positions[:3], seeded()), 20, 20, generator)
    assert simulator.graphs.captures == 6, "the weights are at other addresses"


def test_overflow_is_captured_again():
    grid = torch.stack(torch.meshgrid(*[torch.arange(2.0)] * 3, indexing="ij"), dim=-1).reshape(-1, 3)
    positions = 2.7 * grid.double().repeat(2, 1, 1)
    system = System.from_atoms(Atoms("H8", positions=positions[0].numpy()), bonds=[])

    def run(prepare):
        simulator = prepare(
            Simulator(PairRepulsion(system), Langevin(2000.0, 0.5, 2.0), NonFinite(), check_every_fs=5.0)
        )
        start = simulator.prepare(positions, seeded())
        inwards = start.replace(velocities=start.velocities - 0.2 * (positions - 1.35))
        return simulator.run(inwards, 160, 20, seeded(1)), simulator

    (window, simulator), (expected, _) = run(capturing), run(lambda simulator: simulator)
    assert simulator.repeated_blocks >= 1
    assert torch.allclose(window.positions, expected.positions, rtol=0, atol=1e-11)
    assert simulator.graphs.captures > 2


def test_failed_capture_continues_eagerly(aspirin_frames, aspirin_positions, caplog):
    positions = aspirin_positions[:2]
    expected, noise = trajectory(with_fixed_edges(aspirin_simulator(aspirin_frames)), positions)
    with caplog.at_level(logging.WARNING, "stable_plugin"):
        windows, noise_after = trajectory(capturing(aspirin_simulator(aspirin_frames), Refuser), positions)
    assert same(windows, expected)
    assert torch.equal(noise_after, noise)
    (record,) = caplog.records
    assert "ScaleShiftMACE cannot be captured" in record.getMessage()
    assert "not permitted when stream is capturing" in record.getMessage()


def test_failed_capture_is_an_error_if_requested(aspirin_frames, aspirin_positions):
    simulator = capturing(aspirin_simulator(aspirin_frames), Refuser)
    simulator.execution = Execution(capture=True)
    with pytest.raises(RuntimeError, match=r"capture=True: ScaleShiftMACE cannot be captured"):
        simulator.run(simulator.prepare(aspirin_positions[:2], seeded()), 20, 20, seeded(1))


def test_capture_needs_a_cuda_device(aspirin_frames):
    with pytest.raises(ValueError, match=r"capture=True needs a model on a CUDA device"):
        aspirin_simulator(aspirin_frames, execution=Execution(capture=True))


class HostReads(TorchDispatchMode):
    """Counts operations that synchronize host and device on a GPU.

    These read a value, have shapes that depend on values, or copy Python numbers to the device.
    """

    NAMES = frozenset(
        {
            "_local_scalar_dense",
            "nonzero",
            "masked_select",
            "_unique2",
            "unique_dim",
            "equal",
            "lift_fresh",
            "linalg_inv_ex",
        }
    )

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in {"index", "index_put"} and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        self.count += by_mask or name in self.NAMES
        return func(*args, **(kwargs or {}))


def detectors():
    return [
        NonFinite(),
        BondDeviation(0.25, 3.0),
        ClosestContact(0.5),
        IntermolecularContact(0.5),
        RunawayTemperature(3000.0),
        LindemannCriterion(3.0),
        CoordinationNumber(2.5, 50.0),
        AnyOf([BondDeviation(), IntermolecularContact(0.5)]),
    ]


def waters():
    atoms = Atoms(cell=[6.5] * 3, pbc=True)
    for place in ([0, 0, 0], [3, 0, 0], [0, 3, 0], [0, 0, 3]):
        one = molecule("H2O")
        one.translate(place)
        atoms += one
    ends = molecule("CH3CH2OH")
    ends.translate([3.2, 3.2, 3.2])
    atoms += ends
    return atoms


every_detector = pytest.mark.parametrize("detector", detectors(), ids=str)
every_integrator = pytest.mark.parametrize(
    "integrator", [Langevin(300.0, 0.5, 1.0), NoseHooverChain(300.0, 0.5)], ids=lambda each: type(each).__name__
)


@every_detector
@every_integrator
def test_step_does_not_read_the_host(detector, integrator):
    atoms = waters()
    system = System.from_atoms(atoms)
    potential = as_potential(tiny_mace(system.numbers, channels=2), system)
    positions = torch.tensor(atoms.positions)[None].repeat(2, 1, 1)
    detector.bind(system, positions)
    assert detector.capturable

    def reads(block_steps):
        simulator = with_fixed_edges(
            Simulator(
                potential,
                integrator,
                detector,
                check_every_fs=0.5 * block_steps,
                block_steps=block_steps,
                execution=PLAIN,
            )
        )
        start = simulator.prepare(positions, seeded())
        with HostReads() as watched:
            simulator.run(start, 3 * block_steps, 3 * block_steps, seeded(1))
        return watched.count

    reads(1)  # TorchScript specializes in the first calls
    assert reads(1) == reads(4) > 0


LIMITS = [
    BondLimits, AngleLimits, PlaneLimits, ChiralityLimits, RingLimits, ContactLimits, TemperatureLimits, MomentumLimits
]  # fmt: skip


@pytest.mark.parametrize("kind", LIMITS, ids=lambda each: each.__name__)
def test_limits_do_not_read_the_host(kind, aspirin_frames, aspirin_positions):
    detector = AnyOf([kind(500.0)])
    detector.bind(System.from_frames(aspirin_frames), aspirin_positions)
    assert detector.capturable
    velocities = torch.zeros_like(aspirin_positions)
    with HostReads() as watched:
        detector.classify(aspirin_positions, velocities)
    assert watched.count == 0


def test_host_reads_counts_synchronizations():
    reads = [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: (x > 0).nonzero(), lambda x: x.unique()]
    for read in [*reads, lambda x: x * torch.tensor(3.0)]:
        with HostReads() as watched:
            read(torch.ones(3))
        assert watched.count == 1


def test_detector_with_memory_is_not_capturable():
    assert not ObservableDeviation(RadialDistribution()).capturable
    assert not AnyOf([BondDeviation(), ObservableDeviation(RadialDistribution())]).capturable
