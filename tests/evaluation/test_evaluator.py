"""Evaluation of potentials with known behavior."""

from pathlib import Path

import numpy as np
import pytest
import torch
from ase.io import read
from torch import nn
from toys import tiny_mace

from stable_plugin import BondDeviation, BondLengths, Execution, Langevin, VelocityAutocorrelation
from stable_plugin.algorithm.replica_pool import UnusablePotentialError
from stable_plugin.evaluation import Evaluator, evaluate, mean_energy_error
from stable_plugin.md.labels import read_labeled
from stable_plugin.models import ModulePotential

DATA = Path(__file__).parents[2] / "recipes" / "data"
HELDOUT = DATA / "aspirin_heldout.extxyz"


class Network(nn.Module):
    """Springs between all atoms, at rest in the first held-out structure."""

    def __init__(self, stiffness):
        super().__init__()
        self.stiffness = nn.Parameter(torch.tensor(stiffness, dtype=torch.float64))
        self.register_buffer("rest", torch.tensor(read(HELDOUT, 0).get_all_distances()))

    def stable_potential(self, system):
        return ModulePotential(self, system)

    def forward(self, positions):
        distances = torch.cdist(positions, positions, compute_mode="donot_use_mm_for_euclid_dist")
        return 0.25 * self.stiffness * (distances - self.rest).square().sum(dim=(1, 2))


def evaluator(**changes):
    settings = {
        "starts": read(HELDOUT, ":1"),
        "reference": DATA / "aspirin_reference.extxyz",
        "detector": BondDeviation(0.5),
        "integrator": Langevin(300.0, 0.5, 5.0),
        "n_replicas": 4,
        "horizons_ps": [0.05, 0.1],
        "record_every_fs": 10.0,
    }
    return Evaluator(**{**settings, **changes})


def test_evaluate_stable_potential():
    first, last = evaluator().evaluate(Network(2.0)).summaries
    for summary in (first, last):
        assert summary["unstable"] == 0
        assert summary["median_stable_ps"] is None
        assert summary["failures_per_ns"] == 0
        low, high = summary["failures_per_ns_interval"]
        exposure_ns = 4 * summary["horizon_ps"] / 1000.0
        assert low == 0 and high == pytest.approx(3.688879 / exposure_ns, rel=1e-5)
        assert summary["observables"]["bond_lengths"] < 0.2


def test_evaluate_potential_without_forces(tmp_path):
    result = evaluator(horizons_ps=[0.5], integrator=Langevin(2000.0, 0.5, 0.0)).evaluate(Network(0.0), tmp_path)
    (summary,) = result.summaries
    assert summary["unstable"] == 4
    steps = np.diff(result.curves["survival"]["probability"], prepend=1.0)
    times = np.repeat(result.curves["survival"]["time_ps"], np.rint(-4 * steps).astype(int))
    assert len(times) == 4
    assert summary["failures_per_ns"] == pytest.approx(4 / times.sum() * 1000, rel=1e-6)
    reference = np.mean([frame.get_all_distances() for frame in read(DATA / "aspirin_reference.extxyz", ":")], axis=0)
    bonds = evaluator().system.bonds.numpy()

    def deviation(frame):
        lengths = frame.get_all_distances()
        return max(abs(lengths[i, j] - reference[i, j]) for i, j in bonds)

    for path in tmp_path.glob("failed*.extxyz"):
        *earlier, last = read(path, ":")
        assert deviation(last) > 0.5
        assert all(deviation(frame) <= 0.5 + 1e-9 for frame in earlier)
    assert len(list(tmp_path.glob("failed*.extxyz"))) == 3


