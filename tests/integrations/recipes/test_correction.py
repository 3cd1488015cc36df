"""A recipe that corrects a potential by pair potentials, and fits a copy to the result."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from pair_quadrature import Gaussians
from pytorch_lightning import Trainer
from small_training import short_callback

from stable_plugin import (
    BondLimits,
    Evaluator,
    ExtxyzDataModule,
    Langevin,
    NonFinite,
    PairCorrection,
    Pressure,
    PseudoLabeledDataModule,
    Schedule,
)
from stable_plugin.evaluation.label_errors import mean_absolute_errors
from stable_plugin.integrations.lightning.pseudolabels import pseudo_labeled
from stable_plugin.integrations.recipes.pipeline import StABlEPipeline
from stable_plugin.integrations.recipes.run_folder import Job
from stable_plugin.models.mace import MACEModule
from stable_plugin.testing.tools import small_water_box

PAIRS = {"O-H": 1.3}
CUTOFF = 3.0
INTEGRATOR = Langevin(300.0, 0.5, 5.0)
MACE = {"r_max": 3.0, "hidden_irreps": "4x0e", "max_ell": 1, "correlation": 1, "radial_MLP": [8]}


@pytest.fixture(scope="module")
def frames():
    """Return a small box of water, shaken, with the labels of pair potentials."""
    box, random = small_water_box(), np.random.default_rng(0)
    moved = []
    for _ in range(6):
        frame = box.copy()
        frame.positions += random.normal(scale=0.05, size=frame.positions.shape)
        moved.append(frame)
    return pseudo_labeled(moved, Gaussians(cutoff=CUTOFF))


def correction(frames, **changes):
    trainer = partial(Trainer, max_epochs=40, enable_progress_bar=False, enable_model_summary=False)
    repair = short_callback(
        objective="margin",
        structures=frames,
        integrator=INTEGRATOR,
        detector=BondLimits(300.0),
        n_replicas=2,
        schedule=Schedule(max_failures_per_ns=1e5, max_windows=1, min_windows=1),
    )
    settings = {
        "repair": repair,
        "pairs": PAIRS,
        "cutoff": CUTOFF,
        "copy": partial(MACEModule, E0s="model", lr=0.02, stress_weight=100.0),
        "copy_data": partial(PseudoLabeledDataModule, train=frames, valid=frames[:1], batch_size=1, stresses=True),
        "copy_trainer": trainer,
    }
    return PairCorrection(**{**settings, **changes})


def pipeline(frames, folder, objective="boltzmann", **changes):
    trainer = partial(Trainer, max_epochs=10, enable_progress_bar=False, enable_model_summary=False)
    settings = {
        "model": MACEModule(**MACE, lr=0.02),
        "data": ExtxyzDataModule(frames, frames[:1], batch_size=2),
        "supervised": trainer,
        "stable": short_callback(
            objective=objective,
            structures=frames,
            integrator=INTEGRATOR,
            detector=NonFinite(),
            observables=Pressure(target_GPa=-5.0, scale=0.1),
            n_replicas=2,
            steps_per_window=3,
            learning_rate=0.02,
            schedule=Schedule(max_failures_per_ns=1e5, max_windows=2, max_observable_loss=1e-3),
        ),
        "stable_trainer": partial(trainer, max_epochs=-1),
        "evaluation": Evaluator(
            frames, integrator=INTEGRATOR, detector=NonFinite(), labeled=frames, observables=[Pressure(target_GPa=-5.0)],
            n_replicas=2, horizons_ps=[0.01], record_every_fs=2.5, check_every_fs=2.5,
        ),
        "correction": correction(frames),
    }  # fmt: skip
    made = StABlEPipeline(**{**settings, **changes})
    made.job = Job(folder)
    return made


def test_the_copy_learns_the_corrected_potential(frames, tmp_path):
    torch.manual_seed(0)
    run = pipeline(frames, tmp_path)
    run.validate()
    run.run()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["optimizer_steps"] > 0
    before, repaired, after = (
        MACEModule(model=tmp_path / f"{name}.model").model for name in ("before", "repaired", "after")
    )
    corrected = correction(frames).module(repaired, frames)
    corrected.load_weights(tmp_path / "corrected.ckpt")
    assert max(coefficients.abs().max() for coefficients in corrected.model.correction.values()) > 0.01
    for ours, theirs in zip(corrected.model.model.parameters(), repaired.parameters(), strict=True):
        assert torch.equal(ours, theirs)  # the pair potentials alone were trained
    wanted = pseudo_labeled(frames, corrected.model)
    force_error = {
        name: mean_absolute_errors(model, wanted)["force_mae_mev_per_A"]
        for name, model in (("repaired", repaired), ("after", after))
    }
    assert force_error["after"] < 0.7 * force_error["repaired"]

    # The model is repaired before, and its copy after.
    names = ("repair", "stable", "copy_repair")
    phases = [json.loads((tmp_path / f"{name}_phase.json").read_text()) for name in names]
    assert all(phase["optimizer_steps"] > 0 for phase in phases)
    assert not all(
        torch.equal(one, other) for one, other in zip(repaired.parameters(), before.parameters(), strict=True)
    )
    assert report["windows"] == [window for phase in phases for window in phase["windows"]]
    assert report["verifications"] == phases[-1]["verifications"]

    # An interrupted copy does not repeat what came before it.
    (tmp_path / "after.ckpt").unlink()
    for name in ("after.model", "after.json", "report.html"):
        (tmp_path / name).unlink()
    corrected_at = (tmp_path / "corrected.ckpt").stat().st_mtime_ns
    again = pipeline(frames, tmp_path)
    again.validate()
    again.run()
    assert (tmp_path / "corrected.ckpt").stat().st_mtime_ns == corrected_at
    assert json.loads((tmp_path / "report.json").read_text())["windows"] == report["windows"]


def test_a_model_that_holds_needs_no_repair(frames, tmp_path):
    run = pipeline(frames, tmp_path, correction=correction(frames, repair=None))
    run.validate()
    run.run()
    report, stable = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("report", "stable_phase"))
    assert report["windows"] == stable["windows"]
    assert not (tmp_path / "repair").exists()
    assert (tmp_path / "after.model").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": {"O": 1.0}}, r"pairs: 'O' is not a pair of elements"),
        ({"cutoff": 1.5}, r"spacing=0\.25 leaves 1 intervals between 1\.3 Å and the cutoff"),
    ],
)
def test_wrong_pairs_are_named_before_the_model_is_trained(frames, changes, message):
    with pytest.raises(ValueError, match=message):
        correction(frames, **changes)


def test_what_does_not_go_together_is_named(frames, tmp_path):
    with pytest.raises(ValueError, match=r"runner\.control=True with runner\.correction: .* Set control: false"):
        pipeline(frames, tmp_path, control=True)
    with pytest.raises(ValueError, match=r"runner\.stable\.objective='both' with runner\.correction: .* boltzmann"):
        pipeline(frames, tmp_path, objective="both")
    with pytest.raises(ValueError, match=r"cutoff=3: ScaleShiftMACE has a cutoff of 2\.5 Å"):
        pipeline(frames, tmp_path, model=MACEModule(**{**MACE, "r_max": 2.5})).validate()
