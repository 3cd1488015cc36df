"""Lightning training on several compositions."""

import numpy as np
import pytest
import torch
from ase.build import molecule
from pytorch_lightning.loggers import CSVLogger
from small_training import short_callback, small_module, trainer

from stable_plugin import BondDeviation, Schedule
from stable_plugin.integrations.lightning.data import ExtxyzDataModule
from stable_plugin.md.labels import ENERGY_KEY, FORCES_KEY


def labeled(name, n_frames, seed=0):
    rng = np.random.default_rng(seed)
    frames = []
    for _ in range(n_frames):
        atoms = molecule(name)
        atoms.positions += rng.normal(scale=0.02, size=atoms.positions.shape)
        atoms.info[ENERGY_KEY] = -10.0 * len(atoms)
        atoms.arrays[FORCES_KEY] = rng.normal(size=(len(atoms), 3))
        frames.append(atoms)
    return frames


FRAMES = [*labeled("CH3CH2OH", 4), *labeled("H2O", 3), *labeled("CH4", 1)]


def callback(**changes):
    schedule = Schedule(max_failures_per_ns=30_000.0, max_windows=2)
    return short_callback(**{"schedule": schedule, "detector": BondDeviation(0.1, 10.0), **changes})


def test_fit_on_several_compositions(tmp_path, caplog):
    caplog.set_level("INFO", "stable_plugin")
    stable = callback()
    trainer(tmp_path, stable, max_epochs=8).fit(small_module(), ExtxyzDataModule(FRAMES, batch_size=4))
    assert "simulated: C2H6O (4 frames), H2O (3 frames); left out" in caplog.text
    assert {record.system for record in stable.windows} == {"C2H6O", "H2O"}
    assert stable.session.done
    assert "C2H6O: window 1 (" in caplog.text
    for each in stable.loop.verifications():
        assert f"on {each.system} is {'' if each.is_verified else 'not '}verified to have less than" in caplog.text


def test_fit_on_several_compositions_resumes(tmp_path):
    def fit(folder, n_steps, **resumed):
        torch.manual_seed(0)
        module, stable = small_module(), callback()
        run = trainer(folder, stable, max_epochs=-1, max_steps=n_steps)
        run.fit(module, ExtxyzDataModule(FRAMES, batch_size=8), **resumed)
        run.save_checkpoint(folder / "end.ckpt")
        return module.state_dict(), stable

    whole, stable = fit(tmp_path / "whole", 4)
    fit(tmp_path / "part", 2)
    resumed, again = fit(tmp_path / "part", 4, ckpt_path=tmp_path / "part" / "end.ckpt", weights_only=True)
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0.0, atol=0.0)
    assert [record.system for record in again.windows] == [record.system for record in stable.windows]


def test_metrics_name_the_system(tmp_path):
    logger = CSVLogger(tmp_path)
    run = trainer(tmp_path, callback(), max_epochs=2, logger=logger)
    run.fit(small_module(), ExtxyzDataModule(FRAMES, batch_size=8))
    names = {name for row in logger.experiment.metrics for name in row}
    text = " ".join(names) if names else (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()
    assert "stable/H2O/probe/unstable_fraction" in text
    assert "stable/C2H6O/probe/unstable_fraction" in text
    for name in ("window", "simulated_ps"):
        assert f"stable/H2O/{name}" in text
        assert f"stable/C2H6O/{name}" in text
    assert "stable/window" not in text


def test_validate_refuses_single_frames_of_each_composition():
    with pytest.raises(ValueError, match=r"none with 2 reference frames"):
        callback(structures=[FRAMES[0], FRAMES[4]]).validate()


def test_optimizer_of_several_evaluations_is_refused(tmp_path):
    module = small_module(optimizer=torch.optim.LBFGS)
    with pytest.raises(
        ValueError, match=r"LBFGS evaluates the loss several times in one step.*use an optimizer such as Adam"
    ):
        trainer(tmp_path, callback(), max_epochs=1).fit(module, ExtxyzDataModule(FRAMES, batch_size=8))
