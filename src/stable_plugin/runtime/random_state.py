"""Random streams: the global generators, which shuffling and dropout draw from, and those of a simulation."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Return the states of the generators of Python, NumPy and torch, CUDA included, as tensors and plain values."""
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": (version, torch.tensor(words), gauss),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Restore what :func:`random_state` returned; CUDA states only if there are as many devices as there were."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([each.cpu() for each in state["cuda"]])


class RandomStreams:
    """The random streams of a simulation, all from one seed, none shared with the trainer.

    Args:
        seed: Seed of all streams.
        device: Device of the simulation.

    Attributes:
        noise: Velocities and thermostat noise, on the device.
        choices: Which replicas restart, and where; on the CPU.
        window: Number of the window that is simulated next; seeds what the model itself draws.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.noise = torch.Generator(device).manual_seed(seed)
        self.choices = torch.Generator().manual_seed(seed + 1)
        self.window = 0
        self._seed = seed
        self._device = device
        self.mark()

    def mark(self) -> None:
        """Make the present state of the noise the one that is saved: an interrupted window is simulated again from here."""
        self._marked = self.noise.get_state()

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """Give the model global random streams that depend on the window alone, and restore the trainer's afterwards.

        Some models draw from the global streams in every call, as eSEN does for the frame of an edge. What an interrupted
        window drew must not change the steps that follow.
        """
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            torch.manual_seed(self._seed + self.window)
            yield

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the streams at the last :meth:`mark`."""
        return {"noise": self._marked, "choices": self.choices.get_state(), "window": self.window}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.noise.set_state(state["noise"].cpu())
        self.choices.set_state(state["choices"].cpu())
        self.window = state["window"]
        self.mark()
