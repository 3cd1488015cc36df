"""Pair potentials on top of a model: against SciPy's splines, and against the potential that they should find."""

import numpy as np
import pytest
import torch
from ase.calculators.calculator import Calculator
from ase.neighborlist import neighbor_list
from pair_quadrature import (
    ARGON,
    KT,
    SIDE,
    TEMPERATURE_K,
    GaussianPotential,
    Gaussians,
    boltzmann_weights,
    grid_of_pairs,
)
from scipy.interpolate import BSpline

from stable_plugin import RadialDistribution, System
from stable_plugin.algorithm.estimator import BoltzmannEstimator
from stable_plugin.models import FineTuningModule, NoInteraction, PairCorrected, find_potential
from stable_plugin.testing import PotentialConformance
from stable_plugin.testing.tools import small_water_box

PAIRS = {"O-H": 1.3, "H-H": 1.8}
CUTOFF, WIDTH = 3.0, 0.25


def corrected(model=None, pairs=PAIRS, cutoff=CUTOFF, spacing=WIDTH, scale=0.1):
    torch.manual_seed(0)
    model = PairCorrected(Gaussians(cutoff=CUTOFF) if model is None else model, pairs, cutoff, spacing).double()
    with torch.no_grad():
        for coefficients in model.correction.values():
            coefficients.normal_(std=scale)
    return model


def spline(model, name):
    """Return SciPy's spline with the coefficients of a pair."""
    splines = model.splines[name]
    knots = splines.r_min + splines.width * np.arange(-3, splines.n_intervals + 4)
    return BSpline(knots, np.pad(model.correction[name].detach().numpy(), 3), 3, extrapolate=False)


class SplineCalculator(Calculator):
    """Gaussians and splines from SciPy over the pairs that ASE finds."""

    implemented_properties = ("energy", "forces")

    def __init__(self, model):
        super().__init__()
        self.model = model

    def calculate(self, atoms=None, properties=None, system_changes=None):
        system = System.from_atoms(atoms, bonds=[])
        positions = torch.tensor(atoms.positions)[None]
        base = GaussianPotential(self.model.model, system)
        energy, forces = base.energies_and_forces(positions, base.edges(positions))
        energy, forces = energy.item(), forces[0].numpy().copy()
        first, second, distances, vectors = neighbor_list("ijdD", atoms, CUTOFF)
        symbols = np.array(atoms.get_chemical_symbols())
        for name in self.model.correction:
            own = spline(self.model, name)
            wanted = [{symbols[i], symbols[j]} == set(name.split("-")) for i, j in zip(first, second, strict=True)]
            wanted &= distances > self.model.splines[name].r_min
            r, unit = distances[wanted], vectors[wanted] / distances[wanted][:, None]
            energy += 0.5 * np.nan_to_num(own(r)).sum()
            slopes = np.nan_to_num(own.derivative()(r))
            np.add.at(forces, first[wanted], slopes[:, None] * unit)
        self.results = {"energy": energy, "forces": forces}


class TestPairCorrected(PotentialConformance):
    def make_module(self):
        return corrected()

    def make_calculator(self, module, atoms):
        return SplineCalculator(module)

    def make_structures(self):
        return {"water": small_water_box()}


def test_splines_end_smoothly():
    model = corrected()
    splines, ends = model.splines["O-H"], torch.tensor([1.3, CUTOFF], dtype=torch.float64)
    inside = (ends + torch.tensor([1e-4, -1e-4])).requires_grad_(True)
    energies = splines(inside, model.correction["O-H"])
    (slopes,) = torch.autograd.grad(energies.sum(), inside)
    assert energies.abs().max() < 1e-11
    assert slopes.abs().max() < 1e-6
    assert model.pair_energies("O-H", torch.tensor([0.0, 1.0, 1.3, CUTOFF, 5.0])).eq(0).all()
    assert model.correction["O-H"].shape == (4,)  # seven intervals of 0.243 Å


def test_correction_finds_what_the_model_lacks():
    """With g(r) of two atoms as the target, the correction is the difference of two pair potentials."""
    system = System.from_atoms(ARGON)
    frames = grid_of_pairs(n=8)
    truth = corrected(Gaussians(), {"Ar-Ar": 1.0}, cutoff=0.5 * SIDE, spacing=0.4, scale=0.03)
    model = corrected(truth.model, {"Ar-Ar": 1.0}, cutoff=0.5 * SIDE, spacing=0.4, scale=0.0)
    truth.model.requires_grad_(False)
    potential = find_potential(model, system)
    g = RadialDistribution(bin_width=0.1, smearing=0.0, r_max=0.5 * SIDE)
    g.bind(system, frames)
    values = g.per_frame(frames)
    target = (boltzmann_weights(find_potential(truth, system), frames)[:, None] * values).sum(dim=0)
    estimator = BoltzmannEstimator(potential, TEMPERATURE_K)
    parameters = potential.trainable_parameters()
    optimizer = torch.optim.LBFGS(parameters, max_iter=20, line_search_fn="strong_wolfe")

    def loss():
        estimate = estimator.estimate(frames, [values], [target], weights=boltzmann_weights(potential, frames))
        for parameter, gradient in zip(parameters, estimate.gradients, strict=True):
            parameter.grad = gradient
        return torch.tensor(estimate.loss)

    optimizer.step(loss)
    distances = torch.linspace(1.0, 0.5 * SIDE, 50, dtype=torch.float64)
    difference = model.pair_energies("Ar-Ar", distances) - truth.pair_energies("Ar-Ar", distances)
    assert truth.pair_energies("Ar-Ar", distances).abs().max() > 0.5 * KT
    assert difference.abs().max() < 0.02 * KT


