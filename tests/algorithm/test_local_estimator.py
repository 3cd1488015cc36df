"""The local estimator: against closed answers, and against its own definition written out sample by sample."""

from math import pi, sqrt

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from molecule_pairs import KT, STIFFNESS, TEMPERATURE, boltzmann_frames, pairs
from torch import nn

from stable_plugin import BondLengths, System
from stable_plugin.algorithm.estimator import BoltzmannEstimator
from stable_plugin.algorithm.reweighting import uniform_weights
from stable_plugin.algorithm.window_data import WindowEstimator
from stable_plugin.config import mean_squared_error
from stable_plugin.md.neighborhoods import AtomsWithin, Molecules, NearestMolecules, even_sample
from stable_plugin.models import ModulePotential
from stable_plugin.observables import LocalBondAmplitudes, LocalBondLengths


def linear(mean, target):
    return mean.mean()


def gradients(n_batches, n_frames=20, n_molecules=64):
    """Gradients of the mean bond length by the local and by the global estimator, from the same frames."""
    system, potential = pairs(n_molecules)
    generator = torch.Generator().manual_seed(3)
    reference = boltzmann_frames(2, n_molecules, generator)
    found = {"local": [], "global": []}
    for name, local, observable in (("local", Molecules(), LocalBondLengths()), ("global", None, BondLengths())):
        observable.bind(system, reference)
        window_estimator = WindowEstimator(
            BoltzmannEstimator(potential, TEMPERATURE), [observable], loss=linear, local=local
        )
        generator.manual_seed(4)
        for _ in range(n_batches):
            sample = window_estimator.collect(boltzmann_frames(n_frames, n_molecules, generator), 1, generator)
            found[name].append(window_estimator.estimate(sample).gradients[0].item())
    return {name: np.array(values) for name, values in found.items()}


def test_local_gradient_is_exact_for_molecules():
    """<|r|> = sqrt(8 kT / (π k)), so d<|r|>/dk = -<|r|> / (2 k); the noise of the other 63 molecules is left out."""
    exact = -sqrt(8 * KT / (pi * STIFFNESS)) / (2 * STIFFNESS)
    found = gradients(n_batches=150)
    for values in found.values():
        standard_error = values.std(ddof=1) / sqrt(len(values))
        assert abs(values.mean() - exact) < 3 * standard_error
    assert found["global"].var(ddof=1) > 64 / 4 * found["local"].var(ddof=1)


