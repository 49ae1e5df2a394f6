"""The asking side: a rank's intents, and the rows that arrive for them, copied or for good.

The loader's planner intends, the trainer's thread reads, and the background thread puts down what owners send.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import numpy as np

import cuda_ops
from pm.exact.requests import ask
from pm.messages import Kind, Message, widen
from pm.tables import RowPlan, Table

if TYPE_CHECKING:
    from pm.exact.synchronous import SynchronousManager

NO_ROWS = np.empty(0, np.int64)
_NEVER = np.iinfo(np.int64).max
_NOBODY = -1


class Asking:
    """The live plans of one rank.

    Invariant: `_plans` are those that are not released; copies that arrive for another are dropped. Once every ticket
    of a plan is placed and the READY(version, number) of each rank that serves one is here, with its number or a later
    one and no earlier version than the plan expects, the staging holds that rank's rows at that version. This rank's
    and an owner's view of which tickets that serves change with messages of the owner alone, and so agree when the next
    one comes: FORWARDED (it never had them), HOLDS (it has them after all) and RECORDS (they are this rank's now).

    Args:
        manager: whose rows these are; it brings tables, own records and transport.
    """

    def __init__(self, manager: SynchronousManager):
        self._manager = manager
        self._plans: dict[int, RowPlan] = {}
        self._promised: list[list[RowPlan]] = [[] for _ in range(manager.ranks)]
        self._released: list[int] = []
        self._numbers = 0
        self.planning = threading.Lock()  # plans are numbered in the order in which owners hear of them

    def intend(self, table: Table, rows: np.ndarray, expected: int) -> RowPlan:
        """Make a plan for distinct `rows` and tell all ranks. Any thread."""
        manager = self._manager
        with self.planning:
            self._numbers += 1
            if not manager.techniques.plans:
                return RowPlan(self._numbers, table, rows, expected, NO_ROWS, table.store)
            if manager.in_place.takes(table):
                plan = manager.in_place.plan(self._numbers, table, rows, expected)
                self._plans[plan.number] = plan
                manager.in_place.ask_for_slots(plan)
                return plan
            with manager.structure:
                slots = manager.slots_here(table, rows)
                own, absent = np.flatnonzero(slots >= 0), np.flatnonzero(slots < 0)
                slots = slots[own]
                held = manager.serving.hold_for_plan(table, slots, manager.rank)
                ranks = manager.directory.ask_at(table.keys(rows[absent]))
            order, counts = cuda_ops.partition(ranks, manager.ranks)
            plan = RowPlan(self._numbers, table, rows, expected, slots, table.store, own)
            plan.order, plan.where = absent[order], ranks[order]
            plan.asked = np.flatnonzero(counts).tolist()
            plan.slots_there = np.full(len(order), -1, np.int64)
            self._plans[plan.number] = plan
            own_rows = rows[own]
            manager.transport.post(
                lambda: manager.serving.note_own(plan.number, table, own_rows, slots, expected, held)
            )
            for peer in manager.peers:
                first = int(counts[:peer].sum())
                part = rows[plan.order[first : first + int(counts[peer])]]
                ask(manager, Kind.INTENT, peer, plan.number, table, expected, first, part)
        return plan

    def release(self, plan: RowPlan) -> None:
        """The plan is not needed any more; owners hear of it with `take_released`."""
        if not plan.released:
            plan.released = True
            if self._plans.pop(plan.number, None) is not None and not plan.in_place:
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

    def leave_in_place(self, table: Table) -> None:
        """The records of `table` leave for other stores: plans that name their slots are void. Under `planning`."""
        for plan in list(self._plans.values()):
            if plan.in_place and plan.table is table:
                self.release(plan)
        self._manager.in_place.forget()

    # Reading

    def read(self, plan: RowPlan, out: np.ndarray) -> None:
        """Write the plan's rows at the current version to `out` `[U, dim]`; wait for those that are not here."""
        manager = self._manager
        manager.settle()
        if plan.in_place:
            manager.in_place.await_slots(plan)
        elif plan.expected > manager.steps or not manager.techniques.copies_ahead:
            self._want(plan)
        elif not self._is_here(plan):
            asked = manager.peers if plan.unplaced else {*plan.asked, *tuple(plan.promised)}
            manager.wait_for_rows(lambda: self._is_here(plan), sorted(asked))
        started = time.perf_counter()
        own, slots = self.own_part(plan)
        manager.gather_own(plan.table, slots, out, own)
        self._gather_from_neighbours(plan, out)
        self._take_staged(plan, out)
        plan.complete = True
        manager.traffic.seconds["gather"] += time.perf_counter() - started

    def _gather_from_neighbours(self, plan: RowPlan, out: np.ndarray) -> None:
        manager = self._manager
        for peer in manager.neighbours.peers:
            tickets = np.flatnonzero((plan.where == peer) & (plan.slots_there >= 0))
            if len(tickets):
                manager.neighbours.gather(peer, plan.table, plan.slots_there[tickets], out, plan.order[tickets])
                manager.traffic.neighbour_rows += len(tickets)

    def _take_staged(self, plan: RowPlan, out: np.ndarray) -> None:
        tickets = np.flatnonzero((plan.where != self._manager.rank) & (plan.slots_there < 0))
        if len(tickets):
            whole = len(tickets) == len(plan.order)
            staged = plan.staging if whole else plan.staging[tickets]
            cuda_ops.scatter(out.reshape(-1), plan.table.spec.dim, plan.order[tickets], staged)

    def _is_here(self, plan: RowPlan) -> bool:
        """Whether every rank that serves rows of the plan has said so, and READY since."""
        seen = self._manager.others.seen
        return plan.complete or (all(seen[peer] >= plan.number for peer in plan.asked) and self._is_placed(plan))

    @staticmethod
    def _is_placed(plan: RowPlan) -> bool:
        return not plan.unplaced and not plan.promised

    def own_part(self, plan: RowPlan) -> tuple[np.ndarray, np.ndarray]:
        """Return (positions, slots) of the plan's rows that are here, each int64 `[n]`."""
        manager, table = self._manager, plan.table
        if plan.arrivals < len(plan.arrived):
            new = plan.arrived[plan.arrivals :]
            plan.own = np.concatenate([plan.own, *(positions for positions, _ in new)])
            plan.slots = np.concatenate([plan.slots, *(slots for _, slots in new)])
            plan.arrivals += len(new)
        if plan.store is not table.store:
            with manager.structure:
                plan.slots = manager.touch(table, plan.rows[plan.own])
                plan.store = table.store
        return plan.own, plan.slots

    def _want(self, plan: RowPlan) -> None:
        """Ask owners for what is stale of a plan that is used earlier than expected, or of which nothing was sent."""
        manager = self._manager
        asked: set[int] = set()
        while (others := (self._serving(plan) - asked) | plan.late) or not self._is_placed(plan):
            plan.answered.clear()
            plan.late.clear()
            for peer in others:
                manager.transport.send(peer, Message(Kind.WANT, (plan.number,)))
            manager.transport.wake()
            manager.wait_for_rows(
                lambda wanted=others: plan.answered >= wanted and self._is_placed(plan), manager.peers
            )
            asked |= others
        plan.expected = manager.steps

    def _serving(self, plan: RowPlan) -> set[int]:
        """The other ranks that must be asked for rows of the plan.

        A row that this rank reads in its owner's memory is good at any time, unless steps move it that do not touch it:
        then its owner brings it to the last step when it is asked for.
        """
        where = plan.where if plan.table.history is not None else plan.where[plan.slots_there < 0]
        return set(np.unique(where).tolist()) - {self._manager.rank, _NOBODY}

    def parts(self, plan: RowPlan) -> list[np.ndarray]:
        """Return, by rank, the positions of a complete plan's rows that it serves, in the order of their tickets."""
        order, counts = cuda_ops.partition(plan.where, self._manager.ranks)
        parts = [plan.order[tickets] for tickets in np.split(order, np.cumsum(counts)[:-1])]
        parts[self._manager.rank] = self.own_part(plan)[0]
        return parts

    # On the background thread

    def tickets_of(self, number: int, rank: int) -> np.ndarray:
        """Return the tickets of a plan that `rank` serves (int64 `[n]`, ascending); none if it is over."""
        plan = self._plans.get(number)
        return NO_ROWS if plan is None else np.flatnonzero(plan.where == rank)

    def took_over(self, number: int, tickets: np.ndarray, slots: np.ndarray | None) -> None:
        """The records of some rows of a plan are here now, at `slots` (if given)."""
        plan, manager = self._plans.get(number), self._manager
        if plan is None or not len(tickets):
            return
        positions = plan.order[tickets]
        rows = plan.rows[positions]
        if slots is None:
            slots = manager.touch(plan.table, rows)
        if manager.serving.extend_own(number, rows, slots):
            plan.arrived.append((positions, slots))
            self._place(plan, tickets, manager.rank)

    def _place(self, plan: RowPlan, tickets: np.ndarray, rank: int) -> None:
        plan.where[tickets] = rank
        plan.slots_there[tickets] = -1
        if plan.unplaced or rank == _NOBODY:
            plan.unplaced = int((plan.where == _NOBODY).sum())

    def on_rows(self, source: int, message: Message) -> None:
        """ROWS(plan, answers a WANT; tickets, none for all that the sender serves, and values)."""
        number, answer = message.numbers
        plan = self._plans.get(number)
        if plan is None:
            return
        tickets, values = message.arrays
        if len(values):
            tickets = widen(tickets) if len(tickets) else np.flatnonzero(plan.where == source)
            if plan.staging is None:
                plan.staging = np.empty((len(plan.order), plan.table.spec.dim), plan.table.spec.dtype)
            cuda_ops.scatter(plan.staging.reshape(-1), plan.table.spec.dim, tickets, values)
            manager = self._manager
            if manager.recorder is not None:
                rows = plan.rows[plan.order[tickets]]
                manager.recorder.note("copied", plan.table.number, rows, round=manager.applied, other=source)
        if answer:
            plan.answered.add(source)

    def on_slots(self, source: int, message: Message) -> None:
        """SLOTS(plan; tickets, none for all that the sender serves, and slots): where rows are in its memory."""
        plan = self._plans.get(message.numbers[0])
        if plan is not None:
            tickets, slots = message.arrays
            tickets = widen(tickets) if len(tickets) else np.flatnonzero(plan.where == source)
            plan.slots_there[tickets] = widen(slots)

    def on_found(self, source: int, message: Message) -> None:
        """FOUND(plan; tickets, slots): where rows of a SEEK are in the memory of `source`."""
        plan = self._plans.get(message.numbers[0])
        if plan is not None:
            tickets, slots = message.arrays
            self._manager.in_place.found(plan, widen(tickets), widen(slots))

    def forget_slots(self, source: int, table_number: int) -> None:
        """The records of a table of `source` are in another store."""
        for plan in list(self._plans.values()):
            if plan.table.number == table_number and plan.where is not None:
                theirs = plan.where == source
                if not plan.in_place and (plan.slots_there[theirs] >= 0).any():
                    plan.slots_there[theirs] = -1
                    plan.expected = _NEVER  # so that its rows are asked for, should there be no slots again

    def on_forwarded(self, source: int, message: Message) -> None:
        """FORWARDED(plan; tickets): `source` does not have these rows; who has them says HOLDS, or has said so."""
        plan = self._plans.get(message.numbers[0])
        if plan is not None:
            tickets = widen(message.arrays[0])
            self._place(plan, tickets[plan.where[tickets] == source], _NOBODY)

    def on_holds(self, source: int, message: Message) -> None:
        """HOLDS(plan; tickets): `source` serves these rows, from its next READY on."""
        plan, manager = self._plans.get(message.numbers[0]), self._manager
        if plan is not None:
            tickets = widen(message.arrays[0])
            plan.late.add(source)
            plan.promised.add(source)
            self._promised[source].append(plan)
            self._place(plan, tickets, source)
            with manager.structure:
                manager.directory.remember(plan.table.keys(plan.rows[plan.order[tickets]]), source)

    def on_ready(self, source: int) -> None:
        """READY: `source` keeps what it has promised."""
        if self._promised[source]:
            for plan in self._promised[source]:
                plan.promised.discard(source)
            self._promised[source].clear()