def test_force_metric_is_the_change_of_the_forces():
    model, frame = corrected(scale=0.0), small_water_box()
    potential = find_potential(model, System.from_atoms(frame, bonds=[]))
    positions = torch.tensor(frame.positions)[None]
    edges = potential.edges(positions)
    _, before = potential.energies_and_forces(positions, edges)
    changes = [torch.randn_like(each) for each in model.correction.values()]
    with torch.no_grad():
        for coefficients, change in zip(model.correction.values(), changes, strict=True):
            coefficients.copy_(change)
    _, after = potential.energies_and_forces(positions, edges)
    change = torch.cat(changes)
    assert (change @ model.force_metric([frame]) @ change).item() == pytest.approx(
        (after - before).square().mean().item()
    )


def test_only_the_correction_is_trained(tmp_path):
    pytest.importorskip("mace")
    from stable_plugin.models.mace import MACEModule

    frames = [small_water_box()]
    torch.manual_seed(0)
    mace = MACEModule(r_max=3.5, hidden_irreps="4x0e", max_ell=1, correlation=1)
    for frame in frames:
        frame.info["REF_energy"], frame.arrays["REF_forces"] = 0.0, np.zeros((len(frame), 3))
    mace.prepare(frames)
    mace.save_potential(tmp_path / "mace.model")
    model = PairCorrected(tmp_path / "mace.model", PAIRS, cutoff=3.5)
    module = FineTuningModule(model, trainable="correction.*", E0s="model")
    module.prepare(frames)
    trained = [name for name, parameter in module.model.named_parameters() if parameter.requires_grad]
    assert set(trained) == {"correction.O-H", "correction.H-H"}
    # A file of the family would not hold the correction.
    assert module.potential_suffix == ".pt"
    with torch.no_grad():
        model.correction["O-H"].fill_(0.1)
    module.save_potential(tmp_path / "corrected.pt")
    again = FineTuningModule(PairCorrected(tmp_path / "mace.model", PAIRS, cutoff=3.5))
    again.load_potential(tmp_path / "corrected.pt")
    assert again.model.correction["O-H"].tolist() == model.correction["O-H"].tolist()
    assert again.total_energies(frames) == pytest.approx(module.total_energies(frames))
    assert MACEModule(model=tmp_path / "mace.model").total_energies(frames) != pytest.approx(
        module.total_energies(frames)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pairs": {}}, r"pairs=\{\} must name pairs and their smallest distances"),
        ({"pairs": ["O-H"]}, r"pairs=\['O-H'\] must name pairs"),
        ({"pairs": {"OH": 1.3}}, "'OH' is not a pair of elements: write for instance 'O-H'"),
        ({"pairs": {"O-Q": 1.3}}, "'O-Q' is not a pair of elements"),
        ({"pairs": {"O-H": 1.3, "H-O": 1.3}}, "names O-H and H-O, which are the same: remove one"),
        ({"pairs": {"O-H": 2.5}}, "leaves 2 intervals between 2.5 Å and the cutoff of 3 Å for O-H"),
        ({"pairs": {"O-H": -1.0}}, r"pairs\['O-H'\]=-1.0"),
        ({"cutoff": 0.0}, r"cutoff=0\.0"),
        ({"spacing": 0.0}, r"spacing=0\.0"),
    ],
)
def test_arguments_are_validated(arguments, message):
    with pytest.raises(ValueError, match=message):
        PairCorrected(NoInteraction(), **{"pairs": PAIRS, "cutoff": CUTOFF, **arguments})


def test_cutoff_beyond_that_of_the_model_is_refused():
    system = System.from_atoms(ARGON)
    with pytest.raises(ValueError, match=r"cutoff=3\.5: Gaussians has a cutoff of 3 Å"):
        find_potential(PairCorrected(Gaussians(), {"Ar-Ar": 1.0}, cutoff=3.5), system)
    with pytest.raises(ValueError, match="NoInteraction builds its own graph"):
        find_potential(PairCorrected(NoInteraction(), {"Ar-Ar": 1.0}, cutoff=3.0), system)


def test_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.model"):
        PairCorrected(str(tmp_path / "nothing.model"), PAIRS, cutoff=3.0)
