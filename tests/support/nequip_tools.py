"""Small NequIP models, and runs of ``nequip-train``."""

import subprocess
import sys
import warnings
from pathlib import Path

import torch
import yaml
from ase.io import read, write
from nequip.model import NequIPGNNModel
from nequip.train import EMALightningModule
from nequip.utils.global_state import set_global_state

ROOT = Path(__file__).parents[2]
SHORT = {
    "n_replicas": 4,
    "window_ps": 0.01,
    "record_every_fs": 2.5,
    "check_every_fs": 2.5,
    "steps_per_window": 2,
    "detector": {"_target_": "stable_plugin.BondDeviation", "threshold": 0.2, "discard": 10.0},
    "schedule": {
        "_target_": "stable_plugin.Schedule",
        "max_failures_per_ns": 30_000.0,
        "max_windows": 2,
    },
}
"""An untrained potential fails at once, so a few MD steps reach every phase."""

SETTINGS = {
    "seed": 1,
    "model_dtype": "float64",
    "type_names": ["H", "C", "O"],
    "r_max": 4.0,
    "num_layers": 2,
    "l_max": 1,
    "num_features": 4,
    "radial_mlp_width": 8,
    "avg_num_neighbors": 8.0,
    "per_type_energy_scales": 1.5,
    "per_type_energy_shifts": {"H": -1.0, "C": -2.0, "O": -3.0},
}


def make_model(**changes):
    set_global_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return NequIPGNNModel(**{**SETTINGS, **changes})


def train(folder, epochs=3, start_epoch=1, **changes):
    """Run ``nequip-train`` on the example's configuration in miniature; return its output."""
    config = yaml.safe_load((ROOT / "examples" / "07_nequip_train.yaml").read_text(encoding="utf-8"))
    for name in ("training", "validation", "reference"):
        config[name] = str(ROOT / config[name])
    config["training"], config["validation"] = (few_frames(folder, config[name]) for name in ("training", "validation"))
    config["trainer"].update(max_epochs=epochs, accelerator="cpu", enable_progress_bar=False, logger=False)
    config["trainer"].pop("log_every_n_steps")
    config["trainer"]["callbacks"][-1].update(start_epoch=start_epoch, **{**SHORT, **changes})
    config["training_module"]["model"].update(num_layers=2, num_features=4, radial_mlp_width=8, model_dtype="float64")
    config["hydra"] = {"run": {"dir": str(folder / "run")}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [sys.executable, "-W", "ignore", "-m", "nequip.scripts.train", "-cp", str(folder), "-cn", "config"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


def few_frames(folder, path):
    """Write the first frames of a file, and return the path."""
    few = folder / Path(path).name
    write(few, read(path, ":6"))
    return str(few)


def make_lightning_module(kind, **changes):
    """Return a LightningModule of NequIP with a small model."""
    set_global_state()
    model = {"_target_": "nequip.model.NequIPGNNModel", **SETTINGS}
    return kind(model=model, num_datasets={"train": 1, "val": 0, "test": 0, "predict": 0}, **changes)


def module_of(weights, checkpoint):
    """Return the trained module of a run, with its raw weights instead of the averages."""
    set_global_state()
    loaded = torch.load(checkpoint, weights_only=False, map_location="cpu")
    module = EMALightningModule(**loaded["hyper_parameters"])
    module.load_state_dict(weights)
    return module
