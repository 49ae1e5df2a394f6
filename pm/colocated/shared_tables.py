"""Tables whose records are in memory that all ranks share: all ranks are on one machine, and rows move at no step that
does not touch them.

There is nothing to move, to copy or to merge, so no message is about a row of them: a lookup reads the record, and a
step updates it, at staleness 0 by its owner when all ranks have handed over their gradients (`shared_steps.py`), with
staleness by each rank. (While a checkpoint is being written, whoever changes another's rows has it keep them first.)
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pm.asynchronous.table_groups import TableGroups
from pm.messages import Kind, Message, narrow, widen
from pm.pieces import Summing
from pm.storage.shared_store import MOST_ROWS, SharedStore, most_keys
from pm.tables import RowPlan, Stretch, Table
from pm.waiting import PeerError

if TYPE_CHECKING:
    from pm.exact.synchronous import SynchronousManager


class SharedTables:
    """Which tables are such, and their rows.

    Tables of one kind share a store, in which the rows of each follow those of the one before.

    Args:
        manager: of which rank.
        rules: of the update rules under which tables can be such.
        locks: whether ranks update the same records at the same time.
    """

    def __init__(self, manager: SynchronousManager, rules: tuple[type, ...], *, locks: bool):
        self._manager, self._rules, self._locks = manager, rules, locks
        self._groups = TableGroups()
        self._stores: list[SharedStore | None] = []  # by number of group; None: no table is in it any more
        self._rows = 0  # of all stores
        self._serials = itertools.count()
        self._kept: set[int] = set()
        self.summing = Summing()

    def may_take(self, tables: Sequence[Table]) -> list[Table]:
        """Return those of `tables` that can be such, if there is memory."""
        if self._manager.neighbours.ranks < self._manager.ranks:  # as on all of them
            return []
        return [table for table in tables if isinstance(table.spec.rule, self._rules)]

    def add(self, tables: Sequence[Table]) -> None:
        """Give stores to those of `tables` that can have one that is shared (collective)."""
        for members in self._groups.alike(self.may_take(tables)):
            store = self._store_for(members)
            if store is not None:
                self._groups.add_group(members)
                self._stores.append(store)
                for table in members:
                    table.store = store

    def _store_for(self, tables: Sequence[Table]) -> SharedStore | None:
        """Map memory for the records of `tables` on all ranks, or on none (collective)."""
        manager, record_class = self._manager, tables[0].spec.record_class
        rows = sum(table.spec.rows for table in tables)
        has_room = self._rows + rows <= most_keys() and rows <= MOST_ROWS
        if not manager.neighbours.on_all([has_room])[0]:
            return None
        block = manager.neighbours.block_for_all(SharedStore.block_bytes(record_class, rows, manager.ranks))
        if block is None:
            return None
        self._rows += rows
        return SharedStore(
            record_class, rows, block, manager.rank, manager.ranks, self._locks, self._be_patient, self._ask_to_keep
        )

    def left(self, store: SharedStore) -> None:
        """A table has left a store: give that back with its last one."""
        if not any(table.store is store for table in self._manager.tables):
            self._stores[self._stores.index(store)] = None
            self._rows -= store.capacity

    def _be_patient(self, what: str, since: float) -> None:
        manager = self._manager
        manager.raise_failure()
        waited = time.perf_counter() - since
        if waited > manager.timeout_seconds:
            limit = f"timeout_seconds={manager.timeout_seconds:g}"
            raise PeerError(f"rank {manager.rank} waited {waited:.0f} s ({limit}) for {what}")

    # Rows

    def keys(self, table: Table, rows: np.ndarray) -> np.ndarray:
        """Return the keys of `rows` in the table's store (int64 `[n]` both)."""
        return self._groups.span_of(table).keys(rows)

    def touch(self, table: Table, rows: np.ndarray) -> np.ndarray:
        """Return the slots of distinct `rows` (int64 `[n]` both); make the records that nobody has made. Any thread."""
        return self._make(table.store, self.keys(table, rows))

    def _make(self, store: SharedStore, keys: np.ndarray) -> np.ndarray:
        def fill(some: np.ndarray, slots: np.ndarray) -> None:
            for table, at, rows in self._groups.split(self._stores.index(store), some):
                values, states = self._manager.initial_rows(table, rows)
                store.set_new(slots[at], values, states)

        with self._manager.structure:  # what rows start from does not go meanwhile
            return store.make(keys, fill)

    def owned(self, table: Table, rows: np.ndarray) -> np.ndarray:
        """Return those of `rows` (int64 `[n]`) that this rank owns."""
        return rows[table.store.owns(self.keys(table, rows))]

    def of_table(self, table: Table, keys: np.ndarray, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Manager.of_table`."""
        at, rows = self._groups.span_of(table).rows_among(keys)
        return rows, slots[at]

    def positions_of(self, table: Table, slots: np.ndarray) -> np.ndarray:
        """Return at which of `slots` (int64 `[n]`) rows of `table` are: int64 `[m]`."""
        return self._groups.span_of(table).rows_among(table.store.keys_at(slots))[0]

    def rows_made(self, table: Table) -> tuple[np.ndarray, np.ndarray]:
        """Return (rows, slots) of all records of `table` that were made, whoever owns them, int64 `[n]` both."""
        return self.of_table(table, *table.store.made())

    def plan(self, number: int, table: Table, rows: np.ndarray, expected: int) -> RowPlan:
        """See `Manager.intend`."""
        keys = self.keys(table, rows)
        self._count_neighbours(table.store, keys)
        return RowPlan(number, table, rows, expected, self._make(table.store, keys), table.store)

    def find_together(self, tables: Sequence[Table], rows: np.ndarray, starts: Sequence[int]) -> Stretch | None:
        """See `Manager.find_together`."""
        store = tables[0].store
        if not store.is_shared or any(table.store is not store for table in tables):
            return None
        firsts = [self._groups.span_of(table).first for table in tables]
        keys = rows + np.repeat(firsts, np.diff(starts))
        self._count_neighbours(store, keys)
        return Stretch(self._make(store, keys), store, keys)

    def _count_neighbours(self, store: SharedStore, keys: np.ndarray) -> None:
        self._manager.traffic.neighbour_rows += len(keys) - int(np.count_nonzero(store.owns(keys)))

    # Snapshots

    def _ask_to_keep(self, store: SharedStore, rank: int, slots: np.ndarray) -> None:
        manager, serial = self._manager, next(self._serials)
        numbers = self._stores.index(store), serial
        manager.transport.send(rank, Message(Kind.KEEP, numbers, (narrow(slots),)))
        manager.transport.wake()
        manager.wait_until(lambda: serial in self._kept, lambda: f"rank {rank} to keep rows for a checkpoint")
        self._kept.discard(serial)

    def on_keep(self, source: int, message: Message) -> None:
        """KEEP(group, serial number; slots): `source` is about to change these records, which this rank owns."""
        group, serial = message.numbers
        self._stores[group].keep_own(widen(message.arrays[0]))
        self._manager.transport.send(source, Message(Kind.KEPT, (serial,)))

    def on_kept(self, source: int, message: Message) -> None:
        """KEPT(serial number): `source` has kept what a KEEP was about."""
        self._kept.add(message.numbers[0])

    @property
    def memory_bytes(self) -> int:
        """Bytes of the records that this rank owns, and of their states."""
        return sum(store.memory_bytes for store in self._stores if store is not None)