def test_evaluate_names_each_failure_and_writes_frames_to_label(tmp_path):
    settings = {"horizons_ps": [0.5], "integrator": Langevin(500.0, 0.5, 1.0), "detector": None}
    (summary,) = evaluator(**settings).evaluate(Network(0.0), tmp_path).summaries
    assert summary["verdict"]["state"] == "fails"
    assert summary["verdict"]["failures"] == summary["unstable"] == len(summary["failures"]) == 4
    assert "bond limits or angle limits" in summary["verdict"]["watched"]
    frames = read(tmp_path / "to_label.extxyz", ":")
    by_replica = {frame.info["replica"]: frame for frame in frames if frame.info["stage"] == "first_bad"}
    assert set(by_replica) == {failure["replica"] for failure in summary["failures"]}
    for failure in summary["failures"]:
        frame = by_replica[failure["replica"]]
        assert frame.info["time_ps"] == pytest.approx(failure["time_ps"])
        kind, atoms, value = failure["what"].split()[:3]
        assert frame.info["failure"] == failure["what"]
        indices = [int(name.lstrip("COH")) for name in atoms.split("-")]
        if kind == "bond":
            assert frame.get_distance(*indices) == pytest.approx(float(value), rel=0.01)
        if kind == "angle":
            assert frame.get_angle(*indices) == pytest.approx(float(value), rel=0.01)
    good = [frame for frame in frames if frame.info["stage"] == "last_good"]
    assert all(frame.info["time_ps"] < by_replica[frame.info["replica"]].info["time_ps"] for frame in good)


def test_evaluate_writes_few_frames_of_the_same_failure(tmp_path):
    settings = {"horizons_ps": [0.5], "integrator": Langevin(2000.0, 0.5, 0.0), "n_replicas": 12}
    evaluator(**settings).evaluate(Network(0.0), tmp_path)
    failed = [
        frame.info["offending_atoms"]
        for frame in read(tmp_path / "to_label.extxyz", ":")
        if frame.info["stage"] == "first_bad"
    ]
    assert max(failed.count(atoms) for atoms in failed) <= 3


def test_evaluate_nonfinite_potential():
    with pytest.raises(
        UnusablePotentialError, match=r"all 4 replicas have failed in their start frames .*no finite forces"
    ) as error:
        evaluator().evaluate(Network(float("nan")))
    assert np.allclose(error.value.frame.positions, read(HELDOUT, 0).positions)


def test_evaluate_horizons_and_seed():
    settings = {"horizons_ps": [0.02, 0.04, 0.2], "integrator": Langevin(1500.0, 0.5, 1.0)}
    one, other = (evaluator(**settings).evaluate(Network(0.05)).summaries for _ in range(2))
    counts = [summary["unstable"] for summary in one]
    assert counts == sorted(counts)
    assert one == other


def test_evaluate_errors_equal_mace_calculator(tmp_path):
    pytest.importorskip("mace")
    from mace.calculators import MACECalculator

    from stable_plugin.models.mace.files import save_mace

    model = tiny_mace([1, 6, 8])
    save_mace(model, tmp_path / "tiny.model")
    calculator = MACECalculator(str(tmp_path / "tiny.model"), device="cpu", default_dtype="float64")
    frames = read(HELDOUT, ":3")
    force_errors, energy_errors = [], []
    for frame in frames:
        plain = frame.copy()
        plain.calc = calculator
        force_errors.append(np.abs(plain.get_forces() - frame.arrays["REF_forces"]).mean())
        energy_errors.append(abs(plain.get_potential_energy() - frame.info["REF_energy"]) / 21)
    result = evaluator(labeled=frames, horizons_ps=[0.005], check_every_fs=2.5, record_every_fs=2.5)
    (summary,) = result.evaluate(model).summaries
    assert summary["force_mae_mev_per_A"] == pytest.approx(1000 * np.mean(force_errors), rel=1e-9)
    assert summary["energy_mae_mev_per_atom"] == pytest.approx(1000 * np.mean(energy_errors), rel=1e-9)


