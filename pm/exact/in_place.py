"""Plans of tables whose rows every rank reads where they are, in memory that all share.

No such row moves and none is copied. So a rank that has once heard at which slot of its home a row is need not ask
again, owners need not know of plans, and a gradient names slots.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

import cuda_ops
from pm.messages import Kind, Message, narrow, widen
from pm.tables import RowPlan, Table

if TYPE_CHECKING:
    from pm.exact.synchronous import SynchronousManager


class InPlace:
    """Where the rows of other ranks are, as far as this rank has heard.

    Invariant: a key in `_slots` is at that slot of its home's records. It is bounded: by as many keys as this rank
    holds rows, or by the cache of whereabouts, whichever is more.

    Args:
        manager: whose rank this is.
        cached_keys: most keys to remember without holding as many rows.
    """

    def __init__(self, manager: SynchronousManager, cached_keys: int):
        self._manager = manager
        self._cached_keys = cached_keys
        self.forget()

    def takes(self, table: Table) -> bool:
        """Return whether plans of `table` are of this kind: not where steps move rows that they do not touch, for
        these their owner must bring to the last step before others read them.
        """
        return table.history is None and self._manager.neighbours.have_all(table)

    @property
    def memory_bytes(self) -> int:
        return self._slots.memory_bytes

    def plan(self, number: int, table: Table, rows: np.ndarray, expected: int) -> RowPlan:
        """Return a plan of `rows` (int64 `[U]`, distinct); `ask_for_slots` is to follow. Any thread."""
        manager = self._manager
        keys = table.keys(rows)
        order, counts = cuda_ops.partition(manager.directory.home_of(keys), manager.ranks)
        ends = np.cumsum(counts)
        first, end = ends[manager.rank] - counts[manager.rank], ends[manager.rank]
        own, others = order[first:end], np.concatenate([order[:first], order[end:]])
        counts[manager.rank] = 0
        with manager.structure:
            slots = manager.touch_at_home(table, rows[own])
            there = self._slots.find(keys[others])
        plan = RowPlan(number, table, rows, expected, slots, table.store, own)
        plan.order, plan.where, plan.slots_there = others, np.repeat(np.arange(manager.ranks), counts), there
        plan.in_place = True
        return plan

    def ask_for_slots(self, plan: RowPlan) -> None:
        """Ask homes where rows of a plan are that this rank has never used."""
        tickets = np.flatnonzero(plan.slots_there < 0)
        plan.unknown = len(tickets)
        ends = np.searchsorted(plan.where[tickets], np.arange(self._manager.ranks + 1)).tolist()
        for peer in self._manager.peers:
            some = tickets[ends[peer] : ends[peer + 1]]  # tickets are in the order of homes
            if not len(some):
                continue
            arrays = narrow(some), narrow(plan.rows[plan.order[some]])
            self._manager.transport.send(peer, Message(Kind.SEEK, (plan.number, plan.table.number), arrays))

    def await_slots(self, plan: RowPlan) -> None:
        """Wait until all slots of a plan are known."""
        if plan.unknown:
            self._manager.transport.wake()
            self._manager.wait_for_rows(lambda: not plan.unknown, np.unique(plan.where).tolist())

    # On the background thread

    def on_seek(self, source: int, message: Message) -> None:
        """SEEK(plan, table; tickets, rows): `source` asks where rows are of which this rank is the home."""
        manager = self._manager
        number, table_number = message.numbers
        tickets, rows = message.arrays
        slots = manager.touch_at_home(manager.tables[table_number], widen(rows))
        manager.transport.send(source, Message(Kind.FOUND, (number,), (tickets, narrow(slots))))

    def found(self, plan: RowPlan, tickets: np.ndarray, slots: np.ndarray) -> None:
        """Homes have said at which `slots` the rows of some tickets are."""
        manager = self._manager
        keys = plan.table.keys(plan.rows[plan.order[tickets]])
        with manager.structure:
            new = self._slots.find(keys) < 0  # another plan may have heard of them meanwhile
            if len(self._slots) + len(keys) > max(self._cached_keys, len(plan.table.store)):
                self.forget()
                new = np.arange(min(len(keys), self._cached_keys))
            self._slots.add(keys[new], slots[new])
        plan.slots_there[tickets] = slots
        plan.unknown -= len(tickets)

    def forget(self) -> None:
        """Records of a table are in other stores."""
        with self._manager.structure:
            self._slots = self._manager.new_index(0)
