"""A training that checkpoints itself, to be killed: ``python killed_run.py FOLDER EPOCHS``; goes on from its last checkpoint."""

import os
import sys
from pathlib import Path

import torch
from ase.io import read
from pytorch_lightning import Trainer, seed_everything
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger

from stable_plugin import BondDeviation, Execution, Langevin, Schedule, StABlECallback
from stable_plugin.lightning import ExtxyzDataModule, MACEModule

TRAIN = Path(__file__).parents[1] / "recipes" / "data" / "aspirin_train.extxyz"


def main(folder, epochs):
    """Train, after a file ``begun`` says that it does."""
    torch.set_num_threads(1)
    seed_everything(1)
    module = MACEModule(r_max=4.0, hidden_irreps="4x0e", max_ell=1, correlation=1, radial_MLP=[8])
    callback = StABlECallback(
        integrator=Langevin(500.0, 0.5, 1.0),
        n_replicas=4,
        window_ps=0.03,
        record_every_fs=2.5,
        check_every_fs=2.5,
        detector=BondDeviation(0.2, 10.0),
        schedule=Schedule(trigger=0.5, stable_ps=0.1),
        steps_per_window=2,
        min_effective_share=0.01,
        execution=Execution(threads=1),
    )
    last = ModelCheckpoint(folder, filename="last", enable_version_counter=False, save_on_train_epoch_end=True)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[callback, last],
        logger=CSVLogger(folder, name="csv", flush_logs_every_n_steps=1),
        log_every_n_steps=1,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    checkpoint = folder / "last.ckpt"
    (folder / f"begun-{os.getpid()}").touch()
    data = ExtxyzDataModule(read(TRAIN, ":10"), batch_size=5)
    trainer.fit(module, data, ckpt_path=checkpoint if checkpoint.is_file() else None, weights_only=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
