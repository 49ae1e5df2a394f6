"""The asking side: a rank's intents, the rows that arrive for them, and rows fetched on demand.

The loader's planner intends, the trainer's thread reads, and the background thread puts down what owners send.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

import cuda_ops
from pm.messages import Kind, Message
from pm.tables import RowPlan, Table

if TYPE_CHECKING:
    from pm.synchronous import SynchronousManager

NO_ROWS = np.empty(0, np.int64)
_NEVER = np.iinfo(np.int64).max


class Asking:
    """The live plans of one rank, and its pulls.

    Invariant: `_plans` are those that are not released; what arrives for another is dropped. Once an owner's
    READY(version, number) is here, the staging of every plan up to `number` that expects to be used by `version` holds
    that owner's rows at that version.

    Args:
        manager: whose rows these are; it brings tables, own records and transport.
    """

    def __init__(self, manager: SynchronousManager):
        self._manager = manager
        self._plans: dict[int, RowPlan] = {}
        self._released: list[int] = []
        self._pulls = 0
        self._pulled: dict[int, np.ndarray] = {}
        self._numbers = 0
        self.planning = threading.Lock()  # plans are numbered in the order in which owners hear of them

    def intend(self, table: Table, rows: np.ndarray, expected: int) -> RowPlan:
        """Make a plan for distinct `rows` and tell all ranks. Any thread."""
        manager = self._manager
        with self.planning:
            parts = manager.by_owner(table, rows)
            own = parts[manager.rank]
            own_rows = rows[own]
            slots = manager.touch(table, own_rows)
            self._numbers += 1
            plan = RowPlan(self._numbers, table, rows, expected, slots, table.store, own)
            plan.remote = [NO_ROWS if p == manager.rank else part for p, part in enumerate(parts)]
            sizes = [len(part) for part in plan.remote]
            plan.staging_start = [sum(sizes[:p]) for p in range(manager.ranks)]
            plan.staging = np.empty((sum(sizes), table.spec.dim), table.spec.dtype)
            self._plans[plan.number] = plan
            manager.ask_own(plan, own_rows)
            for peer in manager.peers:
                numbers = (plan.number, table.number, expected)
                manager.transport.send(peer, Message(Kind.INTENT, numbers, (rows[plan.remote[peer]],)))
        return plan

    def release(self, plan: RowPlan) -> None:
        """The plan is not needed any more; owners hear of it with `take_released`."""
        if not plan.released:
            plan.released = True
            self._plans.pop(plan.number, None)
            self._released.append(plan.number)

    def take_released(self) -> np.ndarray:
        """Return the numbers of plans that were released since the last call (int64 `[n]`). Any thread."""
        released = []
        while self._released:  # one at a time: another thread may be doing the same, or add to it
            try:
                released.append(self._released.pop())
            except IndexError:  # it was quicker
                break
        return np.array(released, np.int64)

    def forget_arrived(self) -> None:
        """Whatever has arrived for live plans is stale."""
        for plan in list(self._plans.values()):
            plan.expected = _NEVER  # so that it is asked for again

    def read(self, plan: RowPlan, out: np.ndarray) -> None:
        """Write the plan's rows at the current version to `out` `[U, dim]`; wait for those that are not here."""
        manager = self._manager
        manager.settle()
        asked = [peer for peer in manager.peers if len(plan.remote[peer])]
        if plan.expected > manager.steps:
            self._want(plan, asked)
        elif not self._is_here(plan, asked):
            manager.wait_for_rows(lambda: self._is_here(plan, asked), asked)
        started = time.perf_counter()
        manager.gather_own(plan.table, manager.slots_of(plan), out, plan.own)
        for peer in asked:
            start = plan.staging_start[peer]
            positions = plan.remote[peer]
            part = plan.staging[start : start + len(positions)]
            cuda_ops.scatter(out.reshape(-1), plan.table.spec.dim, positions, part)
        manager.traffic.seconds["gather"] += time.perf_counter() - started

    def _is_here(self, plan: RowPlan, asked: Sequence[int]) -> bool:
        """Whether the last READY of every owner that was asked for rows was sent after it had received the plan."""
        return all(self._manager.others.seen[peer] >= plan.number for peer in asked)

    def _want(self, plan: RowPlan, asked: Sequence[int]) -> None:
        """Ask owners for what is stale of a plan that is used earlier than it was expected to be."""
        manager = self._manager
        plan.answered.clear()
        for peer in asked:
            manager.transport.send(peer, Message(Kind.WANT, (plan.number,)))
        manager.transport.wake()
        manager.wait_for_rows(lambda: plan.answered.issuperset(asked), asked)
        plan.expected = manager.steps

    def pull(self, table: Table, rows: np.ndarray, out: np.ndarray) -> None:
        """Write distinct `rows` at the current version to `out` `[n, dim]`, from their owners."""
        manager = self._manager
        manager.settle()
        parts = manager.by_owner(table, rows)
        asked = [peer for peer in manager.peers if len(parts[peer])]
        self._pulls += 1
        self._pulled = {}
        for peer in asked:
            manager.transport.send(peer, Message(Kind.PULL, (self._pulls, table.number), (rows[parts[peer]],)))
        manager.transport.wake()
        own = parts[manager.rank]
        manager.gather_own(table, manager.touch(table, rows[own]), out, own)
        manager.wait_for_rows(lambda: len(self._pulled) == len(asked), asked)
        for peer in asked:
            cuda_ops.scatter(out.reshape(-1), table.spec.dim, parts[peer], self._pulled.pop(peer))

    # On the background thread

    def on_rows(self, source: int, message: Message) -> None:
        """ROWS(plan, answers a WANT; positions among the rows asked for, none for all, and values)."""
        number, answer = message.numbers
        plan = self._plans.get(number)
        if plan is None:
            return
        positions, values = message.arrays
        start = plan.staging_start[source]
        part = plan.staging[start : start + len(plan.remote[source])]
        if len(values) == len(part):
            part[...] = values
        else:
            cuda_ops.scatter(part.reshape(-1), plan.table.spec.dim, positions, values)
        if answer:
            plan.answered.add(source)

    def on_pulled(self, source: int, message: Message) -> None:
        """PULLED(number; values): the answer to a PULL; only the last one's is waited for."""
        if message.numbers[0] == self._pulls:
            self._pulled[source] = message.arrays[0]
