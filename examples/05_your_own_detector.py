# %% [markdown]
# # Your own detector and observable
#
# A potential can fail in ways that bond lengths do not show. Example: a carbon atom with three neighbors, as in a ring or a
# carboxyl group, is nearly planar, and a poor potential may let it invert. This example watches, and repairs, the distance of such an
# atom from the plane of its neighbors.

# %%
import os
from pathlib import Path

import torch
from ase.io import read
from pytorch_lightning import Trainer

from stable_plugin import (
    AnyOf,
    BondAmplitudes,
    BondDeviation,
    BondLengths,
    Detector,
    ExtxyzDataModule,
    Langevin,
    Observable,
    Schedule,
    StABlECallback,
    System,
)
from stable_plugin.models.mace import MACEModule

FULL = os.environ.get("STABLE_PLUGIN_EXAMPLES") == "full"  # otherwise a miniature that runs in seconds
DATA = Path("recipes/data")
CARBON = 6


# %% [markdown]
# ## The geometry
#
# Positions have the shape (n_replicas, n_atoms, 3), in Å. Write everything for the whole batch, without loops over replicas
# and without `.item()`: the detector runs between the steps of the simulation.


# %%
def planar_carbons(system):
    """Return the carbon atoms with three neighbors, and these neighbors: (n,) and (n, 3)."""
    neighbors = [[] for _ in range(len(system.numbers))]
    for first, second in system.bonds.tolist():
        neighbors[first].append(second)
        neighbors[second].append(first)
    found = [
        (atom, near) for atom, near in enumerate(neighbors) if len(near) == 3 and int(system.numbers[atom]) == CARBON
    ]
    return torch.tensor([atom for atom, _ in found]), torch.tensor([near for _, near in found])


def heights(positions, carbons, neighbors):
    """Return the distance of each carbon from the plane of its neighbors, (n_replicas, n), in Å."""
    a, b, c = (positions[:, neighbors[:, index]] for index in range(3))
    normal = torch.linalg.cross(b - a, c - a)
    offset = positions[:, carbons] - a
    return (offset * normal).sum(dim=-1) / torch.linalg.vector_norm(normal, dim=-1)


# %% [markdown]
# ## The detector
#
# `measure` returns one value per replica, larger is worse. `bind` is called once, with the system and reference frames. A replica
# is unstable above `threshold`; frames above `discard` are excluded from learning.


# %%
class OutOfPlane(Detector):
    """Largest distance of a planar carbon atom from the plane of its neighbors."""

    unit = "Å"

    def bind(self, system, reference):
        self.carbons, self.neighbors = planar_carbons(system)

    def measure(self, positions, velocities):
        return heights(positions, self.carbons, self.neighbors).abs().amax(dim=-1)

    def offending_atoms(self, positions, velocities):
        worst = heights(positions, self.carbons, self.neighbors).abs().argmax(dim=-1)
        return [(int(self.carbons[index]),) for index in worst]


# %% [markdown]
# ## The observable
#
# `per_frame` returns the values of each frame; training brings their mean to that of the reference. The square responds to
# large deviations, and the mean square height is what a wrong force constant changes.


# %%
class OutOfPlaneAmplitudes(Observable):
    """Mean square distance of each planar carbon atom from the plane of its neighbors, in Å²."""

    def bind(self, system, reference):
        self.carbons, self.neighbors = planar_carbons(system)
        super().bind(system, reference)

    def per_frame(self, positions):
        return heights(positions, self.carbons, self.neighbors).square()


# %% [markdown]
# Both work on their own. Check them on frames for which you know the answer, before training with them.

# %%
frames = read(DATA / "aspirin_reference.extxyz", ":")
positions = torch.tensor([frame.positions for frame in frames])
system = System.from_atoms(frames[0])

detector = OutOfPlane(threshold=0.5, discard=1.5)
detector.bind(system, positions)
print("planar carbon atoms:", detector.carbons.tolist())
print(f"largest height in the reference: {detector.measure(positions, torch.zeros_like(positions)).max():.2f} Å")

amplitudes = OutOfPlaneAmplitudes()
amplitudes.bind(system, positions[:200])
amplitudes.update(positions[200:])
print(f"second half against the first half: off by {amplitudes.mean_absolute_error():.1e} Å²")

# %% [markdown]
# ## Training with them
#
# They are passed like the built-in ones, and combine with them.

# %%
callback = StABlECallback(
    objective="both",
    reference=DATA / "aspirin_target.extxyz",
    integrator=Langevin(temperature_K=500.0),
    detector=AnyOf([BondDeviation(threshold=0.25, discard=3.0), detector]),
    observables=[BondLengths(), BondAmplitudes(), OutOfPlaneAmplitudes()],
    n_replicas=32 if FULL else 2,
    window_ps=0.4 if FULL else 0.01,
    record_every_fs=25.0 if FULL else 5.0,
    start_epoch=60 if FULL else 1,
    schedule=Schedule(max_failures_per_ns=200.0 if FULL else 3e5, max_windows=6 if FULL else 1),
)
data = ExtxyzDataModule(train=DATA / "aspirin_train.extxyz", valid=DATA / "aspirin_valid.extxyz", batch_size=10)
module = MACEModule(r_max=4.5, hidden_irreps="8x0e", max_ell=1, correlation=1, lr=0.01)
trainer = Trainer(
    max_epochs=-1 if FULL else 3, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[callback]
)
trainer.fit(module, data)
print(len(callback.windows), "windows")
