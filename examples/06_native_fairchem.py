# %% [markdown]
# # Native fairchem training
#
# A configuration that trains with fairchem's own `TrainEvalRunner` becomes StABlE training by one entry under
# `runner.callbacks`. This example writes a data set, starts fairchem's command line with
# `examples/06_native_fairchem.yaml`, and looks at what it leaves.

# %%
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ase.db
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read

from stable_plugin.models.fairchem import load_fairchem

FULL = os.environ.get("STABLE_PLUGIN_EXAMPLES") == "full"  # otherwise a miniature that runs in seconds
DATA = Path("recipes/data")
FOLDER = Path("runs/native_fairchem").absolute()

# %% [markdown]
# ## The data
#
# fairchem reads `aselmdb` databases. Charge and spin multiplicity are stored with each structure.

# %%
shutil.rmtree(FOLDER, ignore_errors=True)
FOLDER.mkdir(parents=True)
for split in ("train", "valid"):
    with ase.db.connect(str(FOLDER / f"{split}.aselmdb"), type="aselmdb") as database:
        for frame in read(DATA / f"aspirin_{split}.extxyz", ":" if FULL else ":8"):
            atoms = frame.copy()
            energy, forces = atoms.info.pop("REF_energy"), atoms.arrays.pop("REF_forces")
            atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
            database.write(atoms, data={"charge": 0, "spin": 1})

# %% [markdown]
# ## The entry
#
# `task_name`, `charge` and `spin` select what the model is asked for. All other keys are the settings of the callback in
# Lightning, see `StABlEConfig`. Start structures come from the training data unless `structures` is set.

# %%
config = Path("examples/06_native_fairchem.yaml").absolute()
print(config.read_text().partition("# Start of the entry\n")[2])

# %% [markdown]
# ## The run
#
# fairchem's own batches, losses, clipping, optimizer, averaged weights and checkpoints stay in charge. The observables'
# gradient joins before the optimizer's step, from `start_epoch` on; training ends when the replicas stay stable.

# %%
fairchem = shutil.which("fairchem", path=str(Path(sys.executable).parent)) or "fairchem"
SETTINGS = [
    f"folder={FOLDER}",
    f"reference={(DATA / 'aspirin_target.extxyz').absolute()}",
    f"size={'full' if FULL else 'quick'}",
]
subprocess.run([fairchem, "-c", str(config), *SETTINGS], check=True)

# %% [markdown]
# ## What is left
#
# Each checkpoint holds the phase, the replicas and the random streams in `stable.pt`, beside fairchem's own state, so a
# run that is interrupted resumes from there. `inference_ckpt.pt` is the potential, for `FAIRChemCalculator` or
# `load_fairchem`; its averaged weights are those that passed the simulation.

# %%
(final,) = FOLDER.glob("runs/*/checkpoints/final")
print(sorted(path.name for path in final.iterdir()))
state = torch.load(final / "stable.pt", weights_only=True)["processes"][0]
print(len(state["loop"]["windows"]), "windows simulated")

# %% [markdown]
# ## Fine-tuning
#
# `examples/06_native_finetuning.yaml` is a complete configuration that starts from an inference checkpoint instead, here from
# the one above. The entry is the same.

# %%
finetuning = Path("examples/06_native_finetuning.yaml").absolute()
start = final / "inference_ckpt.pt"
subprocess.run([fairchem, "-c", str(finetuning), f"checkpoint={start}", *SETTINGS], check=True)
(finetuned,) = FOLDER.glob("finetuning/*/checkpoints/final")
state = torch.load(finetuned / "stable.pt", weights_only=True)["processes"][0]
print(len(state["loop"]["windows"]), "windows simulated")
potential = load_fairchem(finetuned / "inference_ckpt.pt", task_name="omol")
print(sum(weights.numel() for weights in potential.parameters()), "weights")
