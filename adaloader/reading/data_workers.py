"""Reading from a loader's worker processes: one that has died is told as that, whatever it broke in dying."""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing.connection import wait
from typing import Any

# A worker that dies closes its sockets, and the pipe that is its sentinel, before the system says that it has ended:
# seconds before, if it has much memory to give back and the machine is busy.
_DYING_SECONDS = 10.0
# What PyTorch says of an error that was raised in a worker, which lives.
_RAISED_IN_WORKER = "in DataLoader worker process"


def read_batch(inner: Iterator) -> Any:
    """Return the next batch of `inner`, an iterator of PyTorch's or torchdata's loader.

    A batch's tensors are fetched from the worker that made them, in shared memory. PyTorch looks for a dead worker
    when that fails, but not for one that is still dying, and then the user sees a broken connection and no cause.

    Raises:
        RuntimeError: a worker process died while its batch was read.
    """
    try:
        return next(inner)
    except (ConnectionError, EOFError, FileNotFoundError) as error:
        if _RAISED_IN_WORKER in str(error):
            raise
        # Of a stream's workers those that have no more end in order, before the others.
        workers = {worker.sentinel: worker for worker in getattr(inner, "_workers", ()) if worker.exitcode != 0}
        ended = [workers[sentinel] for sentinel in wait(list(workers), _DYING_SECONDS)] if workers else []
        for worker in ended:
            worker.join(_DYING_SECONDS)
        died = [worker for worker in ended if worker.exitcode != 0]
        if not died:
            raise
        causes = ", ".join(f"pid {worker.pid}, exit code {worker.exitcode}" for worker in died)
        raise RuntimeError(
            f"DataLoader worker ({causes}) exited unexpectedly while a batch of it was read. An exit code -N means "
            "that signal N ended it; -9 is often the system's want of memory: lower num_workers or prefetch_factor"
        ) from error
