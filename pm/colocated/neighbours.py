"""The ranks of one machine: they map each other's record stores, and read each other's rows there without a message.

This is exact at staleness 0: an owner applies step v only when every rank's STEP v is here, and a rank sends that when
it has read what it needs at version v. So no record is written while a neighbour may be reading it, but by a lookup
with max_norm, which scales rows down at any time: readers notice that, and read again.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

import cuda_ops
from pm.colocated.machine import meet
from pm.colocated.shared_gradients import SharedGradients
from pm.messages import Kind, Message
from pm.storage.shared_memory import MappedBlock, SharedBlock, map_block
from pm.storage.store import RecordClass, RecordStore
from pm.tables import Table

if TYPE_CHECKING:
    from pm.exact.synchronous import SynchronousManager

log = logging.getLogger("adaloader")

_PAUSE_SECONDS = 1e-5
# Of a process's 128 TiB of address space: the rest is for what this rank makes itself.
_MOST_MAPPED_BYTES = 1 << 46
# Their stores each take a file descriptor until all have mapped them; a process may have as few as 256.
_OFFERED_AT_ONCE = 32


class Neighbours:
    """Which ranks of this machine read rows of which tables here, and where this rank reads theirs.

    Invariant: a rank is in `_readers[t]` from when it has said that it has this rank's records of table t mapped, until
    that table gets another store. Both happen within collective operations, while rows are not read.

    Args:
        manager: whose rows these are.
        comm: the communicator of all ranks (collective).
        wanted: whether ranks of one machine share memory.
    """

    def __init__(self, manager: SynchronousManager, comm, wanted: bool):
        self._manager = manager
        self._machine = meet(comm, wanted)
        self.peers = sorted(set(self._machine.pages) - {comm.rank})
        self.gradients = SharedGradients(self._machine, comm.rank, manager.others.ready)
        self._serials = itertools.count()
        self._serial_of: dict[SharedBlock, int] = {}
        self._readers: dict[int, set[int]] = {}
        self._whole: set[int] = set()
        self._mapped: dict[tuple[int, int], np.ndarray] = {}  # by rank and serial number
        self._places: dict[tuple[int, int], int] = {}  # serial number by rank and table
        self._offered: list[Table] = []
        self._said: set[tuple[str, int | None]] = set()

    @property
    def ranks(self) -> int:
        """Number of ranks that share memory with this one, itself included."""
        return 1 + len(self.peers)

    def reads(self, rank: int, table: Table) -> bool:
        """Return whether `rank` reads rows of `table` here without a message."""
        return rank in self._readers.get(table.number, ())

    def have_all(self, table: Table) -> bool:
        """Return whether every rank reads every row of `table` without a message: then none is copied, and none moves.

        All ranks agree on that.
        """
        return table.number in self._whole

    # Stores

    def new_store(self, record_class: RecordClass, capacity: int) -> RecordStore:
        """Make a store, in memory that the neighbours can map if there are any."""
        block = None
        if self.peers:
            try:
                block = SharedBlock(RecordStore.bytes_of(record_class, capacity))
                self._serial_of[block] = next(self._serials)
            except OSError as error:
                self._say_once(f"rank {self._manager.rank} sends rows of some tables by message", error)
        return RecordStore(record_class, capacity, block, self._manager.new_index(capacity))

    def offer(self, table: Table) -> None:
        """Share the records of `table` some time until `share_offered` returns (collective)."""
        self._offered.append(table)
        if len(self._offered) >= _OFFERED_AT_ONCE:
            self.share_offered()

    def share_offered(self) -> None:
        """Share the records of all tables on `offer` (collective)."""
        offered, self._offered = self._offered, []
        self.share(offered)

    def share(self, tables: Sequence[Table]) -> None:
        """Have the neighbours map the records of `tables` (collective); one that cannot goes on getting messages.

        A store keeps no file descriptor for those of its tables that come later: who has not mapped it with the first
        gets messages for them too. When it returns, what was sent before has arrived.
        """
        manager = self._manager
        stores = {table.store.block for table in manager.tables if table.store is not None}
        self._serial_of = {block: serial for block, serial in self._serial_of.items() if block in stores}
        for table in tables:
            block = table.store.block
            for peer in self.peers if block is not None else ():
                numbers = table.number, self._serial_of[block], block.file, block.size
                manager.transport.send(peer, Message(Kind.STORE, numbers))
        manager.barrier()  # all have mapped what they can, and said so
        manager.barrier()  # and all have heard it
        for block in self._serial_of:
            block.close_file()
        if self.ranks == manager.ranks:  # as on all of them
            self._agree_on_whole(tables)

    def _agree_on_whole(self, tables: Sequence[Table]) -> None:
        everyone = set(self._manager.peers)
        whole = self.on_all([self._readers.get(table.number) == everyone for table in tables])
        self._whole.update(table.number for table, is_whole in zip(tables, whole, strict=True) if is_whole)

    def forget(self, table: Table) -> None:
        """The records of `table` leave for another store."""
        self._readers.pop(table.number, None)
        self._whole.discard(table.number)

    def on_store(self, source: int, message: Message) -> None:
        """STORE(table, serial number, file, size): the records of a table of `source` are in that file of its own."""
        manager = self._manager
        number, serial, file, size = message.numbers
        manager.asking.forget_slots(source, number)
        self._places.pop((source, number), None)
        used = {(rank, serial) for (rank, _), serial in self._places.items()}
        self._mapped = {at: memory for at, memory in self._mapped.items() if at in used}
        try:
            if (source, serial) not in self._mapped:
                mapped = sum(memory.size for memory in self._mapped.values())
                if mapped + size > _MOST_MAPPED_BYTES:
                    raise OSError(f"{size:,} bytes of it would join {mapped:,}; {_MOST_MAPPED_BYTES:,} are the most")
                if file < 0:
                    raise OSError("it could not be mapped for a table that was declared before")
                memory = map_block(self._machine.processes[source], file, size)
                self._mapped[source, serial] = np.frombuffer(memory, np.uint8)
            self._places[source, number] = serial
        except OSError as error:
            self._say_once(f"rank {manager.rank} gets rows of rank {source} by message", error)
        manager.transport.send(source, Message(Kind.MAPPED, (number, int((source, number) in self._places))))

    def on_mapped(self, source: int, message: Message) -> None:
        """MAPPED(table, whether it is): `source` has this rank's records of a table mapped."""
        number, mapped = message.numbers
        if mapped:
            self._readers.setdefault(number, set()).add(source)

    def block_for_all(self, size: int) -> SharedBlock | MappedBlock | None:
        """Return zeros of so many bytes that all ranks have mapped; None if they cannot (collective)."""
        if self.ranks < self._manager.ranks:
            return None
        rank, block, problem = self._manager.rank, None, None
        file = np.array([-1], np.int64)
        if rank == 0:
            try:
                block = SharedBlock(size)
                file[0] = block.file
            except OSError as error:
                problem = error
        self._collective(lambda comm: comm.Ibcast(file, 0))
        if rank != 0 and file[0] >= 0:
            try:
                block = MappedBlock(map_block(self._machine.processes[0], int(file[0]), size))
            except OSError as error:
                problem = error
        everyone_has_it = self.on_all([block is not None])[0]
        if problem is not None:
            self._say_once(f"rank {rank}: rows of some tables are sent by message", problem)
        if rank == 0 and block is not None:
            block.close_file()
        return block if everyone_has_it else None

    def _say_once(self, what: str, error: OSError) -> None:
        """Log `what` and why, the first time for errors of one kind: what one table lacks, those after it do too."""
        if (what, error.errno) not in self._said:
            self._said.add((what, error.errno))
            log.warning("%s: %s", what, error)

    def on_all(self, here: Sequence[bool]) -> np.ndarray:
        """Return which of several things hold on all ranks (collective)."""
        from mpi4py import MPI

        all_hold = np.array(here, bool)
        self._collective(lambda comm: comm.Iallreduce(MPI.IN_PLACE, all_hold, MPI.LAND))
        return all_hold

    def _collective(self, begin: Callable) -> None:
        self._manager.transport.collective(begin, self._manager.timeout_seconds)

    # Rows

    def gather(self, rank: int, table: Table, slots: np.ndarray, out: np.ndarray, positions: np.ndarray) -> None:
        """Write the values at `slots` (int64 `[n]`) of the records of `rank` to rows `positions` of `out`.

        Any thread, while that rank cannot apply a step.
        """
        memory = self._mapped[rank, self._places[rank, table.number]]
        words, stride = memory.view(table.spec.dtype), table.store.stride
        self._undisturbed_by([rank], lambda: cuda_ops.gather(words, stride, slots, out, positions=positions))

    def undisturbed(self, read: Callable[[], np.ndarray]) -> np.ndarray:
        """Return what `read()` returns when no neighbour has written outside of a step meanwhile: it may be called
        several times."""
        return self._undisturbed_by(self.peers, read)

    def _undisturbed_by(self, ranks: Sequence[int], read: Callable[[], np.ndarray]) -> np.ndarray:
        machine = self._machine
        while True:
            before = [machine.writes(rank) for rank in ranks]
            if not any(count % 2 for count in before):
                result = read()
                if before == [machine.writes(rank) for rank in ranks]:
                    return result
            self._manager.raise_failure()
            time.sleep(_PAUSE_SECONDS)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Records are written inside, at a time that no step tells the neighbours. For one thread at a time."""
        if self.peers:
            self._machine.count_write(self._manager.rank)
        try:
            yield
        finally:
            if self.peers:
                self._machine.count_write(self._manager.rank)
