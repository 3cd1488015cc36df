"""Trainings that StABlECallback refuses before anything long starts."""

from types import SimpleNamespace

import pytest
import torch
from pytorch_lightning import Callback, LightningModule
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from small_training import short_callback, trainer
from torch import nn
from torch.optim.swa_utils import AveragedModel

from stable_plugin.integrations.lightning.compatibility import refuse_sharded_weights, refuse_weight_averages


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
    refuse_weight_averages(SimpleNamespace(callbacks=[short_callback()]), module())


def test_sharded_weights_are_refused():
    class FSDPStrategy:
        pass

    with pytest.raises(MisconfigurationException, match=r"FSDPStrategy divides the weights .*strategy='ddp'"):
        refuse_sharded_weights(SimpleNamespace(strategy=FSDPStrategy()))
    refuse_sharded_weights(SimpleNamespace(strategy=object()))
