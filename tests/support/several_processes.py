"""What each of several processes does in tests: ``python several_processes.py FOLDER SIZE``, started once for all ranks.

It forks one process per rank, which join over gloo and leave what they found in ``FOLDER/RANK.pt``.
"""

import sys
from dataclasses import asdict, replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import torch
from ase.io import read
from molecule_pairs import TEMPERATURE as LOCAL_TEMPERATURE
from molecule_pairs import boltzmann_frames, pairs
from springs import SOFT, STIFF, adam, make_loop, optimizer_step, simulated
from torch import distributed, multiprocessing
from toys import TRIATOMIC, as_potential, tiny_mace, triatomic

from stable_plugin import BondAmplitudes, BondLengths, System
from stable_plugin.algorithm.estimator import BoltzmannEstimator
from stable_plugin.algorithm.window_data import WindowEstimator
from stable_plugin.md.neighborhoods import Molecules
from stable_plugin.observables import LocalBondLengths
from stable_plugin.runtime.distributed import DistributedContext

TRAIN = Path(__file__).parents[2] / "recipes" / "data" / "aspirin_train.extxyz"


def shares(n_frames, size):
    """How many frames each rank holds: uneven numbers, and for the last none where there are more than two."""
    shared = size if size == 2 else size - 1
    cuts = [round(n_frames * (rank / shared) ** 1.5) for rank in range(shared)] + [n_frames]
    counts = [after - before for before, after in pairwise(cuts)]
    return counts + [0] * (size - len(counts))


def whole_frames():
    """A MACE model, frames of aspirin, and a sampler of them for given processes."""
    frames = read(TRAIN, ":12")
    system = System.from_atoms(frames[0])
    potential = as_potential(tiny_mace(system.numbers), system)
    positions = torch.tensor([frame.positions for frame in frames])
    observables = [BondLengths(target=[1.3] * len(system.bonds)), BondAmplitudes()]
    for observable in observables:
        observable.bind(system, positions)

    def sampler(processes):
        return WindowEstimator(BoltzmannEstimator(potential, 500.0, 4, processes), observables)

    return potential, positions, sampler


def single_molecules():
    """Pairs of atoms, each molecule a sample of its own."""
    system, potential = pairs(5)
    positions = boltzmann_frames(40, 5, torch.Generator().manual_seed(2))
    observable = LocalBondLengths(target=[0.2])
    observable.bind(system, positions)

    def sampler(processes):
        local = Molecules()
        return WindowEstimator(
            BoltzmannEstimator(potential, LOCAL_TEMPERATURE, 16, processes), [observable], local=local
        )

    return potential, positions, sampler


def estimates(case, processes):
    """Of the frames that fall to this process: as simulated, and with the weights moved since; with the loss observed."""
    potential, positions, make_sampler = case()
    sampler = make_sampler(processes)
    own = positions.split(shares(len(positions), processes.size) if processes.size > 1 else len(positions))
    sample = sampler.collect(own[processes.rank], 1, torch.Generator().manual_seed(processes.rank))
    found = [sampler.estimate(sample)]
    with torch.no_grad():
        for parameter in potential.trainable_parameters():
            parameter.mul_(1.01)
    weights, share = sampler.reweight(sample)
    found.append(sampler.estimate(sample, weights))
    return {
        "estimates": [asdict(each) for each in found],
        "share": share,
        "loss": sampler.observed_loss(sample.positions),
    }


def training(processes, broken_rank=None):
    """The loop on springs that are too soft: what it goes through, and where it ends."""
    start = torch.tensor(TRIATOMIC.positions).repeat(20, 1, 1)
    reference = simulated(triatomic(STIFF), start, 400).positions[1:].flatten(0, 1)
    potential = triatomic(SOFT)
    loop = make_loop(potential, reference, n_replicas=8, context=processes)
    if processes.rank == broken_rank:
        loop.simulator.run = all_broken(loop.simulator.run)
    optimizer = adam(potential)
    first = loop.replicas.state.positions
    steps = 0
    while steps < 12 and optimizer_step(loop, optimizer) is not None:
        steps += 1
    rounds = [{name: value for name, value in asdict(entry).items() if name != "wall_s"} for entry in loop.windows]
    return {
        "windows": rounds,
        "log_k": potential.module.log_k.detach(),
        "first": first,
        "last": loop.replicas.state.positions,
    }


def all_broken(run):
    """Windows of which no frame is left."""

    def broken(*arguments, **keywords):
        window = run(*arguments, **keywords)
        return replace(
            window, valid=torch.zeros_like(window.valid), unstable_step=torch.zeros_like(window.unstable_step)
        )

    return broken


def work(rank, size, folder):
    torch.set_num_threads(1)
    store = distributed.FileStore(str(folder / "store"), size)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=120))
    processes = DistributedContext.current()
    found = {
        "whole frames": estimates(whole_frames, processes),
        "single molecules": estimates(single_molecules, processes),
        "training": training(processes),
        "training beside a process whose replicas all break": training(processes, broken_rank=size - 1),
    }
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    multiprocessing.start_processes(work, (int(sys.argv[2]), Path(sys.argv[1])), int(sys.argv[2]), start_method="fork")
