"""How the steps of a simulation are executed, which changes their speed and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stable_plugin.runtime import checks

Choice = Literal["auto"] | bool


@dataclass(frozen=True)
class Execution:
    """How the simulator executes its steps.

    Args:
        capture: Whether blocks of steps are captured as CUDA graphs. ``auto`` tries it on a CUDA device and continues
            without if the model cannot be captured; ``True`` makes that an error.
        compile: Whether the model's energy is compiled. ``auto`` compiles on a CPU if the simulation is long enough to
            pay for it, and continues without if the model cannot be compiled; ``True`` makes that an error.
        threads: Number of threads on a CPU. ``auto`` measures which number is fastest when the simulation begins, and
            again between windows if steps have become much slower, as beside other processes. ``None`` keeps torch's
            setting. Results on different numbers of threads agree to rounding, not to the last bit.

    Raises:
        ValueError: If an argument is invalid.
    """

    capture: Choice = "auto"
    compile: Choice = "auto"
    threads: int | Literal["auto"] | None = "auto"

    def __post_init__(self) -> None:
        for name in ("capture", "compile"):
            value = getattr(self, name)
            if not isinstance(value, bool) and value != "auto":
                raise ValueError(f"{name}={value!r} is not a valid choice: set 'auto', True or False.")
        if self.threads is not None and self.threads != "auto":
            checks.count(
                "threads", self.threads, at_most=4096, hint="Set 'auto' to measure, None to keep torch's own number."
            )
