"""StABlECallback together with other features of a Trainer."""

from dataclasses import replace

import pytest
import torch
from pytorch_lightning import Callback, LightningModule
from pytorch_lightning.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from small_training import kwargs_of, short_callback, small_module, trainer
from torch import nn

from stable_plugin import Execution, Schedule, StABlEMixin
from stable_plugin.algorithm.gradients import norm
from stable_plugin.integrations.lightning import ExtxyzDataModule
from stable_plugin.models import ModulePotential


class Watch(Callback):
    """Records norms of the gradients that the optimizer gets, and dtypes of the simulation."""

    def __init__(self, stable):
        self.stable = stable
        self.norms, self.dtypes = [], set()

    def on_before_zero_grad(self, run, module, optimizer):
        held = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        if held:
            self.norms.append(norm(held))

    def on_train_start(self, run, module):
        simulator = self.stable.loop.simulator
        forces = simulator.potential.energies_and_forces

        def watched(positions, edges):
            energies, gradient = forces(positions, edges)
            self.dtypes |= {energies.dtype, gradient.dtype, positions.dtype}
            assert not torch.is_autocast_enabled("cpu")
            return energies, gradient

        simulator.potential.energies_and_forces = watched


def fit(folder, frames, *callbacks, **changes):
    schedule = Schedule(max_failures_per_ns=30_000.0)
    callback = short_callback(schedule=schedule, min_ess_fraction=0.01)
    watch = Watch(callback)
    module = small_module()
    run = trainer(folder, callback, watch, *callbacks, **{"max_epochs": 2, **changes})
    run.fit(module, ExtxyzDataModule(frames, batch_size=2))
    assert sum(entry.steps for entry in callback.windows) == run.global_step > 0
    return run, callback, watch


def test_callback_joins_accumulated_gradients(tmp_path, frames):
    run, _, _ = fit(tmp_path, frames, accumulate_grad_batches=5)
    assert run.global_step == 2  # five batches per epoch


def test_trainer_clips_the_summed_gradient(tmp_path, frames):
    _, _, watch = fit(tmp_path, frames, gradient_clip_val=0.1)
    assert len(watch.norms) >= 5
    assert max(watch.norms) == pytest.approx(0.1, rel=1e-3)


class Distances(nn.Module):
    """A small network of the distances to the first atom, which autocast may run in half precision."""

    def __init__(self, n_atoms):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(n_atoms - 1, 8), nn.SiLU(), nn.Linear(8, 1))
        self.seen = set()

    def forward(self, positions):
        hidden = self.layers[0](torch.linalg.vector_norm(positions[:, 1:] - positions[:, :1], dim=-1))
        self.seen.add((hidden.dtype, torch.is_grad_enabled() and not positions.requires_grad))
        return self.layers[2](self.layers[1](hidden))[:, 0]


class Mixed(StABlEMixin, LightningModule):
    def __init__(self, structures, **arguments):
        super().__init__()
        self.network = Distances(len(structures[0]))
        self.structures, self.own = structures, set()
        self.configure_stable(structures=structures, **arguments)

    def stable_potential(self, system):
        return ModulePotential(self.network, system)

    def training_step(self, batch, batch_idx):
        observable_loss = self.stable_loss()
        simulated, self.network.seen = self.network.seen, set()
        loss = self.network(batch).square().mean()
        self.own |= self.network.seen
        self.network.seen = simulated
        return None if observable_loss is None else loss + observable_loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-9)

    def train_dataloader(self):
        positions = torch.tensor([frame.positions for frame in self.structures], dtype=torch.float32)
        return torch.utils.data.DataLoader(positions, batch_size=5)


def test_simulation_keeps_precision_in_mixed_training(tmp_path, frames):
    short = kwargs_of(short_callback)
    module = Mixed(
        frames,
        **{
            **short,
            "schedule": Schedule(max_failures_per_ns=30_000.0),
            "execution": Execution(compile=False),
        },
    )
    trainer(tmp_path, precision="bf16-mixed", max_epochs=1).fit(module)
    assert {dtype for dtype, _ in module.own} == {torch.bfloat16}
    assert {dtype for dtype, _ in module.network.seen} == {torch.float32}, "simulation and estimator"


def test_mace_refuses_mixed_precision(tmp_path, frames):
    with pytest.raises(MisconfigurationException, match=r"precision='bf16-mixed'.*MACE.*'32-true'"):
        fit(tmp_path, frames, precision="bf16-mixed")


def test_callback_works_with_limit_train_batches(tmp_path, frames):
    run, _, _ = fit(tmp_path, frames, limit_train_batches=2)
    assert run.global_step == 4


def test_callback_works_with_other_callbacks(tmp_path, frames):
    rates = LearningRateMonitor("step")
    best = ModelCheckpoint(tmp_path, monitor="stable/observable_loss", save_top_k=1)
    early = EarlyStopping("stable/observable_loss", patience=1, min_delta=1e9)
    run, _, _ = fit(
        tmp_path, frames, rates, best, early, max_epochs=9, logger=CSVLogger(tmp_path), log_every_n_steps=1,
        enable_checkpointing=True,
    )  # fmt: skip
    assert run.current_epoch < 9  # stopped early: no loss improves by min_delta
    assert torch.load(best.best_model_path, weights_only=False)["global_step"] > 0
    assert rates.lrs


@pytest.mark.parametrize("averaging", [lambda: StochasticWeightAveraging(1e-3), EMAWeightAveraging])
def test_weight_averaging_callbacks_are_refused(tmp_path, frames, averaging):
    with pytest.raises(MisconfigurationException, match=r"Averaging would hand back averages .* remove it"):
        fit(tmp_path, frames, averaging())


def test_mixin_skips_nonfinite_gradient(tmp_path, frames):
    module = Mixed(frames, **{**kwargs_of(short_callback), "execution": Execution(compile=False)})
    losses, gradient = [], module._stable.session.gradient

    def nonfinite():
        return {
            name: replace(estimate, gradients=[torch.full_like(each, torch.nan) for each in estimate.gradients])
            for name, estimate in gradient().items()
        }

    def watched():
        losses.append(StABlEMixin.stable_loss(module))
        return losses[-1]

    module._stable.session.gradient, module.stable_loss = nonfinite, watched
    with pytest.raises(FloatingPointError, match="not finite in 3 consecutive optimizer steps"):
        trainer(tmp_path, max_epochs=9).fit(module)
    assert [loss.item() for loss in losses] == [0.0, 0.0]
    assert all(parameter.isfinite().all() for parameter in module.parameters())
