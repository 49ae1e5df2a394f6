"""The manager of several ranks at staleness 0: rows live with their owners, and every lookup sees every step before it.

One optimizer step is one round. Each rank sends each owner the gradients of the rows that it owns, and its STEP; what
owners do with them is in `serving.py`, how rows are asked for in `asking.py`, how they change owners in `moving.py`.
This file hands over steps; what is not of steps and rows (waiting, failing, closing) is in `connected_manager.py`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial

import numpy as np

import cuda_ops
from pm import rules
from pm.colocated.machine_sums import MachineSums
from pm.colocated.machines import Machines, machines_of
from pm.colocated.neighbours import Neighbours
from pm.colocated.shared_steps import SharedSteps
from pm.colocated.shared_tables import SharedTables
from pm.colocated.sharing_manager import SharingManager
from pm.exact.asking import Asking
from pm.exact.common_rows import CommonRows
from pm.exact.directory import Directory
from pm.exact.handover import Handover, by_rank
from pm.exact.in_place import InPlace
from pm.exact.inbox import Inbox
from pm.exact.missing import Missing
from pm.exact.moving import Moving
from pm.exact.on_demand import OnDemand
from pm.exact.requests import Requests
from pm.exact.rounds import step_of
from pm.exact.serving import Serving
from pm.keys import rows_of, table_of
from pm.messages import Kind, Message, narrow
from pm.pieces import Summing
from pm.same_step import UNSAID, Stepped
from pm.storage.shards import Shards
from pm.storage.store import RecordClass, RecordStore
from pm.tables import RowPlan, Table, TableGradient, TableSpec
from pm.techniques import techniques_named
from pm.transport import Transport

CACHED_LOCATIONS = 1 << 18
"""Most keys whose whereabouts a rank remembers without need: up to 8 MB."""


class SynchronousManager(SharingManager):
    """A `Manager` over the ranks of a communicator; construction, `add_tables` and `replace_rule` are collective.

    A rank that waits for another gets a `PeerError` that names it: when the other closes, or says nothing for too long.

    Args:
        comm: an MPI communicator; it is duplicated.
        timeout_seconds: how long to wait for another rank.
        techniques: how rows come to the ranks that need them. "all": a row moves to a rank that needs it while no other
            does, where that pays (see `Moving`), and is copied to each rank that needs it otherwise. "relocation": rows
            move, but are not copied before they are used. "replication": they are copied, and stay where they are.
            "none": they are fetched when they are used. Results are the same to the bit.
        cached_locations: most keys whose whereabouts this rank remembers without need.
        shared_memory: whether ranks of one machine read each other's rows without a message; all of them must say so.
            False: each rank is as if on a machine of its own. A number: each so many ranks of a machine, in turn, are.

    Raises:
        ValueError: if there are no such techniques, or `shared_memory` is a number below 1.
    """

    def __init__(
        self,
        comm,
        timeout_seconds: float,
        techniques: str = "all",
        *,
        cached_locations: int = CACHED_LOCATIONS,
        shared_memory: bool | int = True,
    ):
        super().__init__(comm.rank, comm.size, timeout_seconds)
        if not isinstance(shared_memory, bool) and shared_memory < 1:
            raise ValueError(f"shared_memory must be True, False or a number of ranks, 1 or more; got {shared_memory}")
        self.techniques = techniques_named(techniques)
        self.directory = Directory(self.rank, self.ranks, cached_locations)
        self.describe_hyperparameter: Callable[[], Callable[[int, int], str] | None] = lambda: None
        self._summing = Summing(alike=True)
        self.missing = Missing(self)
        self.asking = Asking(self)
        self.serving = Serving(self)
        self.requests = Requests(self)
        self.moving = Moving(self)
        self._on_demand = OnDemand(self)
        self._handover = Handover(self)
        self._shards = Shards(self)
        self.neighbours = Neighbours(self, comm, shared_memory)
        self.machines = self._meet_machines(comm)
        self.machine_sums = MachineSums(self)
        self.common_rows = CommonRows(self)
        self.in_place = InPlace(self, cached_locations)
        self.shared = self._shared_tables()
        self.shared_steps = SharedSteps(self)
        self.inbox = Inbox(self, self._message_handlers())
        self.transport = self._connect(
            comm,
            on_message=self._receive,
            urgent=self._is_urgent,
            on_failure=self._fail,
            while_collective=self._check_collective,
            after_receiving=self._after_receiving,
            held_up=lambda: bool(self.missing.passing_on()),
            describe_peers=lambda: self.describe_peers(),
        )
        self.transport.start()

    def _connect(self, comm, **calls: Callable) -> Transport:
        """Return what carries this rank's messages (collective); a simulation has another."""
        return Transport(comm, **calls)

    def _meet_machines(self, comm) -> Machines:
        """Return which ranks are on which machine (collective); a simulation has its own."""
        return machines_of(comm, self.neighbours.peers)

    def _shared_tables(self) -> SharedTables:
        return SharedTables(self, (rules.SGD, rules.Adagrad, rules.RowwiseAdagrad, rules.SparseAdam), locks=False)

    def _is_urgent(self) -> bool:
        return self._waiting.waiters > 0 or (self.serving.applied < self.steps and not self.needs_no_messages)

    def _after_receiving(self) -> bool:
        """Called on the background thread, again and again; returns whether there was something to do."""
        return False

    def add_tables(self, specs: Sequence[TableSpec]) -> list[Table]:
        added = super().add_tables(specs)
        # Nobody asks for rows of a table that another rank does not know yet.
        self.neighbours.share_offered()
        return added

    def _give_stores(self, tables: Sequence[Table]) -> None:
        super()._give_stores(self._add_shared(tables))
        if all(table.store.is_shared for table in self.tables):
            self.needs_no_messages = True
        else:
            self._need_messages()

    def _gave_store(self, table: Table) -> None:
        self.neighbours.offer(table)

    def _new_store(self, record_class: RecordClass, capacity: int) -> RecordStore:
        return self.neighbours.new_store(record_class, capacity)

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        return self.neighbours.writing()

    @property
    def machine_ranks(self) -> int:
        return self.neighbours.ranks

    def replace_rule(self, table: Table, spec: TableSpec, *, all_made: bool = False) -> None:
        self._check_rule_may_go(table, all_made)
        table.store.await_snapshot()
        if table.store.is_shared:
            with self.still():
                self._need_messages()
                self._leave_shared(table, spec)
                self.neighbours.share([table])
            return
        with self.still(), self.asking.planning:
            self.asking.leave_in_place(table)
            self._on_background(lambda: self._replace_rule(table, spec, all_made))
            self.neighbours.share([table])
            self._on_background(lambda: self.serving.send_slots_again(table))

    def _replace_rule(self, table: Table, spec: TableSpec, all_made: bool) -> None:
        with self.structure:
            notes = self.serving.notes_of(table.store)
            keys, slots = table.store.index.items()
            mine = table_of(keys) == table.number
            moves = notes.moves(slots[mine])
            self.neighbours.forget(table)
            super().replace_rule(table, spec, all_made=all_made)
            notes.clear(slots[mine])
            self.serving.replaced(table, rows_of(keys[mine]), moves)

    @contextlib.contextmanager
    def still(self) -> Iterator[None]:
        self.settle()
        self._on_background(lambda: self.serving.keep_still(1))
        try:
            self.barrier()  # what moved before has arrived
            yield
            self.barrier()  # nothing moves before all are done
        finally:
            self.transport.post(lambda: self.serving.keep_still(-1))

    def _on_background(self, call: Callable[[], None]) -> None:
        """Run `call` on the background thread and wait for it."""
        done = threading.Event()

        def run() -> None:
            call()
            done.set()
            self._waiting.notify()

        self.transport.post(run)
        self.wait_until(done.is_set, lambda: "its own background thread")

    # Rows

    def slots_here(self, table: Table, rows: np.ndarray) -> np.ndarray:
        """Return the slots (int64 `[n]`) of distinct `rows` (int64 `[n]`), -1 for those that this rank does not own.

        It owns a row whose record it has, and one that nobody has touched if it is its home. It makes records of the
        latter.
        """
        keys = table.keys(rows)
        with self.structure:
            slots = table.store.index.find(keys)
            absent = np.flatnonzero(slots < 0)
            if len(absent):
                unmade = absent[self._is_unmade(keys[absent])]
                if len(unmade):
                    slots[unmade] = super().touch(table, rows[unmade])
        return slots

    def _is_unmade(self, keys: np.ndarray) -> np.ndarray:
        """Return whether this rank is the home of `keys` that are not in their store, and nobody has them."""
        unmade = self.directory.home_of(keys) == self.rank
        mine = np.flatnonzero(unmade)
        unmade[mine] = ~self.directory.is_away(keys[mine])
        return unmade

    def touch(self, table: Table, rows: np.ndarray) -> np.ndarray:
        if table.store.is_shared:
            return self.shared.touch(table, rows)
        slots = self.slots_here(table, rows)
        if len(slots) and slots.min() < 0:
            row = rows[slots.argmin()]
            raise RuntimeError(f"rank {self.rank} does not own row {row} of table {table.spec.name!r}")
        return slots

    def touch_at_home(self, table: Table, rows: np.ndarray) -> np.ndarray:
        """As `touch`, for rows that never moved and of which this rank is the home."""
        return super().touch(table, rows)

    def rows_owned(self, table: Table, rows: np.ndarray) -> np.ndarray:
        if table.store.is_shared:
            return self.shared.owned(table, rows)
        keys = table.keys(rows)
        with self.structure:
            owned = table.store.index.find(keys) >= 0
            absent = np.flatnonzero(~owned)
            owned[absent] = self._is_unmade(keys[absent])
        return rows[owned]

    def intend(self, table: Table, rows: np.ndarray, expected: int) -> RowPlan:
        self._check_open()
        if table.store.is_shared:
            return self.shared.plan(self.next_plan_number(), table, rows, expected)
        return self.asking.intend(table, rows, expected)

    def release(self, plan: RowPlan) -> None:
        if plan.store.is_shared:
            plan.released = True
        else:
            self.asking.release(plan)

    def flush_intents(self) -> None:
        if not self.needs_no_messages:
            self._send_released()
            self.transport.wake()

    def _send_released(self) -> None:
        released = self.asking.take_released()
        if len(released):
            for peer in range(self.ranks):
                self.deliver(peer, Message(Kind.RELEASE, (), (released,)))

    def read(self, plan: RowPlan, out: np.ndarray) -> np.ndarray:
        if plan.table.store.is_shared:
            return self.read_here(plan.table.store, plan.slots, out)
        if plan.store.is_shared:  # its table has another rule since
            return self.pull(plan.table, plan.rows, out)
        if plan.released or not self.techniques.plans:
            return self.pull(plan.table, plan.rows, out)
        self.asking.read(plan, out)
        return out

    def pull(self, table: Table, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        self.traffic.on_demand_pulls += 1
        self._check_open()
        if table.store.is_shared:
            return self.read_here(table.store, self.shared.touch(table, rows), out)
        self._on_demand.pull(table, rows, out)
        return out

    def pull_states(self, table: Table, rows: np.ndarray) -> np.ndarray:
        self._check_open()
        if table.store.is_shared:
            slots = self.shared.touch(table, rows)
            self.shared_steps.settle()
            return self.neighbours.undisturbed(lambda: table.store.states(slots))
        return self._on_demand.pull_states(table, rows)

    def gather_own(self, table: Table, slots: np.ndarray, out: np.ndarray, positions: np.ndarray) -> None:
        """Write the values of `slots` to rows `positions` of `out`."""
        with self._values:  # steps wait for the trainer, but other ranks' renorm does not
            if table.history is not None:
                table.advance(table.store, slots, states=False)
            cuda_ops.gather(table.store.words, table.store.stride, slots, out, positions=positions)

    def renorm(self, table: Table, rows: np.ndarray, max_norm: float, norm_type: float) -> None:
        if table.store.is_shared:
            self._check_open()
            self.shared_steps.settle()
            with table.store.alone():
                self.renorm_own(table, rows, max_norm, norm_type)
            return
        self.settle()
        limits = np.array([max_norm, norm_type], np.float64)
        (owners,) = self._on_demand.locate([(table, rows)])
        parts = by_rank(owners, self.ranks)
        for peer in self.peers:
            if len(parts[peer]):
                self.transport.send(peer, Message(Kind.RENORM, (table.number,), (narrow(rows[parts[peer]]), limits)))
        self.transport.wake()
        own = rows[parts[self.rank]]
        if len(own):
            self._on_background(lambda: self.renorm_own(table, own, max_norm, norm_type))

    # Steps

    def submit(
        self,
        gradients: Sequence[TableGradient],
        groups: Mapping[int, dict[str, object]],
        *,
        finished: Sequence[RowPlan] = (),
        stepped: Stepped = UNSAID,
    ) -> None:
        self._check_open()
        started = time.perf_counter()
        if self.shared_steps.is_used:
            shared = [gradient for gradient in gradients if gradient.table.store.is_shared]
            self.shared_steps.publish(shared, groups, stepped)
        self.serving.groups[self.steps] = groups
        self._handover.send([gradient for gradient in gradients if not gradient.table.store.is_shared])
        for plan in finished:
            self.release(plan)
        self._send_released()
        step = Message(Kind.STEP, (self.steps, *stepped.numbers), (stepped.vector,))
        self.steps += 1
        for peer in self.peers:
            self.transport.send(peer, step)
        # Ourselves last: no record leaves in the version after it before it does.
        self.transport.post(partial(self._receive, self.rank, step), wake=False)
        if not self.needs_no_messages:
            self.transport.flush()
        self.traffic.seconds["exchange"] += time.perf_counter() - started

    def locate(self, wanted: Sequence[tuple[Table, np.ndarray]]) -> list[np.ndarray]:
        """Return the owners (int64 `[n]`) of each table's distinct `rows`, which stay there for this step."""
        return self._on_demand.locate(wanted)

    def deliver(self, peer: int, message: Message) -> None:
        """Send to a peer, or hand to our own background thread: owners treat all ranks alike, in one order."""
        if peer == self.rank:
            self.transport.post(lambda: self._receive(self.rank, message))
        else:
            self.transport.send(peer, message)

    @property
    def applied(self) -> int:
        """Number of steps that the rows owned here reflect."""
        return self.serving.applied

    def _version_after_step(self) -> int:
        return self.serving.applied + 1

    def step_of_others(self, among: Collection[int]) -> Stepped | None:
        """Return what one of the ranks `among` says of the step that is this rank's next, None if none has taken it."""
        return step_of(self.serving.round_of(self.steps), among)

    # Waiting

    def settle(self) -> None:
        self._check_open()
        self.shared_steps.settle()
        self._waiting.until(self._is_settled, self.missing.describe_step, self.missing.why_no_step)

    def _is_settled(self) -> bool:
        return self.applied >= self.steps and (self.needs_no_messages or self.others.all_ready(self.steps))

    def wait_for_rows(self, reached: Callable[[], bool], asked: Sequence[int]) -> None:
        missing = self.missing
        self._waiting.until(reached, lambda: missing.describe_rows(asked), lambda: missing.why_no_rows(asked))

    # Whole tables

    def gather_table(self, table: Table, receive: Callable[[np.ndarray, np.ndarray, np.ndarray], None] | None) -> None:
        with self.still():
            self._shards.gather(table, receive)

    def rewrite_ended(self) -> None:
        """Owners have set rows from outside a step (collective): have outstanding plans fetched anew."""
        self.barrier()  # what is asked for from here on is answered with the rows that were set
        self.asking.forget_arrived()

    # The background thread: answers

    def _receive(self, source: int, message: Message) -> None:
        self.inbox.receive(source, message)
        self._waiting.notify()

    def _message_handlers(self) -> dict[Kind, Callable[[int, Message], None]]:
        serving = self.serving
        return {
            Kind.INTENT: self.requests.on_asked,
            Kind.PULL: self.requests.on_asked,
            Kind.PULL_STATES: self.requests.on_asked,
            Kind.LOCATE: self.requests.on_asked,
            Kind.FORWARD: self.requests.on_forward,
            Kind.RECORDS: self.moving.on_records,
            Kind.MOVED: self.moving.on_moved,
            Kind.RELEASE: serving.on_release,
            Kind.WANT: serving.on_want,
            Kind.GRADIENT: serving.on_gradient,
            Kind.STEP: serving.on_step,
            Kind.RENORM: serving.on_renorm,
            Kind.SHARD: self._shards.on_shard,
            Kind.PORTION: self.machine_sums.on_portion,
            Kind.SUM: self.machine_sums.on_sum,
            Kind.ROWS: self.asking.on_rows,
            Kind.COMMON_ROWS: self.common_rows.on_common_rows,
            Kind.ROWS_TO_PASS_ON: self.common_rows.on_rows_to_pass_on,
            Kind.PASSED_ON: self.common_rows.on_passed_on,
            Kind.SLOTS: self.asking.on_slots,
            Kind.SEEK: self.in_place.on_seek,
            Kind.FOUND: self.asking.on_found,
            Kind.FORWARDED: self.asking.on_forwarded,
            Kind.HOLDS: self.asking.on_holds,
            Kind.READY: self._on_ready,
            Kind.STORE: self.neighbours.on_store,
            Kind.MAPPED: self.neighbours.on_mapped,
            Kind.PULLED: self._on_demand.on_pulled,
            Kind.LOCATED: self._on_demand.on_located,
            Kind.CLOSED: self._on_closed,
            Kind.LAST: self._on_last,
            Kind.KEEP: self.shared.on_keep,
            Kind.KEPT: self.shared.on_kept,
        }

    def _on_ready(self, source: int, message: Message) -> None:
        """READY(version, plan): rows at that version, of plans up to that number, have been sent."""
        self.asking.on_ready(source)
        with self.structure:
            self.directory.home_is_ready(source, message.numbers[0])
        self.others.on_ready(source, message)

    def _on_closed(self, source: int, message: Message) -> None:
        """CLOSED(): `source` takes no more steps, but goes on serving its rows."""
        self.others.ended.add(source)
        self.serving.ended(source)
        self.requests.ended(source)
        self._end_with_the_last()

    def _on_last(self, source: int, message: Message) -> None:
        """LAST(): `source` sends and answers nothing more."""
        self.others.gone.add(source)
        self._on_closed(source, message)

    # Counting, closing

    @property
    def memory_bytes(self) -> int:
        own = self.serving.memory_bytes + self.directory.memory_bytes + self.in_place.memory_bytes
        return super().memory_bytes + own + self.shared.memory_bytes

    def _closing(self) -> None:
        self.transport.post(self._wait_for_no_rows)

    def _wait_for_no_rows(self) -> None:
        self.common_rows.wait_for_none()
        self.inbox.resume()
