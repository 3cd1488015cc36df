"""Estimates and a training in several processes: ``python several_processes.py FOLDER SIZE``, started once for all ranks.

Forks one process per rank, which communicate over gloo and save what they compute in ``FOLDER/RANK.pt``.
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
from springs import SOFT, STIFF, TEMPERATURE, adam, make_loop, optimizer_step, simulated
from torch import distributed, multiprocessing
from toys import TRIATOMIC, as_potential, tiny_mace, triatomic

from stable_plugin import BondAmplitudes, BondLengths, Langevin, System
from stable_plugin.algorithm.estimator import BoltzmannEstimator
from stable_plugin.algorithm.systems_loop import SystemsLoop
from stable_plugin.algorithm.window_data import WindowEstimator
from stable_plugin.md.neighborhoods import Molecules
from stable_plugin.observables import LocalBondLengths
from stable_plugin.runtime.distributed import DistributedContext

TRAIN = Path(__file__).parents[2] / "recipes" / "data" / "aspirin_train.extxyz"


def frame_counts(n_frames, size):
    """Return the number of frames of each rank: uneven numbers, and none for the last of more than two ranks."""
    n_filled = size if size == 2 else size - 1
    cuts = [round(n_frames * (rank / n_filled) ** 1.5) for rank in range(n_filled)] + [n_frames]
    counts = [after - before for before, after in pairwise(cuts)]
    return counts + [0] * (size - len(counts))


def whole_frames():
    """Return a MACE model, frames of aspirin, and a function that makes an estimator for a context."""
    frames = read(TRAIN, ":12")
    system = System.from_atoms(frames[0])
    potential = as_potential(tiny_mace(system.numbers), system)
    positions = torch.tensor([frame.positions for frame in frames])
    observables = [BondLengths(target=[1.3] * len(system.bonds)), BondAmplitudes()]
    for observable in observables:
        observable.bind(system, positions)

    def make_estimator(context):
        return WindowEstimator(BoltzmannEstimator(potential, 500.0, 4, context), observables)

    return potential, positions, make_estimator


def single_molecules():
    """Return the same for pairs of atoms, each molecule one sample."""
    system, potential = pairs(5)
    positions = boltzmann_frames(40, 5, torch.Generator().manual_seed(2))
    observable = LocalBondLengths(target=[0.2])
    observable.bind(system, positions)

    def make_estimator(context):
        local = Molecules()
        return WindowEstimator(BoltzmannEstimator(potential, LOCAL_TEMPERATURE, 16, context), [observable], local=local)

    return potential, positions, make_estimator


def estimates(case, context):
    """Return estimates from the frames of this process, as simulated and with changed parameters, and the observed loss."""
    potential, positions, make_estimator = case()
    estimator = make_estimator(context)
    own = positions.split(frame_counts(len(positions), context.size) if context.size > 1 else len(positions))
    data = estimator.collect(own[context.rank], 1, torch.Generator().manual_seed(context.rank))
    found = [estimator.estimate(data)]
    with torch.no_grad():
        for parameter in potential.trainable_parameters():
            parameter.mul_(1.01)
    weights, fraction = estimator.reweight(data)
    found.append(estimator.estimate(data, weights))
    return {
        "estimates": [asdict(each) for each in found],
        "ess_fraction": fraction,
        "loss": estimator.observed_loss(data.positions),
    }


def training(context, failing_rank=None, temperatures_K=(TEMPERATURE,)):
    """Train springs that are too soft, and return the windows, the final parameter, and the first and last positions.

    With several temperatures, these are several systems.
    """
    start = torch.tensor(TRIATOMIC.positions).repeat(20, 1, 1)
    reference = simulated(triatomic(STIFF), start, 400).positions[1:].flatten(0, 1)
    potential = triatomic(SOFT)
    loops = {}
    for number, temperature_K in enumerate(temperatures_K):
        integrator = Langevin(temperature_K, 0.5, 20.0)
        loop = make_loop(potential, reference, n_replicas=8, context=context, seed=number, integrator=integrator)
        loop.name = f"at {temperature_K:g} K"
        loops[loop.name] = loop
    if context.rank == failing_rank:
        loop.simulator.run = all_failing(loop.simulator.run)
    trained = SystemsLoop(loops, [1.0] * len(loops)) if len(loops) > 1 else loop
    optimizer = adam(potential)
    first = loop.replicas.state.positions
    steps = 0
    while steps < 12 and optimizer_step(trained, optimizer) is not None:
        steps += 1
    windows = [{name: value for name, value in asdict(entry).items() if name != "wall_s"} for entry in trained.windows]
    return {
        "windows": windows,
        "log_k": potential.module.log_k.detach(),
        "first": first,
        "last": loop.replicas.state.positions,
    }


def all_failing(run):
    """Return a function that simulates windows without a valid frame."""

    def failing(*arguments, **keywords):
        window = run(*arguments, **keywords)
        return replace(
            window, valid=torch.zeros_like(window.valid), unstable_step=torch.zeros_like(window.unstable_step)
        )

    return failing


def work(rank, size, folder):
    torch.set_num_threads(1)
    store = distributed.FileStore(str(folder / "store"), size)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=120))
    context = DistributedContext.current()
    found = {
        "whole frames": estimates(whole_frames, context),
        "single molecules": estimates(single_molecules, context),
        "training": training(context),
        "training with a failing process": training(context, failing_rank=size - 1),
        "training on two systems": training(context, temperatures_K=(200.0, 400.0)),
    }
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    multiprocessing.start_processes(work, (int(sys.argv[2]), Path(sys.argv[1])), int(sys.argv[2]), start_method="fork")
