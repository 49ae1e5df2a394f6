"""The owner's side: what a rank does for all ranks alike, itself included, with the rows that it owns.

Everything here runs on the background thread, message by message. A step is applied when the STEP of every rank has
arrived: gradients are summed in a fixed order (`machine_sums.py`) and applied once; each rank is sent the rows that its
next batch needs, and READY; then, off the critical path, those rows of later batches that no known intent touches in
between. A row that was sent early and changed after all is sent again before READY: intents save time, they never
decide what is right. A row that only the rank in question needs moves there in place of being copied, where that pays
(`moving.py`); ranks of another machine are sent what they need alike once (`common_rows.py`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

import cuda_ops
from pm.colocated.machine_sums import IN_SUM, ArrivedSums
from pm.exact.asked import AskedPlan, AskedRows, Request
from pm.exact.common_rows import ALL_ROWS, Copies
from pm.exact.rounds import Round
from pm.messages import Kind, Message, narrow, widen
from pm.pieces import Piece
from pm.same_step import Stepped, check_same_step
from pm.storage.slot_notes import SlotNotes
from pm.storage.store import RecordStore
from pm.tables import Table

if TYPE_CHECKING:
    from pm.exact.synchronous import SynchronousManager

NO_ROWS = np.empty(0, np.int64)
AT_ROWS, AT_SLOTS = -1, -2
"""In place of a plan's number in a GRADIENT message: what it is for is said by rows, or by slots of the receiver."""
_NEVER = np.iinfo(np.int64).max


