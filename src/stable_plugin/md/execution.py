"""How the steps of a simulation are run, which changes their speed and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stable_plugin.runtime import checks

Choice = Literal["auto"] | bool


@dataclass(frozen=True)
class Execution:
    """How the simulator runs its steps.

    Args:
        capture: Whether blocks of steps are captured as CUDA graphs. ``auto`` tries on a CUDA device and goes on without
            where a model cannot be captured, ``True`` makes that an error.
        compile: Whether the model's energy is compiled. ``auto`` does so on a CPU when the simulation is long enough to pay
            for it, and goes on without where a model cannot be compiled; ``True`` makes that an error.
        threads: Threads on a CPU. ``auto`` measures which number is fastest when the simulation begins, ``None`` leaves
            torch's own. Numbers from different thread counts agree to rounding, not to the last bit.

    Raises:
        ValueError: If an argument is none of these.
    """

    capture: Choice = "auto"
    compile: Choice = "auto"
    threads: int | Literal["auto"] | None = "auto"

    def __post_init__(self) -> None:
        for name in ("capture", "compile"):
            value = getattr(self, name)
            if not isinstance(value, bool) and value != "auto":
                raise ValueError(f"{name}={value!r} is none of 'auto', True and False.")
        if self.threads is not None and self.threads != "auto":
            checks.count("threads", self.threads, at_most=4096, hint="Or 'auto', or None for torch's own number.")
