# %% [markdown]
# # StABlE training in your own LightningModule
#
# Two additions make a LightningModule of your own trainable:
#
# - `StABlEMixin`, whose `stable_loss()` you add to the loss in `training_step`;
# - a method `stable_potential(system)`, which says how positions become energies.
#
# The model here is a toy: a network on the interatomic distances of one molecule, written in plain torch.

# %%
import os
from pathlib import Path

import torch
from ase.io import read
from pytorch_lightning import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from stable_plugin import BondDeviation, Langevin, Schedule, StABlEMixin
from stable_plugin.models import ModulePotential

FULL = os.environ.get("STABLE_PLUGIN_EXAMPLES") == "full"  # otherwise a miniature that runs in seconds
DATA = Path("recipes/data")


class DistanceNetwork(nn.Module):
    """Energy of a molecule in eV from its interatomic distances."""

    def __init__(self, n_atoms, reference):
        super().__init__()
        self.first, self.second = torch.triu_indices(n_atoms, n_atoms, offset=1)
        distances = self.distances(reference)
        self.register_buffer("mean", distances.mean(dim=0))
        self.register_buffer("scale", distances.std(dim=0))
        self.layers = nn.Sequential(nn.Linear(len(self.first), 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU())
        self.readout = nn.Linear(64, 1)

    def distances(self, positions):
        return torch.linalg.vector_norm(positions[:, self.first] - positions[:, self.second], dim=-1)

    def forward(self, positions):
        features = self.layers((self.distances(positions) - self.mean) / self.scale)
        return self.readout(features).squeeze(-1)


# %% [markdown]
# ## The module
#
# `configure_stable` takes the same settings as `StABlECallback`. Structures are passed here, as the batches of this module
# are plain tensors. `stable_loss()` returns
#
# - the observables' loss, whose gradient is the Boltzmann estimate; it simulates when it has to;
# - `None` when the replicas stayed stable for the requested time: training ends, and the step is skipped.
#
# The factor in front of it is the weight of the observable.


# %%
class DistanceModule(StABlEMixin, LightningModule):
    def __init__(self, model, structures):
        super().__init__()
        self.model = model
        self.configure_stable(
            structures=structures,
            integrator=Langevin(temperature_K=500.0),
            detector=BondDeviation(threshold=0.4, discard=3.0),
            n_replicas=32 if FULL else 4,
            window_ps=0.2 if FULL else 0.02,
            record_every_fs=10.0 if FULL else 5.0,
            start_epoch=200 if FULL else 2,
            schedule=Schedule(max_failures_per_ns=300.0 if FULL else 3e5, max_windows=10 if FULL else 1),
        )

    def stable_potential(self, system):
        return ModulePotential(self.model, system)

    def training_step(self, batch, batch_idx):
        observable_loss = self.stable_loss()
        if observable_loss is None:
            return None
        positions, energies, forces = batch
        positions.requires_grad_(True)
        predicted = self.model(positions)
        (gradient,) = torch.autograd.grad(predicted.sum(), positions, create_graph=True)
        loss = (predicted - energies).square().mean() + 10.0 * (gradient + forces).square().mean()
        self.log("loss", loss, prog_bar=True)
        return loss + 100.0 * observable_loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


# %% [markdown]
# ## Training
#
# An ordinary Trainer: the mixin registers its own callback, which runs the simulation, and saves and restores it with every
# checkpoint.

# %%
torch.manual_seed(0)
frames = read(DATA / "aspirin_train.extxyz", ":")
positions = torch.tensor([frame.positions for frame in frames], dtype=torch.float32)
energies = torch.tensor([frame.info["REF_energy"] for frame in frames])
forces = torch.tensor([frame.arrays["REF_forces"] for frame in frames], dtype=torch.float32)
dataset = TensorDataset(positions, (energies - energies.mean()).float(), forces)

module = DistanceModule(DistanceNetwork(len(frames[0]), positions), frames)
trainer = Trainer(max_epochs=300 if FULL else 4, accelerator="cpu", logger=False, enable_checkpointing=False)
trainer.fit(module, DataLoader(dataset, batch_size=10, shuffle=True))
print(f"training ended after {trainer.current_epoch} epochs and {trainer.global_step} optimizer steps")
