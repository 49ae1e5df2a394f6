"""How many processes a launcher (mpirun or srun) has started, and the communicator of all of them."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mpi4py import MPI

log = logging.getLogger("adaloader")

# How long a rank waits for the others to come before it says so, and again after twice as long.
_SECONDS_TO_SAY = 30.0
_SECONDS_BETWEEN_LOOKS = 1e-3
# (size, rank) variables that launchers set for each process: MPICH's Hydra and PMI-2, Open MPI, MVAPICH, Slurm's srun.
_LAUNCHERS = (
    ("PMI_SIZE", "PMI_RANK"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)


def launched() -> tuple[int, int]:
    """Return (number of processes, number of this one) as the launcher says, (1, 0) where there was none."""
    for size, rank in _LAUNCHERS:
        if size in os.environ and rank in os.environ:
            return int(os.environ[size]), int(os.environ[rank])
    return 1, 0


def launched_ranks() -> int:
    """Return how many processes the launcher (mpirun or srun) started, 1 where there was none."""
    return launched()[0]


def default_comm() -> MPI.Comm | None:
    """Return MPI.COMM_WORLD when a launcher started several processes, None for a process that is alone.

    Raises:
        RuntimeError: if several were started but mpi4py is absent, or belongs to another MPI than the launcher.
    """
    started = launched_ranks()
    if started == 1:
        return None
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # the latter where mpi4py finds no MPI library
        raise RuntimeError(
            f"a launcher started {started} processes, but mpi4py cannot be imported ({error}), so that each would "
            "train alone; install it with: pip install 'adaloader[mpi]'"
        ) from error
    if MPI.COMM_WORLD.size != started:
        raise RuntimeError(
            f"the launcher started {started} processes, but mpi4py sees {MPI.COMM_WORLD.size}: it was built for "
            f"another MPI ({MPI.Get_library_version().splitlines()[0][:60]}); launch with that library's own mpirun"
        )
    return MPI.COMM_WORLD


def await_all(comm: MPI.Comm) -> None:
    """Wait until every rank is here (collective), and say it where that takes long: one may never come."""
    request, began, due = comm.Ibarrier(), time.perf_counter(), _SECONDS_TO_SAY
    while not request.Test():
        time.sleep(_SECONDS_BETWEEN_LOOKS)
        waited = time.perf_counter() - began
        if waited > due:
            log.warning(
                "rank %d has waited %.0f s for other ranks: every rank must build the AdaLoader or ParameterManager "
                "that this one builds",
                comm.rank,
                waited,
            )
            due += 2 * waited


@contextlib.contextmanager
def on_all_ranks(comm: MPI.Comm | None, what: str) -> Iterator[None]:
    """Do on each rank what is inside, which talks to no other, and go on if it succeeded on all of them (collective).

    Raises:
        Exception: that of what is inside, where it failed.
        RuntimeError: on the ranks where it did not, if it failed on another; names those, and `what` they could not do.
    """
    failed = np.ones(1, np.uint8)
    try:
        yield
        failed[0] = 0
    except Exception:
        _of_ranks(comm, failed)
        raise
    ranks = np.flatnonzero(_of_ranks(comm, failed)).tolist()
    if ranks:
        raise RuntimeError(f"rank {', '.join(map(str, ranks))} could not {what}; the error there says why")


def _of_ranks(comm: MPI.Comm | None, mine: np.ndarray) -> np.ndarray:
    if comm is None or comm.size == 1:
        return mine
    everyones = np.empty(comm.size * len(mine), mine.dtype)
    await_all(comm)
    comm.Allgather(mine, everyones)
    return everyones