def mixture(seed=0, n_molecules=5):
    """Water and methane in a periodic slanted box, atoms shuffled, some molecules across the boundary."""
    random = np.random.default_rng(seed)
    cell = 9.0 * np.array([[1.0, 0.0, 0.0], [0.3, 1.0, 0.0], [-0.2, 0.1, 1.0]])
    box = Atoms(cell=cell, pbc=True)
    for place in range(n_molecules):
        one = molecule("H2O" if place % 2 else "CH4")
        one.translate(np.array([place % 2, place // 2 % 2, place // 4]) / 2 @ cell)
        box += one
    box.positions += random.normal(scale=0.03, size=box.positions.shape)
    box.wrap()
    return box[random.permutation(len(box))]


class Anything(nn.Module):
    """Atomic energies that depend on every coordinate, with two parameters."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([0.7, -0.3], dtype=torch.float64))

    def forward(self, positions):
        return self.a[0] * positions.sin().sum(-1) + self.a[1] * (positions.square().sum(-1) * 0.1).cos()


@pytest.mark.parametrize("local", [Molecules(), NearestMolecules(3), AtomsWithin(2.5)], ids=str)
def test_local_gradient_follows_its_definition(local):
    box = mixture()
    system = System.from_atoms(box)
    potential = ModulePotential(Anything(), system)
    generator = torch.Generator().manual_seed(0)
    positions = torch.tensor(box.positions) + 0.05 * torch.randn(
        6, len(box), 3, generator=generator, dtype=torch.float64
    )
    observables = [LocalBondLengths(target=[1.2, 0.9]), LocalBondAmplitudes()]
    for observable in observables:
        observable.bind(system, positions)
    window_estimator = WindowEstimator(BoltzmannEstimator(potential, TEMPERATURE, chunk=4), observables, local=local)
    found = window_estimator.estimate(window_estimator.collect(positions, 1, generator))

    expected = torch.zeros(2, dtype=torch.float64)
    loss = 0.0
    for observable in observables:
        for kind in range(2):
            values, slopes = [], []
            for frame in positions:
                atoms = Atoms(box.numbers, frame.numpy(), cell=box.cell, pbc=True)
                atomic = potential.module(frame[None])[0]
                for site in range(int(local.site_index.max()) + 1):
                    value = bond_value(atoms, system, observable, kind, (local.site_index == site).tolist())
                    if value is not None:
                        energy = atomic[neighborhood(atoms, system, local, site)].sum()
                        values.append(value)
                        slopes.append(torch.autograd.grad(energy, potential.module.a, retain_graph=True)[0])
            covariance = np.cov(np.array(values), torch.stack(slopes).T.numpy())[0, 1:]
            off = np.mean(values) - observable.target[kind].item()
            loss += off**2 / 2
            expected += torch.tensor(-covariance / KT * off)  # ∂(mean of two squares)/∂mean is the difference itself
    assert found.loss == pytest.approx(loss, rel=1e-9)
    assert torch.allclose(found.gradients[0], expected, rtol=1e-8)


def bond_value(atoms, system, observable, kind, own):
    """Return the observable of one site, bond by bond with ASE's distances."""
    values = []
    for i, j in system.bonds.tolist():
        if "-".join(sorted([system.symbols[i], system.symbols[j]])) == observable.kinds[kind] and (own[i] or own[j]):
            values.append(atoms.get_distance(i, j, mic=True))
    if not values:
        return None
    if isinstance(observable, LocalBondLengths):
        return float(np.mean(values))
    names = ["-".join(sorted([system.symbols[i], system.symbols[j]])) for i, j in system.bonds.tolist()]
    rest = observable._mean_lengths[names.index(observable.kinds[kind])].item()
    return float(np.mean((np.array(values) - rest) ** 2))


def neighborhood(atoms, system, local, site):
    """Return the indices of its atoms, by ASE's minimum image."""
    owner = local.site_index.numpy()
    if isinstance(local, AtomsWithin):
        return [i for i in range(len(atoms)) if atoms.get_distance(site, i, mic=True) <= local.radius_A]
    if isinstance(local, NearestMolecules):
        centers = []
        for m in range(owner.max() + 1):
            members = np.flatnonzero(owner == m)
            arms = atoms.get_distances(members[0], members, mic=True, vector=True)
            centers.append(atoms.positions[members[0]] + arms.mean(axis=0))
        apart = Atoms("He" * len(centers), centers, cell=atoms.cell, pbc=True).get_distances(
            site, range(len(centers)), mic=True
        )
        return np.flatnonzero(np.isin(owner, np.argsort(apart)[: local.n]))
    return np.flatnonzero(owner == site)


def test_reweight_uses_the_energy_of_each_site():
    """Frames reweighted to a changed stiffness have the exact mean of the changed potential."""
    n_molecules, n_frames = 8, 4000
    system, potential = pairs(n_molecules)
    generator = torch.Generator().manual_seed(5)
    positions = boltzmann_frames(n_frames, n_molecules, generator)
    observable = LocalBondLengths()
    observable.bind(system, positions[:2])
    window_estimator = WindowEstimator(
        BoltzmannEstimator(potential, TEMPERATURE, chunk=4000), [observable], local=Molecules()
    )
    sample = window_estimator.collect(positions, 1, generator)
    assert window_estimator.estimate(sample).ess_fraction == pytest.approx(1.0)
    with torch.no_grad():
        potential.module.k.mul_(1.3)
    weights, fraction = window_estimator.reweight(sample)
    after = window_estimator.estimate(sample, weights)
    assert after.mean.item() == pytest.approx(sqrt(8 * KT / (pi * 1.3 * STIFFNESS)), rel=0.01)
    assert 0.8 < after.ess_fraction < 1.0, "a whole frame of eight molecules would have far less"
    assert fraction == after.ess_fraction


def test_local_and_global_gradients_are_added():
    system, potential = pairs(4)
    generator = torch.Generator().manual_seed(1)
    positions = boltzmann_frames(10, 4, generator)
    by_site, whole = LocalBondLengths(target=[0.3]), BondLengths(target=[0.1, 0.2, 0.3, 0.4])
    for observable in (by_site, whole):
        observable.bind(system, positions)
    estimator = BoltzmannEstimator(potential, TEMPERATURE)

    def gradient(observables, local):
        window_estimator = WindowEstimator(estimator, observables, local=local)
        return window_estimator.estimate(window_estimator.collect(positions, 1, generator))

    together = gradient([by_site, whole], Molecules())
    apart = [gradient([by_site], Molecules()), gradient([whole], None)]
    assert together.loss == pytest.approx(sum(part.loss for part in apart), rel=1e-12)
    assert together.gradients[0].item() == pytest.approx(sum(part.gradients[0].item() for part in apart), rel=1e-10)


def test_estimate_ignores_missing_values():
    _, potential = pairs(2)
    positions = boltzmann_frames(6, 2, torch.Generator().manual_seed(2))
    estimator = BoltzmannEstimator(potential, TEMPERATURE)
    value = torch.tensor([1.0, 2.0, torch.nan, 4.0, torch.nan, 9.0], dtype=torch.float64)[:, None]
    held = ~torch.isnan(value[:, 0])
    target = [torch.zeros(1, dtype=torch.float64)]
    loss = lambda mean: mean_squared_error(mean, target[0])  # noqa: E731
    term = estimator.surrogate_term(positions, [value], [loss], uniform_weights(6, positions), None)
    alone = estimator.estimate(positions[held], [value[held]], target)
    assert estimator.combine(positions, [term]).gradients[0].item() == pytest.approx(
        alone.gradients[0].item(), rel=1e-12
    )
    assert term.mean.item() == pytest.approx(4.0)


def test_even_sample_draws_equally_from_bins():
    deviation = torch.cat([torch.linspace(0.0, 0.0999, 990), torch.tensor([0.55, 0.95, 1.0, 1.0])])
    drawn = even_sample(deviation, 10, 3, torch.Generator().manual_seed(0))
    assert len(set(drawn.tolist())) == len(drawn)
    bins = (deviation[drawn] * 10).long().clamp(max=9).bincount(minlength=10)
    assert bins.tolist() == [3, 0, 0, 0, 0, 1, 0, 0, 0, 3]
    again = even_sample(deviation, 10, 3, torch.Generator().manual_seed(1))
    assert drawn.tolist() != again.tolist()
    assert even_sample(torch.zeros(5), 10, 2, torch.Generator()).numel() == 2, "all alike: all in one bin"


@pytest.mark.parametrize(
    ("local", "atoms", "message"),
    [
        (Molecules(), bulk("Cu", cubic=True) * 2, r"Molecules\(\) finds no molecules.*Use AtomsWithin"),
        (Molecules(), molecule("CH4"), r"finds a single molecule.*remove local"),
        (NearestMolecules(9), mixture(), r"n=9 is more than the 5 molecules"),
        (AtomsWithin(6.0), mixture(), r"radius_A=6 is more than the cell allows, 4\.\d\d Å"),
    ],
)
def test_bind_rejects_systems_without_sites(local, atoms, message):
    with pytest.raises(ValueError, match=message):
        local.bind(System.from_atoms(atoms))


def test_settings_that_do_not_fit_are_refused():
    system, potential = pairs(3)
    estimator = BoltzmannEstimator(potential, TEMPERATURE)
    whole = BondLengths()
    whole.bind(system, boltzmann_frames(2, 3, torch.Generator()))
    with pytest.raises(ValueError, match=r"local=Molecules\(\) has no observable to work on"):
        WindowEstimator(estimator, [whole], local=Molecules())
    with pytest.raises(ValueError, match=r"even_sampling=\(9, 9\) needs the local estimator"):
        WindowEstimator(estimator, [whole], even_sampling=(9, 9))
