"""The ranks that run on one machine, and the page of each that the others see."""

from __future__ import annotations

import logging
import os
import secrets
from dataclasses import dataclass

import numpy as np

from pm.storage.shared_memory import SharedBlock, map_block

log = logging.getLogger("adaloader")

_PAGE_BYTES = 4096
_AREA_BYTES = 1 << 28
_TOKEN, _WRITES = 0, 1


@dataclass
class Machine:
    """The ranks of one machine, this one included, that can map each other's memory.

    `pages` (by rank) are int64 words that all of them see, `processes` (by rank) their process ids. Word `_WRITES` of a
    page counts the beginnings and ends of writes to that rank's records which no step orders. `areas` (by rank) are
    bytes that all see, and which take memory as they are written (see `SharedGradients`).
    """

    pages: dict[int, np.ndarray]
    areas: dict[int, np.ndarray]
    processes: dict[int, int]

    def writes(self, rank: int) -> int:
        """Return the number of beginnings and ends of such writes: odd while there is one."""
        return int(self.pages[rank][_WRITES])

    def count_write(self, rank: int) -> None:
        """A write to the records of `rank`, which is this one, begins or ends."""
        self.pages[rank][_WRITES] += 1


def meet(comm, wanted: bool | int) -> Machine:
    """Find the ranks that share this rank's machine, and see that each can map the others' memory (collective).

    Args:
        comm: the communicator of all ranks.
        wanted: whether memory is to be shared; each is by itself unless all ranks of the machine want it and can. A
            number: so many ranks, in turn, count as one machine (the smallest number given on the machine holds).
    """
    from mpi4py import MPI  # only where there are ranks to talk to

    machine = Machine({}, {}, {})
    node = _divided(ranks_of_machine(comm), wanted)
    try:
        block = None
        why_not = None if wanted else "shared_memory=False"
        if wanted and node.size > 1:
            try:
                block = SharedBlock(_PAGE_BYTES + _AREA_BYTES)
            except OSError as error:
                why_not = str(error)
        everyones = _exchange(node, comm.rank, block)
        if node.size > 1 and (everyones[:, 1] >= 0).all():
            try:
                _map_pages(machine, everyones, comm.rank, block)
            except OSError as error:
                why_not = str(error)
        elif why_not is None:
            why_not = "another rank cannot"
        can = np.array([why_not is None])
        node.Allreduce(MPI.IN_PLACE, can, MPI.LAND)
    finally:
        node.Free()
    if can[0]:
        return machine
    if wanted and len(everyones) > 1:
        log.warning("rank %d shares no memory with others on its machine: %s", comm.rank, why_not or "others cannot")
    return Machine({}, {}, {})


def ranks_of_machine(comm):
    """Return a communicator of the ranks of this rank's machine, as MPI sees it (collective)."""
    from mpi4py import MPI

    return comm.Split_type(MPI.COMM_TYPE_SHARED, comm.rank)


def _divided(node, wanted: bool | int):
    """Return a communicator of the ranks that count as one machine with this one, out of those of `node`, which it
    frees (collective).
    """
    most = np.array([node.size if isinstance(wanted, bool) else wanted], np.int64)
    everyones = np.empty(node.size, np.int64)
    node.Allgather(most, everyones)
    size = int(everyones.min())
    if size >= node.size:
        return node
    part = node.Split(node.rank // size, node.rank)
    node.Free()
    return part


def _exchange(node, rank: int, block: SharedBlock | None) -> np.ndarray:
    """Return (rank, file or -1, process, token) of each rank of the machine (collective)."""
    token = secrets.randbits(62)
    if block is not None:
        np.frombuffer(block.memory, np.int64, _PAGE_BYTES // 8)[_TOKEN] = token
    mine = np.array([rank, -1 if block is None else block.file, os.getpid(), token], np.int64)
    everyones = np.empty((node.size, len(mine)), np.int64)
    node.Allgather(mine, everyones)
    return everyones


def _map_pages(machine: Machine, everyones: np.ndarray, rank: int, own: SharedBlock) -> None:
    for peer, file, process, token in everyones.tolist():
        memory = own.memory if peer == rank else map_block(process, file, own.size)
        page = np.frombuffer(memory, np.int64, _PAGE_BYTES // 8)
        if page[_TOKEN] != token:
            raise OSError(f"process {process} is another one here than it is for itself")
        machine.pages[peer], machine.processes[peer] = page, process
        machine.areas[peer] = np.frombuffer(memory, np.uint8, offset=_PAGE_BYTES)
