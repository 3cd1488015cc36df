"""StABlECallback and StABlEMixin inside real Trainers, on a real MACE model and the aspirin frames."""

import pytest
import torch
from ase.io import read
from pytorch_lightning import LightningModule, seed_everything
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from small_training import kwargs_of, short_callback, small_module, trainer
from springs import observable_gradient
from torch import nn

from stable_plugin import BondDeviation, Langevin, Schedule, StABlECallback, StABlEMixin
from stable_plugin.integrations.lightning import ExtxyzDataModule
from stable_plugin.models import ModulePotential


def weights(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def test_callback_changes_nothing_before_start_epoch(tmp_path, frames):
    results = []
    for callbacks in ([], [short_callback(start_epoch=3)]):
        seed_everything(0)
        module = small_module()
        trainer(tmp_path, *callbacks).fit(module, ExtxyzDataModule(frames, batch_size=5))
        results.append(weights(module))
    assert torch.equal(*results)


def test_callback_simulates_after_start_epoch(tmp_path, frames):
    module, callback = small_module(), short_callback(start_epoch=2)
    run = trainer(tmp_path, callback, max_epochs=5)
    run.fit(module, ExtxyzDataModule(frames, batch_size=5))
    assert run.global_step >= 4
    assert callback.windows[0].phase == "probe"
    assert sum(entry.steps for entry in callback.windows) >= 1
    assert run.callback_metrics["stable/observable_loss"] > 0


def test_callback_adds_weighted_gradient(tmp_path, frames):
    class Recorder(StABlECallback):
        seen = None

        def on_before_optimizer_step(self, run, module, optimizer):
            own = [parameter.grad.clone() for parameter in module.parameters()]
            super().on_before_optimizer_step(run, module, optimizer)
            if self.seen is None:
                self.seen = own, [parameter.grad.clone() for parameter in module.parameters()]

    callback = Recorder(**kwargs_of(short_callback), observable_weight=7.0)
    module = small_module(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-30))
    trainer(tmp_path, callback, max_epochs=1).fit(module, ExtxyzDataModule(frames, batch_size=10))
    own, joint = callback.seen
    # The learning rate is almost zero, so the same window gives the same estimate again.
    callback.loop._steps = 0
    estimate = observable_gradient(callback.loop)
    for before, after, gradient in zip(own, joint, estimate.gradients, strict=True):
        torch.testing.assert_close(after, before + 7.0 * gradient, rtol=1e-4, atol=1e-6)
    assert any(gradient.abs().max() > 0 for gradient in estimate.gradients)


def test_callback_restores_learning_rate(tmp_path, frames):
    class Watch(StABlECallback):
        used: list[float]

        def on_before_optimizer_step(self, run, module, optimizer):
            super().on_before_optimizer_step(run, module, optimizer)
            self.used = [*getattr(self, "used", []), optimizer.param_groups[0]["lr"]]

    callback = Watch(**kwargs_of(short_callback), learning_rate=1e-5)
    module = small_module(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.125))
    run = trainer(tmp_path, callback, max_epochs=1)
    run.fit(module, ExtxyzDataModule(frames, batch_size=10))
    assert callback.used[0] == pytest.approx(1e-5)
    assert run.optimizers[0].param_groups[0]["lr"] == 0.125


def test_callback_leaves_stable_potential_unchanged(tmp_path, frames):
    callback = short_callback(
        schedule=Schedule(max_failures_per_ns=100_000.0, max_windows=3),
        detector=BondDeviation(2.5, 10.0),
        window_ps=0.005,
    )
    module = small_module()
    run = trainer(tmp_path, callback, max_epochs=50)
    run.fit(module, ExtxyzDataModule(frames, batch_size=10))
    fresh = small_module()
    fresh.trainer = run
    fresh.setup("fit")
    assert callback.loop.phase == "done"
    assert run.current_epoch <= 1
    assert torch.equal(weights(module), weights(fresh))


class Springs(LightningModule):
    """A module of another package, without a method ``stable_potential``."""

    def __init__(self):
        super().__init__()
        self.k = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))

    def training_step(self, batch, batch_idx):
        return 0.0 * self.k

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-9)


