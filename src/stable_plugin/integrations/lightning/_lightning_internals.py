"""Private attributes of Lightning that have no public counterpart; nothing else in this package reads any.

Every function works without the attribute: training is the same, and only resuming in the middle of an epoch is not exact.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

PRIVATE_ATTRIBUTES = (
    # Iterator over the batches of the present epoch.
    "fit_loop._data_fetcher",
    # Number of batches that ended with an optimizer step, which loggers use as their step.
    "fit_loop.epoch_loop._batches_that_stepped",
    # Public only for strategies of several processes.
    "_accelerator_connector.cluster_environment",
    # Flag that Lightning's handler of SIGTERM sets; it has no handler for SIGINT.
    "_signal_connector.received_sigterm",
)
"""Read from a Trainer of ``pytorch_lightning`` or ``lightning``."""


def missing_attributes(trainer: Any) -> list[str]:
    """Return those of ``PRIVATE_ATTRIBUTES`` that a Trainer does not have."""
    return [name for name in PRIVATE_ATTRIBUTES if _get(trainer, name, missing := object()) is missing]


def skip_batches(trainer: Any, n_batches: int) -> bool:
    """Take batches from the iterator of the present epoch and discard them.

    Args:
        trainer: The Trainer.
        n_batches: Number of batches.

    Returns:
        Whether they were skipped.
    """
    fetcher = _get(trainer, "fit_loop._data_fetcher", None)
    if fetcher is None or not hasattr(fetcher, "fetched"):
        return False
    fetched = fetcher.fetched
    for _ in range(n_batches):
        next(fetcher)
    fetcher.fetched = fetched  # Lightning adds the number of earlier batches itself
    return True


def uncount_stepped_batch(trainer: Any) -> None:
    """Count one batch with an optimizer step less, because Lightning counts it again when it resumes."""
    loop = trainer.fit_loop.epoch_loop
    if hasattr(loop, "_batches_that_stepped"):
        loop._batches_that_stepped -= 1


def slurm_environment(trainer: Any) -> Any:
    """Return the Trainer's SLURM environment, of either Lightning; None if it runs in another one."""
    environment = _get(trainer, "_accelerator_connector.cluster_environment", None)
    is_slurm = any(kind.__name__ == "SLURMEnvironment" for kind in type(environment).__mro__)
    return environment if is_slurm else None


def request_stop(trainer: Any) -> None:
    """Let the Trainer stop between two batches, as after SIGTERM; without the attribute it stops at the end of training."""
    connector = _get(trainer, "_signal_connector", None)
    if hasattr(connector, "received_sigterm"):
        connector.received_sigterm = True


def _get(trainer: Any, name: str, default: Any) -> Any:
    try:
        return attrgetter(name)(trainer)
    except AttributeError:
        return default
