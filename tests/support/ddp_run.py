"""A data-parallel training: ``python ddp_run.py FOLDER PROCESSES EPOCHS [CHECKPOINT]``; Lightning starts it again for each further rank.

Each rank saves its final state in ``FOLDER/rank_RANK.pt``.
"""

import sys
from dataclasses import asdict
from pathlib import Path

import torch
from ase.io import read
from pytorch_lightning import Trainer, seed_everything
from pytorch_lightning.callbacks import ModelCheckpoint

from stable_plugin import BondDeviation, Execution, Langevin, Schedule, StABlECallback
from stable_plugin.integrations.lightning import ExtxyzDataModule
from stable_plugin.models.mace import MACEModule

TRAIN = Path(__file__).parents[2] / "recipes" / "data" / "aspirin_train.extxyz"


class Recorder(StABlECallback):
    """Records the gradient of the supervised loss, and the sum of both gradients, at the first optimizer step."""

    first = None

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        parameters = self.loop.potential.trainable_parameters()
        own = [parameter.grad.clone() for parameter in parameters]
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self.first is None:
            self.first = own, [parameter.grad.clone() for parameter in parameters], self.loop._data.positions


def main(folder, n_processes, epochs, checkpoint=None):
    torch.set_num_threads(1)
    seed_everything(1)
    callback = Recorder(
        integrator=Langevin(500.0, 0.5, 1.0),
        objective="boltzmann",
        n_replicas=4,
        window_ps=0.01,
        record_every_fs=2.5,
        check_every_fs=2.5,
        detector=BondDeviation(0.2, 10.0),
        schedule=Schedule(max_failures_per_ns=30_000.0),
        observable_weight=1.0,
        steps_per_window=2,
        min_ess_fraction=0.01,
        execution=Execution(threads=1),
    )
    module = MACEModule(r_max=4.0, hidden_irreps="4x0e", max_ell=1, correlation=1, radial_MLP=[8], dtype="float64")
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=n_processes,
        strategy="ddp",
        callbacks=[callback, ModelCheckpoint(folder, filename="last", enable_version_counter=False)],
        logger=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, ExtxyzDataModule(read(TRAIN, ":8"), batch_size=2), ckpt_path=checkpoint, weights_only=False)
    found = {
        "windows": [
            {name: value for name, value in asdict(entry).items() if name != "wall_s"} for entry in callback.windows
        ],
        "weights": [parameter.detach() for parameter in module.parameters()],
        "positions": callback.loop.replicas.state.positions,
        "noise": callback.loop.replicas.streams.noise.get_state(),
        "first": callback.first,
        "step": trainer.global_step,
    }
    torch.save(found, folder / f"rank_{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:5])