class Serving:
    """Answers the messages that ask this rank, as an owner, for something.

    Invariant: `applied` steps are in the records; before READY(version, number) a rank is sent every row that its plans
    up to `number` use at `version` and that it does not have in that version. A round is there until `applied` is past
    it: by that other threads tell whether something is missing.

    Args:
        manager: whose rows these are; it brings tables, records and transport.
    """

    def __init__(self, manager: SynchronousManager):
        self._manager = manager
        self.applied = 0
        self.groups: dict[int, Mapping[int, dict[str, object]]] = {}
        self._rounds: dict[int, Round] = {}
        self._asked = [AskedRows() for _ in range(manager.ranks)]
        self._notes: dict[RecordStore, SlotNotes] = {}
        self._ended: set[int] = set()
        self._early_is_posted = False
        self._stillness = 0

    # Asked from any thread

    def round_of(self, step: int) -> Round | None:
        """Return what has arrived for `step`, None if nothing has, or if it is applied."""
        return self._rounds.get(step)

    @property
    def memory_bytes(self) -> int:
        """Bytes of what is noted of the slots that are in use."""
        return sum(SlotNotes.BYTES_PER_SLOT * len(store) for store in list(self._notes))

    def notes_of(self, store: RecordStore) -> SlotNotes:
        notes = self._notes.get(store)
        if notes is None:
            with self._manager.structure:
                notes = self._notes.setdefault(
                    store, SlotNotes(store.capacity, self._manager.ranks, self._manager.rank)
                )
        return notes

    def hold(self, table: Table, slots: np.ndarray, rank: int) -> None:
        """Keep `slots` of `table` here for a plan of `rank`, of which `note` tells more later."""
        with self._manager.structure:
            self.notes_of(table.store).hold_for_use(slots, rank, self._manager.moving.uses_of(table))

    def hold_for_plan(self, table: Table, slots: np.ndarray, rank: int) -> bool:
        """As `hold`, where rows of `table` may leave; return whether they may."""
        if self._manager.neighbours.have_all(table):
            return False
        self.hold(table, slots, rank)
        return True

    def pin(self, table: Table, slots: np.ndarray) -> tuple[SlotNotes, np.ndarray]:
        """Keep `slots` of `table` here; `unpin_after` says until when."""
        notes = self.notes_of(table.store)
        with self._manager.structure:
            notes.pin(slots)
        return notes, slots

    # Intents

    def is_over(self, request: Request) -> bool:
        """Whether nobody waits for a request that was sent on; one that overtook its plan's INTENT is put aside."""
        if request.asker in self._ended:
            return True
        asked = self._asked[request.asker]
        if request.what != Kind.INTENT or request.number in asked.plans:
            return False
        if request.number > asked.seen:
            asked.overtaken.setdefault(request.number, []).append(request)
        return True

    def answer(self, request: Request, slots: np.ndarray, forwarded: bool) -> None:
        """Answer a request for rows that are all here, at `slots`."""
        manager, asker = self._manager, request.asker
        if request.what == Kind.INTENT and asker == manager.rank:  # the row came here while its request went round
            manager.asking.took_over(request.number, request.tickets, slots)
        elif request.what == Kind.INTENT:
            self._note(request, slots, forwarded)
        elif request.what in (Kind.PULL, Kind.PULL_STATES):
            self._send_pulled(request, slots)
        else:
            self.unpin_after(request.version, *self.pin(request.table, slots))
            located = Message(Kind.LOCATED, (request.number,), (narrow(request.tickets),))
            manager.deliver(asker, located)

    def _note(self, request: Request, slots: np.ndarray, forwarded: bool) -> None:
        """The asker of an intent has rows here; serve them at once if it may already be looking them up."""
        manager, asker, number = self._manager, request.asker, request.number
        table, asked = request.table, self._asked[asker]
        if request.version <= self.applied:
            manager.traffic.late_intents += len(slots)
        if forwarded and asked.plans[number].held:
            self.hold(table, slots, asker)
        held = asked.plans[number].held if forwarded else self.hold_for_plan(table, slots, asker)
        due = self._note_touches(table, slots, request.version, held)
        direct = manager.neighbours.reads(asker, table)
        plan = AskedPlan.of(
            number, table, request.rows, slots, request.tickets, request.version, due, direct=direct, held=held
        )
        if forwarded:
            manager.transport.send(asker, Message(Kind.HOLDS, (number,), (narrow(request.tickets),)))
        if direct and len(slots):
            self._send_slots(asker, plan, whole=not forwarded)
        if forwarded:
            asked.plans[number].extend(plan)
            plan = asked.plans[number]
        else:
            asked.add(plan)
        needed_now = plan.expected <= self.applied
        if needed_now:
            self._send_rows(asker, plan)
        elif not direct:
            self._post_early()
        if needed_now or forwarded:  # READY lets the asker count on what HOLDS has said
            self._send_ready(asker)
        if not forwarded:
            for late in asked.overtaken.pop(number, ()):
                manager.requests.take_again(late)

    def _note_touches(self, table: Table, slots: np.ndarray, version: int, held: bool) -> np.ndarray:
        """Note when rows will be used, if copies of them are ever sent; return from when each is left alone."""
        return self.notes_of(table.store).touch(slots, version) if held else np.zeros(len(slots), np.int64)

    def _send_slots(self, asker: int, plan: AskedPlan, *, whole: bool) -> None:
        tickets = ALL_ROWS if whole else narrow(plan.tickets)
        self._manager.transport.send(asker, Message(Kind.SLOTS, (plan.number,), (tickets, narrow(plan.slots))))

    def send_slots_again(self, table: Table) -> None:
        """The records of `table` are in another store: tell those that read them there."""
        for rank, asked in enumerate(self._asked):
            for plan in asked.plans.values():
                if plan.table is table and rank != self._manager.rank:
                    plan.direct = self._manager.neighbours.reads(rank, table)
                    if plan.direct and len(plan.slots):
                        self._send_slots(rank, plan, whole=False)

    def note_own(
        self, number: int, table: Table, rows: np.ndarray, slots: np.ndarray, expected: int, held: bool
    ) -> None:
        """This rank has a plan of its own; its rows here are held already, if they are to be."""
        due = self._note_touches(table, slots, expected, held)
        tickets = np.full(len(rows), -1, np.int64)
        plan = AskedPlan.of(number, table, rows, slots, tickets, expected, due, held=held)
        self._asked[self._manager.rank].add(plan)
        if held:
            self._post_early()

    def extend_own(self, number: int, rows: np.ndarray, slots: np.ndarray) -> bool:
        """Rows of a plan of this rank have come here: hold them for it. Return whether it is still going on."""
        plan = self._asked[self._manager.rank].plans.get(number)
        if plan is None:
            return False
        if plan.held:
            self.hold(plan.table, slots, self._manager.rank)
        self._note_touches(plan.table, slots, plan.expected, plan.held)
        plan.arrived.append((rows, slots))
        return True

    def _post_early(self) -> None:
        if not self._early_is_posted:
            self._early_is_posted = True
            self._manager.transport.post(self._send_early)

    def on_release(self, source: int, message: Message) -> None:
        """RELEASE(; plans): `source` is done with these plans."""
        plans = self._asked[source].plans
        for number in message.arrays[0].tolist():
            if number in plans:
                self._end_plan(source, plans.pop(number))

    def _end_plan(self, source: int, plan: AskedPlan) -> None:
        if plan.pending >= self.applied:  # its gradients are for rows that must be here when they are applied
            self._round(plan.pending).released.append((source, plan))
        else:
            self._let_go(source, plan)

    def _let_go(self, source: int, plan: AskedPlan) -> None:
        if not plan.held:
            return
        notes = self.notes_of(plan.table.store)
        with self._manager.structure:
            for slots in (plan.slots, *(slots for _, slots in plan.arrived)):
                notes.let_go(slots, source)
            notes.pin(plan.slots[plan.copied], -1)

    def unpin_after(self, step: int, notes: SlotNotes, slots: np.ndarray) -> None:
        """Take back a pin of `slots` when `step` is applied."""
        self._round(step).pinned.append((notes, slots))

    def on_want(self, source: int, message: Message) -> None:
        """WANT(plan): `source` looks a plan up earlier than it had expected, or when nothing is copied ahead."""
        plan = self._asked[source].plans[message.numbers[0]]
        plan.expected = min(plan.expected, self.applied)
        self._send_rows(source, plan, answer=True)
        self._send_ready(source)

    def plans_of(self, rank: int) -> Iterable[AskedPlan]:
        return self._asked[rank].plans.values()

    def replaced(self, table: Table, rows: np.ndarray, moves: np.ndarray) -> None:
        """The records of `table` are in another store; `rows` are here and had `moves`."""
        manager = self._manager
        stores = {table.store for table in manager.tables}
        self._notes = {store: notes for store, notes in self._notes.items() if store in stores}
        notes = self.notes_of(table.store)
        with manager.structure:
            notes.set_moves(manager.touch(table, rows), moves)
            for rank, asked in enumerate(self._asked):
                for plan in asked.plans.values():
                    if plan.table is table:
                        plan.slots, plan.held = manager.touch(table, plan.rows), True
                        plan.sent_at[:] = -1  # the new records do not say when they last changed
                        notes.hold(plan.slots, rank)
                        notes.pin(plan.slots[plan.copied])
                        plan.arrived = [(rows, manager.touch(table, rows)) for rows, _ in plan.arrived]
                        for _, slots in plan.arrived:
                            notes.hold(slots, rank)

    def ended(self, source: int) -> None:
        """`source` has closed: it needs no rows any more, and no one need wait for its intents."""
        self._ended.add(source)
        asked = self._asked[source]
        while asked.plans:
            self._end_plan(source, asked.plans.popitem()[1])
        asked.overtaken.clear()

    # Rows, on their way out

    def keep_still(self, more: int) -> None:
        """Let no row move while the sum of all `more` is positive."""
        self._stillness += more

    def _send_rows(
        self,
        peer: int,
        plan: AskedPlan,
        *,
        early: bool = False,
        answer: bool = False,
        later: list[Copies] | None = None,
    ) -> None:
        """Send what is stale of a plan (`early`: only what is due): ROWS(plan, is an answer; tickets, values).

        Rows that may move leave as RECORDS instead. Copies that are not an answer are only put down in `later`, if that
        is given.
        """
        table, store, manager = plan.table, plan.table.store, self._manager
        if plan.direct:
            self._ready_in_place(peer, plan, answer)
            return
        if table.history is not None:  # each of its steps moves every row, also those that it does not touch
            plan.sent_at[plan.sent_at < table.changed_at] = -1
        copies = answer or manager.techniques.copies_ahead
        if copies:
            positions = cuda_ops.select_due(
                store.steps,
                store.record_class.record_bytes,
                plan.slots,
                plan.sent_at,
                plan.due,
                self.applied,
                not early,
            )
        else:
            positions = np.arange(len(plan.slots))
        plan.next_due = max(1, plan.next_due)
        if early:
            plan.next_due = max(1, int(plan.due.min(initial=_NEVER)))
        if manager.techniques.moves and not self._stillness and len(positions):
            positions = manager.moving.give(peer, plan, positions)
        if not copies or not (len(positions) or answer):
            return
        whole = len(positions) == len(plan.slots)
        slots, tickets = (plan.slots, plan.tickets) if whole else (plan.slots[positions], plan.tickets[positions])
        self._count_copies(plan, positions, slots)
        made = Copies(peer, plan.number, table, tickets, slots, whole)
        if later is None or answer:
            manager.common_rows.send_to_one(made, answer=answer)
        else:
            later.append(made)

    def _ready_in_place(self, peer: int, plan: AskedPlan, answer: bool) -> None:
        """Bring rows that `peer` reads in this rank's memory to the last step."""
        self._manager.catch_up(plan.table, plan.slots, states=False)
        if answer:
            nothing = np.empty((0, plan.table.spec.dim), plan.table.spec.dtype)
            self._manager.transport.send(peer, Message(Kind.ROWS, (plan.number, 1), (ALL_ROWS, nothing)))

    def _count_copies(self, plan: AskedPlan, positions: np.ndarray, slots: np.ndarray) -> None:
        """Count rows that are copied; those that are for the first time stay here until the plan is over."""
        traffic, number = self._manager.traffic, plan.table.number
        fresh = slots[~plan.copied[positions]]
        traffic.replications[number] += len(fresh)
        traffic.replica_steps[number] += len(slots) - len(fresh)
        if len(fresh):
            with self._manager.structure:
                self.notes_of(plan.table.store).pin(fresh)
            plan.copied[positions] = True

    def _send_ready(self, peer: int) -> None:
        """Send READY(version, plan): rows at that version, of plans up to that number, have been sent."""
        self._manager.transport.send(peer, Message(Kind.READY, (self.applied, self._asked[peer].seen)))

    def _send_early(self) -> None:
        """Send rows of later batches that no known intent touches before, once all ranks' intents reach that far."""
        self._early_is_posted = False
        horizon = min(asked.horizon for rank, asked in enumerate(self._asked) if rank not in self._ended)
        for peers in self._manager.machines.together:
            together = self._horizon_together(peers, horizon)
            plans = {peer: self._asked[peer].early(self.applied, together) for peer in peers}
            self._send_to_machine(plans, early=True)

    def _horizon_together(self, peers: Sequence[int], horizon: int) -> int:
        """Return up to which version rows of `peers`, all of a machine, are sent early, if that is `horizon` for one.

        What they need alike is to go at once. So it waits until each has said what it needs at that version, which is
        certain once it speaks of a later one, and is taken to be so just before the rows are needed.
        """
        if len(peers) == 1:
            return horizon
        known = min((self._asked[peer].horizon for peer in peers if peer not in self._ended), default=horizon)
        return min(horizon, max(known - 2, min(known - 1, self.applied)))

    def _send_to_machine(self, plans: Mapping[int, Iterable[AskedPlan]], *, early: bool = False) -> None:
        """Send ranks of one machine what is stale of some of their plans."""
        later = [] if len(plans) > 1 else None
        for peer, some in plans.items():
            for plan in some:
                self._send_rows(peer, plan, early=early, later=later)
        if later:
            self._manager.common_rows.send_copies(later)

    # Steps

    def _round(self, step: int) -> Round:
        if step not in self._rounds:
            self._rounds[step] = Round()
        return self._rounds[step]

    def on_gradient(self, source: int, message: Message) -> None:
        """GRADIENT(step, table, plan or AT_..., ordinal, has counts, place; slots or rows, values, scale, counts).

        `place` says where in shared memory the values are that the message does not have; -1 where it has them, -2
        where they come in a SUM.
        """
        step, table_number, number, ordinal, counted, place = message.numbers
        rows, values, scale, counts = message.arrays
        if number >= 0:
            slots = self._asked[source].plans[number].slots
        elif number == AT_SLOTS:
            slots = widen(rows)
        else:
            slots = self._manager.touch(self._manager.tables[table_number], widen(rows))
        if place >= 0:
            values = self._manager.neighbours.gradients.values(source, place, len(slots), values.shape[1], values.dtype)
        piece = Piece(slots, values, float(scale[0]), ordinal, counts if counted else None)
        if place == IN_SUM:
            self._manager.machine_sums.expect(self._round(step).sums, source, table_number, piece)
        self.take_piece(source, step, table_number, number, piece)

    def take_piece(self, source: int, step: int, table_number: int, number: int, piece: Piece) -> None:
        """Note a part of a gradient of `source`, of its plan `number` or of none (-1)."""
        plan = self._asked[source].plans.get(number)
        if plan is not None:
            plan.pending = step
        self._round(step).pieces[table_number][source].append(piece)

    def on_step(self, source: int, message: Message) -> None:
        """STEP(step, optimizer, batches...; hyperparameters): `source` has handed over all that it has for it."""
        step, *numbers = message.numbers
        arrived = self._round(step)
        arrived.stepped[source] = Stepped.received(*numbers, vector=message.arrays[0])
        self._manager.machine_sums.send_complete(step, arrived.stepped)
        self.apply_complete()

    def apply_complete(self) -> None:
        """Apply the steps of which everything is here."""
        while (arrived := self._rounds.get(self.applied)) is not None and self._is_complete(arrived):
            self._apply_round(arrived)
            self._manager.inbox.resume()

    def _is_complete(self, arrived: Round) -> bool:
        return len(arrived.stepped) == self._manager.ranks and not arrived.sums.missing

    def sums_of(self, step: int) -> ArrivedSums:
        """Return what other machines have summed for a step that is not applied."""
        return self._round(step).sums

    def _apply_round(self, arrived: Round) -> None:
        manager, step = self._manager, self.applied
        check_same_step(step, manager.rank, arrived.stepped, manager.describe_hyperparameter())
        if manager.shared_steps.is_used:
            manager.shared_steps.apply(step + 1)
        started = time.perf_counter()
        groups = self.groups.pop(step)
        for number in sorted(arrived.pieces):
            pieces = manager.machine_sums.pieces(number, arrived.pieces[number], arrived.sums)
            manager.apply(manager.tables[number], pieces, groups[number])
        with manager.structure:
            for notes, slots in arrived.pinned:
                notes.pin(slots, -1)
        for rank, plan in arrived.released:
            self._let_go(rank, plan)
        self.applied = step + 1
        del self._rounds[step]
        manager.traffic.seconds["update"] += time.perf_counter() - started
        if manager.needs_no_messages:
            return
        for peers in manager.machines.together:
            self._send_to_machine({peer: self._asked[peer].due_by(self.applied) for peer in peers})
            for peer in peers:
                self._send_ready(peer)
        manager.transport.post(self._send_early)  # after the rows that somebody may be waiting for have left

    def send_ready(self) -> None:
        """Say to all others how far this rank's rows are."""
        for peer in self._manager.peers:
            self._send_ready(peer)

    # On demand

    def _send_pulled(self, request: Request, slots: np.ndarray) -> None:
        """Send rows or their states as they are: PULLED(number; tickets, values). The asker has READY of the version it
        must see."""
        manager, table, wants_states = self._manager, request.table, request.what == Kind.PULL_STATES
        manager.catch_up(table, slots, states=wants_states)
        if wants_states:
            values = table.store.states(slots)
        else:
            values = table.store.values(slots, np.empty((len(slots), table.spec.dim), table.spec.dtype))
        manager.deliver(request.asker, Message(Kind.PULLED, (request.number,), (narrow(request.tickets), values)))

    def on_renorm(self, source: int, message: Message) -> None:
        """RENORM(table; rows, (max_norm, norm_type)): a lookup of `source` scales down rows that are too long."""
        rows, limits = widen(message.arrays[0]), message.arrays[1]
        self._manager.renorm_own(self._manager.tables[message.numbers[0]], rows, float(limits[0]), float(limits[1]))
