"""The MPI ranks that a program runs on, as far as an example needs them: who am I, and gather an array.

A program started without mpirun, or without mpi4py installed, is one rank.
"""

from __future__ import annotations

import importlib.util
import resource
from pathlib import Path

import numpy as np


class Ranks:
    """`rank` of `size` processes. `gather` is collective."""

    def __init__(self, alone: bool = False):
        self._comm = None
        if not alone and importlib.util.find_spec("mpi4py"):
            from mpi4py import MPI

            self._comm = MPI.COMM_WORLD
        self.rank = self._comm.rank if self._comm else 0
        self.size = self._comm.size if self._comm else 1

    def gather(self, values: np.ndarray) -> np.ndarray:
        """Collective: return the ranks' float64 arrays [n, ...] in one on rank 0, an empty one elsewhere.

        n may differ between ranks; the other dimensions may not.
        """
        values = np.ascontiguousarray(values, dtype=np.float64)
        if self.size == 1:
            return values
        sizes = np.zeros(self.size, dtype=np.int64)
        self._comm.Gather(np.array([values.size], dtype=np.int64), sizes)
        total = np.empty(int(sizes.sum()), dtype=np.float64)
        self._comm.Gatherv(values, (total, sizes))
        return total.reshape(-1, *values.shape[1:])


def peak_memory_bytes() -> int:
    """The most memory that this process had resident so far."""
    status = Path("/proc/self/status")
    if status.exists():  # unlike getrusage, this does not count what the parent process had before exec
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