class SpringEnergies(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.k = module.k

    def forward(self, positions):
        return self.k * positions.square().sum(dim=(1, 2))


def spring_potential(module, system):
    """Return the potential of a ``Springs``, as a user writes it for modules of another package."""
    return ModulePotential(SpringEnergies(module), system)


@pytest.mark.parametrize("potential", [spring_potential, f"{__name__}.spring_potential"])
def test_callback_takes_the_potential_of_other_modules(tmp_path, frames, potential):
    data = torch.utils.data.DataLoader([0.0] * 4)
    with pytest.raises(TypeError, match=r"no potential found in Springs.*or pass potential="):
        trainer(tmp_path, short_callback(structures=frames)).fit(Springs(), data)
    module, callback = Springs(), short_callback(structures=frames, potential=potential)
    trainer(tmp_path, callback).fit(module, data)
    assert callback.loop.potential.module.k is module.k
    assert callback.windows and any(entry.phase == "learn" for entry in callback.windows)


def test_callback_finds_structures_in_training_data(tmp_path, frames):
    schedule = Schedule(max_failures_per_ns=30_000.0, max_windows=1)
    callback = StABlECallback(n_replicas=2, window_ps=0.01, record_every_fs=5.0, schedule=schedule)
    trainer(tmp_path, callback, max_epochs=1).fit(small_module(), ExtxyzDataModule(frames, batch_size=5))
    loop = callback.loop
    assert len(loop.potential.system.bonds) == 21
    expected = torch.stack([torch.tensor(frame.get_all_distances()) for frame in frames]).mean(dim=0)
    for (i, j), length in zip(
        loop.potential.system.bonds.tolist(), loop.estimator.observables[0].target.tolist(), strict=True
    ):
        assert length == pytest.approx(expected[i, j].item(), abs=1e-5)


def fit_until_interrupted(folder, frames, callback, resume_from=None, max_epochs=6):
    module = small_module()
    if resume_from is None:
        seed_everything(1)  # batches are shuffled; a resumed run gets the state of the generators from the checkpoint
    last = ModelCheckpoint(folder, filename="last", enable_version_counter=False)
    run = trainer(folder, callback, last, max_epochs=max_epochs, enable_checkpointing=True)
    try:
        run.fit(module, ExtxyzDataModule(frames, batch_size=5), ckpt_path=resume_from, weights_only=False)
    except SystemExit:
        assert callback.n_windows is not None
    return module


class Interrupted(StABlECallback):
    """Raises KeyboardInterrupt in the middle of a simulated window."""

    n_windows = None

    def simulate_until(self, n_windows):
        self.n_windows = n_windows
        return self

    def on_train_start(self, run, module):
        super().on_train_start(run, module)
        measure = self.loop.simulator.detector.measure

        def measure_or_stop(positions, velocities):
            if len(self.windows) == self.n_windows:
                raise KeyboardInterrupt
            return measure(positions, velocities)

        self.loop.simulator.detector.measure = measure_or_stop


def never_done():
    return {
        **kwargs_of(short_callback),
        "schedule": Schedule(max_failures_per_ns=30_000.0),
        "min_ess_fraction": 0.01,
    }


def test_fit_resumes_epoch_checkpoint_bit_for_bit(tmp_path, frames):
    whole, uninterrupted = tmp_path / "whole", Interrupted(**never_done())
    complete = fit_until_interrupted(whole, frames, uninterrupted)
    assert len(uninterrupted.windows) >= 4
    cut = tmp_path / "cut"
    fit_until_interrupted(cut, frames, Interrupted(**never_done()).simulate_until(3))
    resumed_callback = Interrupted(**never_done())
    resumed = fit_until_interrupted(cut, frames, resumed_callback, resume_from=cut / "last.ckpt")
    assert torch.equal(weights(complete), weights(resumed))
    assert torch.equal(*(one.loop.replicas.state.positions for one in (uninterrupted, resumed_callback)))
    for one, other in zip(uninterrupted.windows, resumed_callback.windows, strict=True):
        assert {**vars(one), "wall_s": 0} == {**vars(other), "wall_s": 0}


def test_keyboard_interrupt_writes_checkpoint(tmp_path, frames):
    interrupted = Interrupted(**never_done()).simulate_until(2)
    fit_until_interrupted(tmp_path, frames, interrupted)
    (checkpoint,) = tmp_path.glob("interrupted*.ckpt")
    resumed = Interrupted(**never_done())
    fit_until_interrupted(tmp_path, frames, resumed, resume_from=checkpoint)
    assert resumed.windows[:2] == interrupted.windows
    assert len(resumed.windows) > 2


def test_unusable_potential_saves_worst_frame(tmp_path, frames):
    callback = short_callback(detector=BondDeviation(0.15, 0.15))
    module = small_module()

    def wild(run, *_):
        with torch.no_grad():
            for parameter in module.model.parameters():
                parameter.mul_(300.0)

    callback.on_fit_start = wild
    with pytest.raises(RuntimeError, match=r"all 4 replicas failed within .* fs .*worst_frame"):
        trainer(tmp_path, callback).fit(module, ExtxyzDataModule(frames, batch_size=5))
    assert len(read(tmp_path / "worst_frame.extxyz")) == 21


class NonFinite(StABlECallback):
    """Its estimates are not finite at some optimizer steps, counted from one."""

    nonfinite_steps = ()

    def on_train_start(self, run, module):
        super().on_train_start(run, module)
        self.weights_before = weights(module)
        gradient, estimates = self.loop.gradient, []

        def sometimes_nonfinite(users_loss):
            estimate = gradient(users_loss)
            estimates.append(estimate)
            if len(estimates) in self.nonfinite_steps:
                estimate["observables"].gradients[0].view(-1)[0] = torch.nan
            return estimate

        self.loop.gradient = sometimes_nonfinite


def fit_nonfinite(folder, frames, *steps):
    callback, module = NonFinite(**never_done()), small_module()
    callback.nonfinite_steps = steps
    trainer(folder, callback, max_epochs=2).fit(module, ExtxyzDataModule(frames, batch_size=5))
    return callback, module


def test_callback_skips_nonfinite_gradient(tmp_path, frames, caplog):
    callback, module = fit_nonfinite(tmp_path, frames, 2, 3)
    assert caplog.text.count("gradient of the objective is not finite: this step is skipped") == 2
    assert weights(module).isfinite().all()
    assert not torch.equal(weights(module), callback.weights_before)


def test_third_nonfinite_gradient_ends_the_run(tmp_path, frames):
    callback, module = NonFinite(**never_done()), small_module()
    callback.nonfinite_steps = (1, 2, 3)
    with pytest.raises(FloatingPointError, match="not finite in 3 consecutive optimizer steps"):
        trainer(tmp_path, callback).fit(module, ExtxyzDataModule(frames, batch_size=5))
    assert torch.equal(weights(module), callback.weights_before)
    saved = torch.load(tmp_path / "interrupted-step=2.ckpt", weights_only=False)
    module.load_state_dict(saved["state_dict"])
    assert torch.equal(weights(module), callback.weights_before)


def test_zero_learning_rate_is_refused(tmp_path, frames):
    module = small_module(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    with pytest.raises(ValueError, match=r"learning rate is zero.*learning_rate="):
        trainer(tmp_path, short_callback()).fit(module, ExtxyzDataModule(frames, batch_size=10))


def test_second_callback_is_refused(tmp_path, frames):
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `StABlECallback`"):
        trainer(tmp_path, short_callback(), short_callback()).fit(small_module(), ExtxyzDataModule(frames))


def test_manual_optimization_is_refused(tmp_path, frames):
    module = small_module()
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="StABlEMixin"):
        trainer(tmp_path, short_callback()).fit(module, ExtxyzDataModule(frames))


def test_module_without_potential_is_refused(tmp_path, frames):
    class Plain(LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def training_step(self, batch, batch_idx):
            return self.layer(torch.ones(1, 1)).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callback = short_callback(structures=frames)
    with pytest.raises(TypeError, match="no potential found in Plain"):
        trainer(tmp_path, callback).fit(Plain(), torch.utils.data.DataLoader([0.0]))
    with pytest.raises(TypeError, match="pass structures="):
        trainer(tmp_path, short_callback()).fit(Plain(), torch.utils.data.DataLoader([0.0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_replicas": 0}, "n_replicas=0"),
        ({"n_replicas": 2.5}, "n_replicas=2.5"),
        ({"window_ps": -1.0}, r"window_ps=-1\.0 is out of range"),
        ({"record_every_fs": 0.7}, "record_every_fs=0.7"),
        ({"steps_per_window": 0}, "steps_per_window=0"),
        ({"min_ess_fraction": 1.5}, "min_ess_fraction=1.5"),
        ({"reference": []}, "reference"),
        ({"bonds": [(0, 99)]}, r"\(0, 99\)"),
    ],
)
def test_invalid_arguments_are_named_before_simulating(tmp_path, frames, arguments, message):
    with pytest.raises(ValueError, match=message):
        callback = short_callback(**arguments)
        trainer(tmp_path, callback).fit(small_module(), ExtxyzDataModule(frames))
    assert not list(tmp_path.glob("*.ckpt"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Langevin(-5.0), "temperature_K=-5"),
        (lambda: Langevin(300.0, 0.0), "timestep_fs=0"),
        (lambda: Langevin(300.0, 40.0), "timestep_fs=40"),
        (lambda: Langevin(300.0, 0.5, -1.0), "friction_per_ps=-1"),
        (lambda: BondDeviation(float("nan")), "threshold=nan"),
        (lambda: BondDeviation(0.5, 0.2), "discard=0.2"),
        (lambda: Schedule(max_failures_per_ns=0.0), "max_failures_per_ns=0"),
        (lambda: Schedule(probe_every=0), "probe_every=0"),
        (lambda: StABlECallback(learning_rate=0.0), "learning_rate=0"),
        (lambda: StABlECallback(start_epoch=-1), "start_epoch=-1"),
        (lambda: StABlECallback(observable_weight=-1.0), "observable_weight=-1"),
    ],
)
def test_numbers_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class Own(StABlEMixin, LightningModule):
    """A user's module with its own training step."""

    def __init__(self, inner, factor, **stable):
        super().__init__()
        self.inner, self.factor = inner, factor
        self.configure_stable(**stable)
        self.losses = []

    def dataloader(self, *arguments, **keywords):
        return self.inner.dataloader(*arguments, **keywords)

    def setup(self, stage):
        self.inner.trainer = self.trainer
        self.inner.setup(stage)

    def training_step(self, batch, batch_idx):
        observable_loss = self.stable_loss()
        if observable_loss is None:
            return None
        self.losses.append(observable_loss.item())
        return self.inner.loss(batch, self.inner(batch, training=True)) + self.factor * observable_loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-6)


def test_mixin_takes_the_steps_of_the_callback(tmp_path, frames):
    arguments = {
        **kwargs_of(short_callback),
        "schedule": Schedule(max_failures_per_ns=30_000.0, max_windows=2),
    }
    data = ExtxyzDataModule(frames, batch_size=10)
    mixed = Own(small_module(), 7.0, **arguments)
    trainer(tmp_path, max_epochs=3).fit(mixed, data)
    called = small_module(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-6))
    callback = StABlECallback(**arguments, observable_weight=7.0)
    trainer(tmp_path, callback, max_epochs=3).fit(called, data)
    assert mixed.losses and mixed.losses[0] == pytest.approx(callback.windows[1].observable_loss, rel=1e-5)
    torch.testing.assert_close(weights(mixed.inner), weights(called), rtol=1e-5, atol=1e-7)


def test_mixin_refuses_observable_weight():
    with pytest.raises(ValueError, match=r"observable_weight=2\.0 .*multiply stable_loss"):
        Own(small_module(), 1.0, observable_weight=2.0)


def test_callback_works_in_trainer_of_lightning(tmp_path, frames):
    lightning = pytest.importorskip("lightning")
    inner, labeled = small_module(), ExtxyzDataModule(frames).train_frames
    inner.model = inner._build(inner._measure(labeled))

    class Plain(lightning.LightningModule):
        def __init__(self, model, loss):
            super().__init__()
            self.model, self.loss = model, loss

        def training_step(self, batch, batch_idx):
            return self.loss(batch, self.model(batch.to_dict(), training=True))

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    callback = short_callback()
    run = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    module = Plain(inner.model, inner.loss)
    before = weights(module)
    run.fit(module, inner.dataloader(labeled, 5, shuffle=True))
    assert sum(entry.steps for entry in callback.windows) == run.global_step > 0
    assert not torch.equal(before, weights(module))