def test_evaluate_function():
    result = evaluate(
        Network(2.0), read(HELDOUT, ":2"), horizons_ps=[0.01], n_replicas=2, observables=[BondLengths()],
        record_every_fs=5.0,
    )  # fmt: skip
    assert set(result.axes) == {"bond_lengths"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"horizons_ps": [1000000000]}, r"horizons_ps=1000000000 ps is 2e\+12 timesteps"),
        ({"horizons_ps": []}, r"horizons_ps=\[\] is empty: pass at least one"),
        ({"horizons_ps": [-1.0]}, "horizons_ps=-1"),
        ({"n_replicas": 0}, "n_replicas=0"),
        ({"seed": -1}, "seed=-1"),
        ({"record_every_fs": 12.0}, "record_every_fs=12 or"),
        ({"dynamics": [VelocityAutocorrelation(5.0, 0.05)]}, "interval_fs=5 .* record_every_fs=10: .* set both"),
        ({"starts": "missing.extxyz"}, "starts='missing.extxyz' is not a file"),
        ({"detector": BondDeviation(0.01)}, "reference frames are unstable according to BondDeviation"),
    ],
)
def test_evaluator_names_invalid_arguments(changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluator(**changes)


def test_evaluator_starts_of_another_molecule():
    water = read(HELDOUT, 0)[:5]
    with pytest.raises(ValueError, match=r"starts\[0\] is .* but the simulated system is"):
        evaluator(starts=[water])


def test_evaluator_validate_detects_later_changes():
    changed = evaluator()
    changed.validate()
    changed.detector.threshold = 0.01
    with pytest.raises(ValueError, match="reference frames are unstable according to BondDeviation"):
        changed.validate()


def test_evaluator_accepts_cuda_execution_on_cpu():
    # The module may be moved to a CUDA device after the evaluator is created.
    assert evaluator(execution=Execution(capture=True)).settings.execution.capture is True


def test_evaluator_repr_shows_arguments():
    text = repr(evaluator(seed=3))
    assert text.startswith("Evaluator(starts=<1 frames>, reference=<")
    for part in ("labeled=None", "n_replicas=4", "horizons_ps=[0.05, 0.1]", "record_every_fs=10.0", "seed=3"):
        assert part in text


def test_mean_energy_error_keeps_the_sign():
    frames = read(HELDOUT, ":2")
    for frame in frames:
        frame.arrays["REF_forces"] = np.zeros((len(frame), 3))
    potential = ModulePotential(Network(0.0), evaluator().system)
    frames[0].info["REF_energy"], frames[1].info["REF_energy"] = 21.0, 63.0
    assert mean_energy_error(potential, read_labeled(frames, "frames")) == pytest.approx(-2.0)


def test_evaluate_at_other_temperatures_and_timesteps():
    settings = {
        "other_conditions": True,
        "horizons_ps": [0.1],
        "integrator": Langevin(400.0, 0.5, 5.0),
        "detector": None,
    }
    (summary,) = evaluator(**settings).evaluate(Network(0.0)).summaries
    found = summary["other_conditions"]
    assert [(each["temperature_K"], each["timestep_fs"]) for each in found] == [
        (280.0, 0.5), (560.0, 0.5), (400.0, 1.0), (400.0, 2.0)
    ]  # fmt: skip
    # Without forces, atoms fly apart sooner the hotter they are.
    followed = [each["verdict"]["followed_ns"] for each in found]
    assert followed[0] > followed[1]
    assert [each["unstable"] for each in found] == [4, 4, 4, 4]
    (stable,) = evaluator(**settings | {"integrator": Langevin(50.0, 0.5, 5.0)}).evaluate(Network(20.0)).summaries
    assert [each["unstable"] for each in stable["other_conditions"][:2]] == [0, 0]


def test_evaluate_with_static_checks():
    settings = {"preflight": True, "horizons_ps": [0.01], "integrator": Langevin(300.0, 0.5, 5.0)}
    (summary,) = evaluator(**settings).evaluate(Network(2.0)).summaries
    found = summary["preflight"]
    assert found["n_scans"] > found["n_holes"] >= 0
    assert found["temperature_K"] == 300.0
