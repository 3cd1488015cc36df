# %% [markdown]
# # Repair aspirin
#
# The same potential as in the first example, now repaired: a callback simulates replicas of aspirin during training, and
# when too many fail, it raises the energies of the frames near the failures, beside the fit of energies and forces. How high they
# should be follows from a reference trajectory. No new quantum chemistry is needed.
#
# `recipes/aspirin_mace.yaml` does the same from the command line: `stable-plugin train recipes/aspirin_mace.yaml`.

# %%
import os
from pathlib import Path

import torch
from pytorch_lightning import Trainer

from stable_plugin import (
    BondDeviation,
    Evaluator,
    ExtxyzDataModule,
    Langevin,
    Schedule,
    StABlECallback,
)
from stable_plugin.models.mace import MACEModule, save_mace

FULL = os.environ.get("STABLE_PLUGIN_EXAMPLES") == "full"  # otherwise a miniature that runs in seconds
DATA = Path("recipes/data")

data = ExtxyzDataModule(train=DATA / "aspirin_train.extxyz", valid=DATA / "aspirin_valid.extxyz", batch_size=10)
integrator = Langevin(temperature_K=500.0, timestep_fs=0.5, friction_per_ps=1.0)


def make_trainer(max_epochs, **arguments):
    return Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        gradient_clip_val=10.0,
        **arguments,
    )


# %% [markdown]
# ## Energies and forces first
#
# Ordinary training of 60 epochs. In one Trainer, `StABlECallback(start_epoch=60)` gives the same order: ordinary epochs,
# then the repair. Here they are separate, to look at the potential in between.

# %%
epochs = 60 if FULL else 1


def schedule_lr(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)


module = MACEModule(r_max=4.5, hidden_irreps="8x0e", max_ell=1, correlation=1, lr=0.03, scheduler=schedule_lr, seed=2)
make_trainer(epochs).fit(module, data)

evaluator = Evaluator(
    starts=DATA / "aspirin_heldout.extxyz",
    reference=DATA / "aspirin_reference.extxyz",
    labeled=DATA / "aspirin_heldout.extxyz",
    integrator=integrator,
    detector=BondDeviation(threshold=0.5),
    n_replicas=32 if FULL else 2,
    horizons_ps=[1.0] if FULL else [0.02],
    record_every_fs=50.0 if FULL else 5.0,
)
before = evaluator.evaluate(module.model).summaries[0]

# %% [markdown]
# ## The repair
#
# - The detector is the default: bonds, angles, planes, configurations, rings and contacts within limits from the
#   fluctuations of the reference.
# - After each window, 100 optimizer steps learn from the frames near failures of all windows so far.
# - Training ends by itself (`max_epochs=-1`): when fewer than `max_failures_per_ns` fail, or after `max_windows`.

# %%
callback = StABlECallback(
    structures=DATA / "aspirin_train.extxyz",
    reference=DATA / "aspirin_target.extxyz",
    integrator=integrator,
    n_replicas=32 if FULL else 2,
    window_ps=0.4 if FULL else 0.01,
    record_every_fs=25.0 if FULL else 5.0,
    learning_rate=0.005,
    steps_per_window=100 if FULL else 3,
    schedule=Schedule(
        max_failures_per_ns=100.0 if FULL else 3e5,
        max_windows=14 if FULL else 1,
    ),
    seed=2,
)
make_trainer(-1, callbacks=[callback]).fit(module, data)
for window in callback.windows:
    print(f"{window.phase:8}  {window.unstable_fraction:4.0%} unstable, {window.steps} optimizer steps")

# %% [markdown]
# ## Before and after
#
# Look at the cost as well as at the gain: a repair may raise the force error. And read the failure count with the time
# that was simulated. 32 replicas of 1 ps say nothing about failures that occur a few times per nanosecond; evaluate
# over the times that you need.

# %%
after = evaluator.evaluate(module.model).summaries[0]
for name, summary in (("before", before), ("after", after)):
    print(
        f"{name:7} {summary['unstable']:2} of {summary['replicas']} failed within {summary['horizon_ps']:g} ps, "
        f"force MAE {summary['force_mae_mev_per_A']:.0f} meV/Å"
    )

# %% [markdown]
# The repaired weights move all energies by a constant, which no force and no simulation depends on, but absolute energies
# do. Compare energy differences only, or train from the recipe, which fits that constant to the training frames.
#
# The file is an ordinary MACE model, for `mace.calculators.MACECalculator`.

# %%
save_mace(module.model, "repaired.model")
