"""Several processes of a distributed run, as threads of one process: reductions without a process group."""

from threading import Barrier, Thread

import torch


class ThreadedContexts:
    """Runs one function per rank, each in a thread with a context of its own."""

    def __init__(self, size):
        self.items, self.barrier = [None] * size, Barrier(size, timeout=20)

    def run(self, work):
        """Return the results of ``work(rank, context)``, ordered by rank."""
        results = [None] * len(self.items)

        def one(rank):
            try:
                results[rank] = work(rank, ThreadedContext(self, rank))
            except BaseException:
                self.barrier.abort()
                raise

        threads = [Thread(target=one, args=(rank,)) for rank in range(len(self.items))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(result is not None for result in results)
        return results


class ThreadedContext:
    """The reductions of :class:`stable_plugin.runtime.distributed.DistributedContext` over threads."""

    def __init__(self, threads, rank):
        self.threads, self.rank, self.size = threads, rank, len(threads.items)

    def _all(self, item):
        self.threads.items[self.rank] = item
        self.threads.barrier.wait()
        items = list(self.threads.items)
        self.threads.barrier.wait()
        return items

    def sum(self, tensor):
        return torch.stack(self._all(tensor)).sum(dim=0)

    def max(self, tensor):
        return torch.stack(self._all(tensor)).amax(dim=0)

    def count(self, number, device):
        assert device == torch.device("cpu")
        return sum(self._all(number))

    def sum_all(self, tensors):
        return [sum(parts) for parts in zip(*self._all(tensors), strict=True)]
