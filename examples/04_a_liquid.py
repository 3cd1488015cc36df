# %% [markdown]
# # A liquid
#
# 64 water molecules at 300 K. In a mean over 64 molecules one broken molecule is hard to see, so each molecule, together
# with its nearest neighbors, is a sample of its own: the *local estimator*.
#
# `recipes/water_mace.yaml` has the settings that were used for the published report of this package.

# %%
import os
from pathlib import Path

from pytorch_lightning import Trainer

from stable_plugin import (
    AnyOf,
    BondDeviation,
    Evaluator,
    ExtxyzDataModule,
    IntermolecularContact,
    Langevin,
    LocalBondAmplitudes,
    LocalBondLengths,
    LocalContactAmplitudes,
    LocalContacts,
    NearestMolecules,
    RadialDistribution,
    Schedule,
    StABlECallback,
)
from stable_plugin.models.mace import MACEModule

FULL = os.environ.get("STABLE_PLUGIN_EXAMPLES") == "full"  # otherwise a miniature that runs in seconds
DATA = Path("recipes/data")
integrator = Langevin(temperature_K=300.0, timestep_fs=1.0, friction_per_ps=1.0)

# %% [markdown]
# ## What fails in a liquid
#
# Molecules can break, and two molecules can collide. `AnyOf` combines detectors; distances take the periodic boundary into
# account. `offending_atoms` of a detector names the atoms, and the evaluation counts them.

# %%
detector = AnyOf([BondDeviation(threshold=0.4, discard=3.0), IntermolecularContact(distance=1.3, discard_distance=0.4)])

# %% [markdown]
# ## What to learn from
#
# - Bond lengths and contacts of molecules have a *local* form: one value per molecule or neighborhood.
# - The amplitudes respond to the rare molecule that breaks, or to the rare two that collide.
# - Radial distributions are a property of the whole frame. They keep the structure of the liquid, and the H-H one the angle
#   of the molecules, which neither bonds nor contacts fix.

# %%
r_max, bin_width = (5.0, 0.1) if FULL else (4.0, 0.5)
observables = [
    LocalBondLengths(),
    LocalBondAmplitudes(),
    LocalContacts(),
    LocalContactAmplitudes(),
    RadialDistribution(("O", "O"), r_max=r_max, bin_width=bin_width, intramolecular=False),
    RadialDistribution(("O", "H"), r_max=r_max, bin_width=bin_width, intramolecular=False),
    RadialDistribution(("H", "H"), r_max=r_max, bin_width=bin_width),
]

# %% [markdown]
# ## Training
#
# The first epochs fit energies and forces of four frames, the later ones repair. `local=NearestMolecules(5)` makes a sample
# of each molecule with its four nearest ones.

# %%
callback = StABlECallback(
    structures=DATA / "water_train.extxyz",
    reference=DATA / "water_target.extxyz",
    integrator=integrator,
    objective="boltzmann",
    observables=observables,
    detector=detector,
    local=NearestMolecules(5),
    n_replicas=8 if FULL else 2,
    window_ps=0.3 if FULL else 0.01,
    record_every_fs=20.0 if FULL else 5.0,
    learning_rate=0.002,
    steps_per_window=3,
    start_epoch=100 if FULL else 1,
    schedule=Schedule(max_failures_per_ns=300.0 if FULL else 3e5, max_windows=20 if FULL else 1),
)
data = ExtxyzDataModule(train=DATA / "water_train.extxyz", valid=DATA / "water_valid.extxyz", batch_size=1)
module = MACEModule(r_max=3.5, hidden_irreps="8x0e", max_ell=2, correlation=1, lr=0.02)
trainer = Trainer(
    max_epochs=-1 if FULL else 3,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    gradient_clip_val=10.0,
    accumulate_grad_batches=4,
    callbacks=[callback],
)
trainer.fit(module, data)

# %% [markdown]
# ## Evaluation

# %%
evaluator = Evaluator(
    starts=DATA / "water_heldout.extxyz",
    reference=DATA / "water_reference.extxyz",
    integrator=integrator,
    detector=AnyOf([BondDeviation(threshold=0.5), IntermolecularContact(distance=1.2)]),
    observables=[RadialDistribution(("O", "O")), RadialDistribution(("O", "H"))],
    n_replicas=8 if FULL else 2,
    horizons_ps=[2.0] if FULL else [0.02],
    record_every_fs=20.0 if FULL else 10.0,
)
(summary,) = evaluator.evaluate(module.model).summaries
print(f"{summary['unstable']} of {summary['replicas']} replicas failed within {summary['horizon_ps']:g} ps")
print("mean absolute errors of the radial distributions:", summary["observables"])
