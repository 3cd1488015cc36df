"""A small training of a real MACE model in Lightning, shared by tests of the callback, the trainer and processes."""

from pathlib import Path

from pytorch_lightning import Trainer

from stable_plugin import BondDeviation, Langevin, Schedule, StABlECallback
from stable_plugin.models.mace import MACEModule

DATA = Path(__file__).parents[2] / "recipes" / "data"
TRAIN = DATA / "aspirin_train.extxyz"


def small_module(**changes):
    settings = {"r_max": 4.0, "hidden_irreps": "4x0e", "max_ell": 1, "correlation": 1, "radial_MLP": [8]}
    return MACEModule(**{**settings, **changes})


def short_callback(**changes):
    """Return a callback for an untrained potential, which fails at once, so that a few MD steps reach every phase."""
    settings = {
        "integrator": Langevin(500.0, 0.5, 1.0),
        "objective": "boltzmann",
        "n_replicas": 4,
        "window_ps": 0.01,
        "record_every_fs": 2.5,
        "check_every_fs": 2.5,
        "detector": BondDeviation(0.2, 10.0),
        "schedule": Schedule(max_failures_per_ns=30_000.0, max_windows=3),
        "steps_per_window": 2,
    }
    return StABlECallback(**{**settings, **changes})


def trainer(tmp_path, *callbacks, **changes):
    settings = {
        "max_epochs": 3,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": tmp_path,
        "num_sanity_val_steps": 0,
    }
    return Trainer(callbacks=list(callbacks), **{**settings, **changes})


def kwargs_of(make):
    """Return the arguments that ``make`` passes to StABlECallback."""
    taken = {}
    original = StABlECallback.__init__
    try:
        StABlECallback.__init__ = lambda self, **arguments: taken.update(arguments)
        make()
    finally:
        StABlECallback.__init__ = original
    return taken
