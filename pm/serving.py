"""The owner's side: what a rank does for all ranks alike, itself included, with the rows that it owns.

Everything here runs on the background thread, message by message. A step is applied when the STEP of every rank has
arrived: gradients are summed in rank order and applied once; each rank is sent the rows that its next batch needs, and
READY; then, off the critical path, those rows of later batches that no known intent touches in between. A row that was
sent early and changed after all is sent again before READY: intents save time, they never decide what is right.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

import cuda_ops
from pm.agreement import check_same_step
from pm.asked import AskedPlan, AskedRows
from pm.messages import Kind, Message
from pm.pieces import Piece
from pm.store import RecordStore, reserve_zeros
from pm.tables import Table

if TYPE_CHECKING:
    from pm.synchronous import SynchronousManager

ALL_ROWS = np.empty(0, np.int64)
"""In place of positions in a ROWS message: it brings every row of its plan that the sender owns."""
_NEVER = np.iinfo(np.int64).max


@dataclass
class Round:
    """What has arrived for one step: gradients by table and rank, and who has handed over its STEP."""

    pieces: dict[int, dict[int, list[Piece]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    stepped: dict[int, np.ndarray] = field(default_factory=dict)
    optimizer: dict[int, int] = field(default_factory=dict)


class Serving:
    """Answers the messages that ask this rank, as an owner, for something.

    Invariant: `applied` steps are in the records; before READY(version, number) a rank is sent every row that its plans
    up to `number` use at `version` and that it does not have in that version. Rounds below `applied` are gone.

    Args:
        manager: whose rows these are; it brings tables, records and transport.
    """

    def __init__(self, manager: SynchronousManager):
        self._manager = manager
        self.applied = 0
        self.groups: dict[int, Mapping[int, dict[str, object]]] = {}
        self._rounds: dict[int, Round] = {}
        self._asked = [AskedRows() for _ in range(manager.ranks)]
        self._touches: dict[RecordStore, tuple[np.ndarray, np.ndarray]] = {}
        self._ended: set[int] = set()
        self._early_is_posted = False

    # Asked from any thread

    def round_of(self, step: int) -> Round | None:
        """Return what has arrived for `step`, None if nothing has, or if it is applied."""
        return self._rounds.get(step)

    @property
    def memory_bytes(self) -> int:
        """Bytes of the known touches of the slots that are in use."""
        return sum(2 * np.dtype(np.int32).itemsize * len(store) for store in list(self._touches))

    # Intents

    def on_intent(self, source: int, message: Message) -> None:
        """INTENT(plan, table, expected version; rows): `source` is going to look up rows of ours."""
        number, table_number, expected = message.numbers
        table = self._manager.tables[table_number]
        rows = message.arrays[0]
        self.ask(source, number, table, rows, self._manager.touch(table, rows), expected)

    def ask(self, source: int, number: int, table: Table, rows: np.ndarray, slots: np.ndarray, expected: int) -> None:
        """Note that `source` has asked for `rows`; serve it at once if it may already be looking them up."""
        latest, before = self._touches_of(table.store)
        due = cuda_ops.note_touches(latest, before, slots, expected)
        plan = AskedPlan(number, table, rows, slots, expected, due, np.full(len(slots), -1, np.int64))
        self._asked[source].add(plan)
        if source != self._manager.rank and expected <= self.applied:
            self._send_rows(source, plan)
            self._send_ready(source)
        elif not self._early_is_posted:
            self._early_is_posted = True
            self._manager.transport.post(self._send_early)

    def _touches_of(self, store: RecordStore) -> tuple[np.ndarray, np.ndarray]:
        """The store's known touches (see `note_touches`), of every slot that it may ever have."""
        if store not in self._touches:
            self._touches[store] = (reserve_zeros(store.capacity, np.int32), reserve_zeros(store.capacity, np.int32))
        return self._touches[store]

    def on_release(self, source: int, message: Message) -> None:
        """RELEASE(; plans): `source` is done with these plans."""
        self._asked[source].remove(message.arrays[0])

    def on_want(self, source: int, message: Message) -> None:
        """WANT(plan): `source` looks a plan up earlier than it had expected."""
        plan = self._asked[source].plans[message.numbers[0]]
        plan.expected = min(plan.expected, self.applied)
        self._send_rows(source, plan, answer=True)
        self._send_ready(source)

    def moved(self, table: Table) -> None:
        """The records of `table` have moved to another store."""
        for asked in self._asked:
            for plan in asked.plans.values():
                if plan.table is table:
                    plan.slots = self._manager.touch(table, plan.rows)
        stores = {table.store for table in self._manager.tables}
        self._touches = {store: touches for store, touches in self._touches.items() if store in stores}

    def ended(self, source: int) -> None:
        """`source` has closed: it needs no rows any more, and no one need wait for its intents."""
        self._ended.add(source)
        self._asked[source].plans.clear()

    # Rows, on their way out

    def _send_rows(self, peer: int, plan: AskedPlan, *, early: bool = False, answer: bool = False) -> None:
        """Send what is stale of a plan (`early`: only what is due): ROWS(plan, is an answer; positions, values)."""
        table, store = plan.table, plan.table.store
        record_bytes = store.record_class.record_bytes
        if table.history is not None:  # each of its steps moves every row, also those that it does not touch
            plan.sent_at[plan.sent_at < table.changed_at] = -1
        positions = cuda_ops.select_due(
            store.steps, record_bytes, plan.slots, plan.sent_at, plan.due, self.applied, not early
        )
        if early:
            plan.next_due = int(plan.due.min(initial=_NEVER))
        if not len(positions) and not answer:
            return
        whole = len(positions) == len(plan.slots)
        slots = plan.slots if whole else plan.slots[positions]
        self._manager.catch_up(table, slots)
        values = store.values(slots, np.empty((len(positions), table.spec.dim), table.spec.dtype))
        arrays = (ALL_ROWS if whole else positions, values)
        self._manager.transport.send(peer, Message(Kind.ROWS, (plan.number, int(answer)), arrays))

    def _send_ready(self, peer: int) -> None:
        """Send READY(version, plan): rows at that version, of plans up to that number, have been sent."""
        self._manager.transport.send(peer, Message(Kind.READY, (self.applied, self._asked[peer].seen)))

    def _send_early(self) -> None:
        """Send rows of later batches that no known intent touches before, once all ranks' intents reach that far."""
        self._early_is_posted = False
        horizon = min(asked.horizon for rank, asked in enumerate(self._asked) if rank not in self._ended)
        for peer in self._manager.peers:
            for plan in self._asked[peer].early(self.applied, horizon):
                self._send_rows(peer, plan, early=True)

    # Steps

    def _round(self, step: int) -> Round:
        if step not in self._rounds:
            self._rounds[step] = Round()
        return self._rounds[step]

    def on_gradient(self, source: int, message: Message) -> None:
        """GRADIENT(step, table, plan or -1, ordinal, has counts; rows unless of a plan, values, scale, counts)."""
        step, table_number, number, ordinal, counted = message.numbers
        rows, values, scale, counts = message.arrays
        if number >= 0:
            slots = self._asked[source].plans[number].slots
        else:
            slots = self._manager.touch(self._manager.tables[table_number], rows)
        piece = Piece(slots, values, float(scale[0]), ordinal, counts if counted else None)
        self._round(step).pieces[table_number][source].append(piece)

    def on_step(self, source: int, message: Message) -> None:
        """STEP(step, optimizer; hyperparameters): `source` has handed over all that it has for this step."""
        step, optimizer = message.numbers
        arrived = self._round(step)
        arrived.optimizer[source] = optimizer
        arrived.stepped[source] = message.arrays[0]
        while (arrived := self._rounds.get(self.applied)) is not None and len(arrived.stepped) == self._manager.ranks:
            self._apply_round(arrived)

    def _apply_round(self, arrived: Round) -> None:
        manager, step = self._manager, self.applied
        check_same_step(step, manager.rank, arrived.optimizer, arrived.stepped, manager.describe_hyperparameter())
        started = time.perf_counter()
        groups = self.groups.pop(step)
        for number in sorted(arrived.pieces):
            by_rank = arrived.pieces[number]
            pieces = [piece for rank in sorted(by_rank) for piece in by_rank[rank]]
            manager.apply(manager.tables[number], pieces, groups[number])
        del self._rounds[step]
        self.applied = step + 1
        manager.traffic.seconds["update"] += time.perf_counter() - started
        for peer in manager.peers:
            for plan in self._asked[peer].due_by(self.applied):
                self._send_rows(peer, plan)
            self._send_ready(peer)
        manager.transport.post(self._send_early)  # after the rows that somebody may be waiting for have left

    # On demand

    def on_pull(self, source: int, message: Message) -> None:
        """PULL(number, table; rows): send rows as they are; `source` has READY of the version that it must see."""
        number, table_number = message.numbers
        table, rows = self._manager.tables[table_number], message.arrays[0]
        values = np.empty((len(rows), table.spec.dim), table.spec.dtype)
        slots = self._manager.touch(table, rows)
        self._manager.catch_up(table, slots)
        table.store.values(slots, values)
        self._manager.transport.send(source, Message(Kind.PULLED, (number,), (values,)))

    def on_renorm(self, source: int, message: Message) -> None:
        """RENORM(table; rows, (max_norm, norm_type)): a lookup of `source` scales down rows that are too long."""
        rows, limits = message.arrays
        self._manager.renorm_own(self._manager.tables[message.numbers[0]], rows, float(limits[0]), float(limits[1]))
