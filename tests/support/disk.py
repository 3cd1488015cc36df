"""Full disks."""

import resource
from contextlib import contextmanager

import torch

MEGABYTE = torch.zeros(2**17, dtype=torch.float64)


@contextmanager
def files_up_to(n_bytes):
    """Limit the length of files in this process, which then fails to write as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
