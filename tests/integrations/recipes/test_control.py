"""The control of a repair: the same optimizer steps with energies and forces alone."""

import torch
from pytorch_lightning import LightningModule, Trainer

from stable_plugin.integrations.recipes.control import ReplayLearningRates


class Line(LightningModule):
    """Descends with a slope of one, and notes the learning rates of its steps."""

    def __init__(self):
        super().__init__()
        self.x = torch.nn.Parameter(torch.zeros(()))
        self.rates = []

    def training_step(self, batch, batch_idx):
        return self.x

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=7.0)

    def on_train_batch_end(self, *args):
        self.rates.append(self.optimizers().param_groups[0]["lr"])


def test_steps_are_taken_at_the_given_rates(tmp_path):
    module, rates = Line(), [0.0, 0.5, 0.25, 0.125, 1.0]
    options = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = Trainer(
        max_epochs=-1,
        callbacks=[ReplayLearningRates(rates)],
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        **options,
    )
    trainer.fit(module, torch.utils.data.DataLoader(torch.zeros(2, 1), batch_size=1))
    assert trainer.global_step == len(rates)
    assert module.x.item() == -sum(rates)
    assert module.rates == [7.0] * len(rates), "the optimizer's own rate is restored"
