"""Trainings that checkpoint themselves, to be killed: ``python killed_run.py lightning`` or ``python killed_run.py fairchem``.

Imports once, then forks a training for each line of standard input: a JSON object with the folder, and how the training is
killed. A training resumes from its last checkpoint.
"""

import argparse
import importlib
import json
import os
import resource
import signal
import sys
import threading
import traceback
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "recipes" / "data" / "aspirin_train.extxyz"


def lightning(folder, slurm=False):
    """Train a small MACE model for twelve epochs, with a checkpoint after each."""
    from ase.io import read
    from pytorch_lightning import Trainer, seed_everything
    from pytorch_lightning.callbacks import LambdaCallback, ModelCheckpoint
    from pytorch_lightning.loggers import CSVLogger
    from pytorch_lightning.plugins.environments import SLURMEnvironment

    from stable_plugin import BondDeviation, Execution, Langevin, Schedule, StABlECallback
    from stable_plugin.integrations.lightning import ExtxyzDataModule
    from stable_plugin.models.mace import MACEModule

    if slurm:
        _imitate_slurm(folder)
    seed_everything(1)
    module = MACEModule(r_max=4.0, hidden_irreps="4x0e", max_ell=1, correlation=1, radial_MLP=[8])
    callback = StABlECallback(
        integrator=Langevin(500.0, 0.5, 1.0),
        n_replicas=4,
        window_ps=0.015,
        record_every_fs=2.5,
        check_every_fs=2.5,
        detector=BondDeviation(0.2, 10.0),
        schedule=Schedule(max_failures_per_ns=30_000.0, probe_every=1),
        steps_per_window=2,
        min_ess_fraction=0.01,
        execution=Execution(threads=1),
    )
    last = ModelCheckpoint(folder, filename="last", enable_version_counter=False, save_on_train_epoch_end=True)
    trainer = Trainer(
        max_epochs=12,
        accelerator="cpu",
        callbacks=[callback, last, LambdaCallback(on_train_start=lambda *_: print("training begins", flush=True))],
        logger=CSVLogger(folder, name="csv", flush_logs_every_n_steps=1),
        log_every_n_steps=1,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[SLURMEnvironment(auto_requeue=True)] if slurm else None,
    )
    data = ExtxyzDataModule(read(TRAIN, ":10"), batch_size=5)
    checkpoint = max(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime, default=None)
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=False)


def _imitate_slurm(folder):
    """Set the variables by which Lightning recognizes a SLURM job, and provide the command that requeues it."""
    os.environ.update(
        {f"SLURM_{name}": "0" for name in ("PROCID", "LOCALID", "NODEID")}, SLURM_JOB_ID="7", SLURM_NTASKS="1"
    )
    scontrol = folder / "bin" / "scontrol"
    scontrol.parent.mkdir(exist_ok=True)
    scontrol.write_text("#!/bin/sh\necho $@\n")
    scontrol.chmod(0o755)
    os.environ["PATH"] = f"{scontrol.parent}{os.pathsep}{os.environ['PATH']}"


def fairchem(folder):
    """Run the configuration in the folder with fairchem's command line, which finds the last checkpoint."""
    from fairchem.core import _cli
    from fairchem.core.launchers import slurm_launch

    # It lists all packages, which takes longer than the training.
    slurm_launch.write_environment_report = lambda **_: None
    _cli.main(argparse.Namespace(config=str(folder / "config.yaml")), [])


class LogToFile:
    """Writes what fairchem's unit logs to a file, one JSON object per line; an entry of ``runner.callbacks``."""

    def __new__(cls, path):
        from torchtnt.framework.callback import Callback

        class Attached(Callback):
            def on_train_start(self, state, unit):
                unit.logger = logger

        logger = super().__new__(cls)
        logger.path = path
        return Attached()

    def log(self, numbers, step=None, commit=True):
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **{name: float(value) for name, value in numbers.items()}}) + "\n")


def die(where, delay_s, number):
    """Let this process be killed during a write after a delay."""

    def arm():
        if where in ("bytes", "full"):  # the system kills the process when a file grows longer, or refuses to write
            if where == "bytes":
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))
            return
        renames = 0

        def watch(event, arguments):
            nonlocal renames
            if event == "os.rename":
                renames += 1
                if renames > number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)

    # Handlers run in the main thread, the only one that may set signal handlers.
    signal.signal(signal.SIGALRM, lambda *_: arm())
    signal.setitimer(signal.ITIMER_REAL, max(delay_s, 1e-3))


def run(train, request):
    """Train in the child process with its output in the folder, and exit without the parent's cleanup."""
    folder = Path(request["folder"])
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    if request.get("die"):
        die(*request["die"])
    try:
        train(folder, **request.get("arguments", {}))
    except SystemExit as stop:
        os._exit(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


PRELOADED = {
    "lightning": ["stable_plugin.models.mace.lightning_module", "pytorch_lightning", "ase.io"],
    "fairchem": [
        "stable_plugin.integrations.fairchem",
        "fairchem.core._cli",
        "fairchem.core.launchers.slurm_launch",
        "fairchem.core.components.train.train_runner",
        "fairchem.core.units.mlip_unit.mlip_unit",
        "fairchem.core.datasets.mt_concat_dataset",
        "fairchem.core.datasets.samplers.max_atom_distributed_sampler",
        "fairchem.core.models.uma.escn_md",
        "fairchem.core.components.common.dataloader_builder",
    ],
}


def _compile_sampler():
    """Compile with numba once for all trainings; it takes longer than a training."""
    import numpy as np
    from fairchem.core.datasets.samplers.max_atom_distributed_sampler import get_batches

    get_batches(np.array([21] * 8), np.arange(8), 84, 0)


def serve(kind):
    """Fork a training per line; print its process id, and its exit status when it ends."""
    sys.path.insert(0, str(Path(__file__).parent))
    torch.set_num_threads(1)
    for name in PRELOADED[kind]:
        importlib.import_module(name)
    if kind == "fairchem":
        _compile_sampler()
    # Other threads would not survive the fork.
    assert threading.active_count() == 1
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run({"lightning": lightning, "fairchem": fairchem}[kind], json.loads(line))
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
