# %% [markdown]
# # Judge a potential
#
# A small force error does not tell how long a potential stays stable in molecular dynamics. Here a small MACE potential
# of aspirin is trained on 50 frames, and then simulated: how many replicas fail, when, and which bonds break?
#
# Any other potential is judged in the same way: replace `module` by `load_mace("my.model")`, by
# `load_fairchem("uma-s-1p1", task_name="omol")`, or by your own LightningModule.

# %%
import os
from pathlib import Path

from pytorch_lightning import Trainer

from stable_plugin import BondDeviation, Evaluator, ExtxyzDataModule, Langevin
from stable_plugin.evaluation import write_report
from stable_plugin.models.mace import MACEModule

FULL = os.environ.get("STABLE_PLUGIN_EXAMPLES") == "full"  # otherwise a miniature that runs in seconds
DATA = Path("recipes/data")

# %% [markdown]
# ## A potential
#
# The model is small on purpose: it trains in a minute, and it fails.

# %%
data = ExtxyzDataModule(train=DATA / "aspirin_train.extxyz", valid=DATA / "aspirin_valid.extxyz", batch_size=10)
module = MACEModule(r_max=4.5, hidden_irreps="8x0e", max_ell=1, correlation=1, lr=0.03, seed=2)
trainer = Trainer(
    max_epochs=60 if FULL else 1,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    gradient_clip_val=10.0,
)
trainer.fit(module, data)

# %% [markdown]
# ## The evaluation
#
# - `starts` are frames that the training has not seen. Replicas are spread evenly over them.
# - `reference` is a trajectory at the temperature of the simulation. Mean bond lengths and the observables' targets come
#   from it.
# - The *detector* decides when a replica has failed: here, when a bond is more than 0.5 Å off its mean length.
# - `labeled` frames have energies and forces, so that the usual errors are reported beside the stability.
#
# Files are read and everything is checked here, before anything is simulated.

# %%
evaluator = Evaluator(
    starts=DATA / "aspirin_heldout.extxyz",
    reference=DATA / "aspirin_reference.extxyz",
    labeled=DATA / "aspirin_heldout.extxyz",
    integrator=Langevin(temperature_K=500.0, timestep_fs=0.5, friction_per_ps=1.0),
    detector=BondDeviation(threshold=0.5),
    n_replicas=32 if FULL else 4,
    horizons_ps=[1.0, 3.0] if FULL else [0.02],
    record_every_fs=50.0 if FULL else 5.0,
    seed=0,
)
result = evaluator.evaluate(module.model)

# %% [markdown]
# ## The numbers
#
# A rate of failures has an exact 95 % interval. Zero failures are not a rate of zero: the upper end of the interval says
# what the simulated time can exclude.

# %%
for summary in result.summaries:
    low, high = summary["failures_per_ns_interval"]
    print(
        f"within {summary['horizon_ps']:g} ps: {summary['unstable']} of {summary['replicas']} replicas failed, "
        f"{summary['failures_per_ns']:.0f} per ns (95 % interval {low:.0f} to {high:.0f})"
    )
print(f"force MAE {result.summaries[0]['force_mae_mev_per_A']:.0f} meV/Å")

# %% [markdown]
# ## The report
#
# One HTML page with the survival curve, observables against the reference, and all numbers; the same numbers are in
# `report.json`.

# %%
report = {"title": "Aspirin, MACE", "evaluation": result.summaries[0]}
page = write_report(Path("runs/judge_a_potential"), report, {"evaluation": result.curves, "axes": result.axes})
print(page)
