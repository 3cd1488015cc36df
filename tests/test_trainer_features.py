"""StABlECallback beside what else a Trainer can do."""

import pytest
import torch
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from test_callback import frames, short_callback, small_module, trainer  # noqa: F401

from stable_plugin import Schedule
from stable_plugin.lightning import ExtxyzDataModule
from stable_plugin.training.gradients import norm


class Watch(Callback):
    """What the optimizer is given, and what the simulation runs in."""

    def __init__(self, stable):
        self.stable = stable
        self.lengths, self.dtypes, self.steps_of_epoch = [], set(), {}

    def on_before_zero_grad(self, run, module, optimizer):
        held = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        if held:
            self.lengths.append(norm(held))

    def on_train_start(self, run, module):
        simulator = self.stable.loop.simulator
        forces = simulator.potential.energies_and_forces

        def watched(positions, edges):
            energies, gradient = forces(positions, edges)
            self.dtypes |= {energies.dtype, gradient.dtype, positions.dtype}
            assert not torch.is_autocast_enabled("cpu")
            return energies, gradient

        simulator.potential.energies_and_forces = watched


def fit(folder, frames, *callbacks, **changes):  # noqa: F811
    endless = Schedule(trigger=0.5, stable_ps=0.02)
    callback = short_callback(schedule=endless, min_effective_share=0.01)
    watch = Watch(callback)
    module = small_module()
    run = trainer(folder, callback, watch, *callbacks, **{"max_epochs": 2, **changes})
    run.fit(module, ExtxyzDataModule(frames, batch_size=2))
    assert sum(entry.steps for entry in callback.rounds) == run.global_step > 0
    return run, callback, watch


def test_gradients_are_accumulated_before_the_observables_joins(tmp_path, frames):  # noqa: F811
    run, _, _ = fit(tmp_path, frames, accumulate_grad_batches=5)
    assert run.global_step == 2  # five batches to an epoch


def test_the_sum_of_both_gradients_is_clipped(tmp_path, frames):  # noqa: F811
    _, _, watch = fit(tmp_path, frames, gradient_clip_val=0.1)
    assert len(watch.lengths) >= 5
    assert max(watch.lengths) == pytest.approx(0.1, rel=1e-3)


def test_the_simulation_stays_in_its_precision_when_training_is_mixed(tmp_path, frames):  # noqa: F811
    _, _, watch = fit(tmp_path, frames, precision="bf16-mixed")
    assert watch.dtypes == {torch.float32}


def test_epochs_may_be_cut_short(tmp_path, frames):  # noqa: F811
    run, _, _ = fit(tmp_path, frames, limit_train_batches=2)
    assert run.global_step == 4


def test_the_usual_callbacks_work(tmp_path, frames):  # noqa: F811
    rates = LearningRateMonitor("step")
    best = ModelCheckpoint(tmp_path, monitor="stable/observable_loss", save_top_k=1)
    early = EarlyStopping("stable/observable_loss", patience=1, min_delta=1e9)
    run, _, _ = fit(
        tmp_path, frames, rates, best, early, max_epochs=9, logger=CSVLogger(tmp_path), log_every_n_steps=1,
        enable_checkpointing=True,
    )  # fmt: skip
    assert run.current_epoch < 9  # stopped early, by a loss that never gets better by so much
    assert torch.load(best.best_model_path, weights_only=False)["global_step"] > 0
    assert rates.lrs


@pytest.mark.parametrize("averaging", [lambda: StochasticWeightAveraging(1e-3), EMAWeightAveraging])
def test_averages_of_weights_are_refused_at_the_start(tmp_path, frames, averaging):  # noqa: F811
    with pytest.raises(MisconfigurationException, match=r"Averaging would hand back averages .* leave it out"):
        fit(tmp_path, frames, averaging())
