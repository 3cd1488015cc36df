"""Trainings that StABlECallback works with, in both Lightning packages, and those that it refuses at the start."""

from types import SimpleNamespace

import pytest
import torch
from disk import files_up_to
from pytorch_lightning import Callback, LightningModule
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from small_training import kwargs_of, short_callback, trainer
from torch import nn
from torch.optim.swa_utils import AveragedModel

from stable_plugin import StABlEMixin
from stable_plugin.integrations.lightning import AtomicCheckpointIO
from stable_plugin.integrations.lightning.compatibility import refuse_sharded_weights, weight_averages
from stable_plugin.models import ModulePotential


class Plain(LightningModule):
    def __init__(self, **attributes):
        super().__init__()
        self.model = nn.Linear(1, 1)
        for name, value in attributes.items():
            setattr(self, name, value)

    def training_step(self, batch, batch_idx):
        raise AssertionError("training has started")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class EMALightningModule(Plain):
    """Named as NequIP's."""


class Inherited(EMALightningModule):
    pass


class Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.averaged = AveragedModel(nn.Linear(1, 1))


class ExponentialMovingAverage(Callback):
    """Named as SchNetPack's callback, and as torch_ema's class."""


class Holder(Callback):
    def __init__(self):
        self.average = ExponentialMovingAverage()


@pytest.mark.parametrize(
    ("module", "callbacks", "name"),
    [
        (EMALightningModule, [], "EMALightningModule"),
        (Inherited, [], "Inherited"),
        (lambda: Plain(ema=AveragedModel(nn.Linear(1, 1))), [], r"Plain \(ema: AveragedModel\)"),
        (lambda: Plain(inner=Wrapper()), [], r"Plain \(inner\.averaged: AveragedModel\)"),
        (lambda: Plain(ema=ExponentialMovingAverage()), [], r"Plain \(ema: ExponentialMovingAverage\)"),
        (lambda: Plain(use_ema=True), [], r"Plain \(use_ema=True\)"),
        (Plain, [ExponentialMovingAverage()], "ExponentialMovingAverage"),
        (Plain, [Holder()], r"Holder \(average: ExponentialMovingAverage\)"),
    ],
)
def test_weight_averages_are_refused(tmp_path, frames, module, callbacks, name):
    message = rf"^{name} would hand back averages of weights.*remove it from the training with StABlECallback"
    with pytest.raises(MisconfigurationException, match=message):
        trainer(tmp_path, short_callback(structures=frames), *callbacks).fit(
            module(), torch.utils.data.DataLoader([0.0])
        )


class SCHEMAModule(Plain):
    """Holds no average, whatever the letters of its name."""


class Schema(Plain):
    pass


@pytest.mark.parametrize("module", [Plain, SCHEMAModule, Schema, lambda: Plain(use_ema=False, ema=None)])
def test_modules_without_averages_are_accepted(module):
    assert weight_averages(SimpleNamespace(callbacks=[short_callback()]), module()) == []


def test_sharded_weights_are_refused():
    class FSDPStrategy:
        pass

    with pytest.raises(MisconfigurationException, match=r"FSDPStrategy divides the weights .*strategy='ddp'"):
        refuse_sharded_weights(SimpleNamespace(strategy=FSDPStrategy()))
    refuse_sharded_weights(SimpleNamespace(strategy=object()))


@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
def test_atomic_checkpoints_as_plugin(tmp_path, package):
    lightning = pytest.importorskip(package)

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def training_step(self, batch, batch_idx):
            return self.layer(batch[:, None]).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    plugin = AtomicCheckpointIO()
    assert repr(plugin) == "AtomicCheckpointIO(TorchCheckpointIO())"
    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    run = lightning.Trainer(plugins=[plugin], max_epochs=1, default_root_dir=tmp_path, **settings)
    assert run.strategy.checkpoint_io is plugin
    run.fit(Model(), torch.utils.data.DataLoader(torch.zeros(2)))
    run.save_checkpoint(tmp_path / "a.ckpt")
    before = (tmp_path / "a.ckpt").read_bytes()
    with files_up_to(100), pytest.raises(OSError, match=r"a\.ckpt' cannot be written.*free some space.*untouched"):
        run.save_checkpoint(tmp_path / "a.ckpt")
    assert (tmp_path / "a.ckpt").read_bytes() == before and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
def test_mixin_works_with_modules_of_both_packages(tmp_path, frames, package):
    lightning = pytest.importorskip(package)

    class Own(StABlEMixin, lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.k = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))
            self.configure_stable(**kwargs_of(short_callback), structures=frames)

        def stable_potential(self, system):
            return ModulePotential(Spring(self), system)

        def training_step(self, batch, batch_idx):
            loss = self.stable_loss()
            return None if loss is None else loss + 0.0 * self.k

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-9)

    class Spring(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.k = module.k

        def forward(self, positions):
            return 0.5 * self.k * positions.square().sum((-1, -2))

    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    run = lightning.Trainer(max_epochs=2, enable_checkpointing=False, default_root_dir=tmp_path, **settings)
    module = Own()
    run.fit(module, torch.utils.data.DataLoader(torch.zeros(2)))
    assert module._stable.windows
