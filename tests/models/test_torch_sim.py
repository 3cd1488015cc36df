"""torch-sim's models are evaluated with their own forces."""

import numpy as np
import pytest
import torch
from ase.build import bulk

from stable_plugin import Evaluator, Langevin, System
from stable_plugin.md.cells import stack_cells
from stable_plugin.md.system import stack_positions
from stable_plugin.models import find_potential

torch_sim = pytest.importorskip("torch_sim")
from torch_sim.io import atoms_to_state  # noqa: E402
from torch_sim.models.lennard_jones import LennardJonesModel  # noqa: E402

SIGMA, EPSILON, CUTOFF = 3.4, 0.0104, 7.0


def lennard_jones(**changes):
    return LennardJonesModel(SIGMA, EPSILON, torch.device("cpu"), torch.float64, cutoff=CUTOFF, **changes)


def by_hand(atoms):
    """Return the energy by arithmetic, with the images of a periodic cell."""
    reach = range(-2, 3) if atoms.pbc.any() else range(1)
    energy = 0.0
    for image in np.array([(i, j, k) for i in reach for j in reach for k in reach]):
        vectors = atoms.positions[None] - atoms.positions[:, None] + image @ atoms.cell.array
        lengths = np.linalg.norm(vectors, axis=-1)
        ratio = (SIGMA / lengths[(lengths > 0) & (lengths < CUTOFF)]) ** 6
        energy += 2.0 * EPSILON * (ratio**2 - ratio).sum()
    return energy


def assert_same_as_torch_sim(frame, energy, forces):
    """Compare the energy with arithmetic, and the forces with those that the model returns for a state of torch-sim."""
    assert energy.item() == pytest.approx(by_hand(frame), rel=1e-9)
    output = lennard_jones()(atoms_to_state([frame], torch.device("cpu"), torch.float64))
    torch.testing.assert_close(forces, output["forces"], rtol=0.0, atol=1e-10)


def argon(strain=1.0, seed=0, rattle=0.2):
    atoms = bulk("Ar", "fcc", 5.3, cubic=True) * (2, 2, 2)
    atoms.set_cell(atoms.cell.array * [[strain], [1.0], [1.0]], scale_atoms=True)
    atoms.rattle(rattle, seed=seed)
    return atoms


def test_forces_are_those_of_the_model_in_each_cell():
    frames = [argon(), argon(1.05, seed=1)]
    potential = find_potential(lennard_jones(), System.from_atoms(frames[0], bonds=[]))
    positions = stack_positions(frames, potential.system, "frames")
    edges = potential.edges(positions, stack_cells(frames, potential.system))
    energies, forces = potential.energies_and_forces(positions, edges)
    for each in zip(frames, energies, forces, strict=True):
        assert_same_as_torch_sim(*each)
    single = potential.energies_and_forces(positions[:1], potential.edges(positions[:1]))[0]
    assert single.item() == pytest.approx(energies[0].item(), rel=1e-12)


def test_clusters_have_no_images():
    cluster = argon()[:6]
    cluster.pbc, cluster.cell = False, None
    potential = find_potential(lennard_jones(), System.from_atoms(cluster, bonds=[]))
    positions = torch.tensor(cluster.positions)[None]
    energies, forces = potential.energies_and_forces(positions, potential.edges(positions))
    assert_same_as_torch_sim(cluster, energies[0], forces[0])


def test_evaluator_simulates_with_the_model():
    evaluator = Evaluator(
        [argon(rattle=0.05)], [argon(seed=seed, rattle=0.05) for seed in range(4)], integrator=Langevin(30.0, 5.0, 1.0), n_replicas=2,
        horizons_ps=[0.1], record_every_fs=10.0, check_every_fs=10.0,
    )  # fmt: skip
    assert evaluator.evaluate(lennard_jones()).summaries[0]["unstable"] == 0


def test_models_without_forces_and_training_are_refused():
    system = System.from_atoms(argon(), bonds=[])
    with pytest.raises(ValueError, match="LennardJonesModel has compute_forces=False"):
        find_potential(lennard_jones(compute_forces=False), system)
    potential = find_potential(lennard_jones(), system)
    positions = torch.tensor(argon().positions)[None]
    with pytest.raises(TypeError, match="LennardJonesModel is a torch-sim model"):
        potential.energies(positions, potential.edges(positions))
