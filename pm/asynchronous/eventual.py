"""The manager of several ranks with staleness: nobody waits for the others' steps, or not for the last s of them.

Rows are moved and copied as the asynchronous protocol decides (`node.py`). A rank's clock is the number of its
optimizer steps. What a step does with its gradients depends on the table's rule:

- Where the state is additive (SGD, Adagrad and its rowwise form), each rank applies its own gradients at once to the
  records and copies that it has, state included; what that changed is added up at the owner.
- For every other rule the rows stay with their home. Copies have values alone; gradients for them are summed and sent
  there, and the owner applies what has come together with its own next step, and sends values back.

Where all ranks share memory, rows whose state is additive are in it (`shared_tables.py`): of them nothing is sent.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np

import cuda_ops
from pm import rules
from pm.asynchronous.holdings import Group, Holdings
from pm.asynchronous.moves import Moves
from pm.asynchronous.node import (
    CLOCKS_PER_MOVE_OF_LOADERS,
    CLOCKS_PER_REFRESH_OF_LOADERS,
    ROUNDS_TO_ANSWER_OF_LOADERS,
    Node,
)
from pm.asynchronous.operations import Action, Operation
from pm.asynchronous.pace import Pace
from pm.asynchronous.passes import Passes
from pm.asynchronous.table_groups import RecorderByTable, TableGroups
from pm.asynchronous.table_plans import JointIntents, TablePlan
from pm.asynchronous.updates import Updates
from pm.colocated.shared_tables import SharedTables
from pm.exact.rounds import Round, step_of
from pm.exact.synchronous import SynchronousManager
from pm.manager import Manager
from pm.messages import Kind, Message
from pm.pieces import Summing
from pm.recorder import Recorder
from pm.same_step import UNSAID, Stepped, check_same_step
from pm.storage.store import RecordStore
from pm.tables import RowPlan, Table, TableGradient, TableSpec
from pm.traffic import Traffic

_SHARED = (rules.SGD, rules.Adagrad, rules.RowwiseAdagrad)
_ADDITIVE = (*_SHARED, rules.Frozen)
DEFAULT_ROUNDS_PER_SECOND = 500.0
_NEVER = 1 << 60


class EventualManager(SynchronousManager):
    """A `SynchronousManager` whose ranks do not wait for each other's steps, or for those alone that are too old.

    Args:
        comm, timeout_seconds: as there.
        staleness: None, or how many steps a rank may be behind the others' updates (above 0).
        techniques: "all", "relocation", "replication" or "none".
        update_threshold: changes of copies that are smaller in every value are held back.
        max_rounds_per_second: how often ranks exchange what has come together.
        acts_late: whether intents are acted on as late as is safe.
        shared_memory: as there. Rows whose state is additive are shared if all ranks share memory, else none.
    """

    in_lockstep = False

    def __init__(
        self,
        comm,
        timeout_seconds: float,
        *,
        staleness: int | None,
        techniques: str = "all",
        update_threshold: float = 0.0,
        max_rounds_per_second: float = DEFAULT_ROUNDS_PER_SECOND,
        acts_late: bool = True,
        shared_memory: bool | int = True,
    ):
        self.node = Node(
            comm.rank,
            comm.size,
            [],
            lambda peer, messages: self.transport.send(peer, *messages),
            techniques=techniques,
            acts_late=acts_late,
            update_threshold=update_threshold,
            staleness=staleness,
            clocks_per_refresh=CLOCKS_PER_REFRESH_OF_LOADERS,
            clocks_per_move=CLOCKS_PER_MOVE_OF_LOADERS,
            rounds_to_answer=ROUNDS_TO_ANSWER_OF_LOADERS,
        )
        self._clock = self.node.claims.add_clock()
        self._pace = Pace(self.node, max_rounds_per_second)
        self._arrived: dict[int, Round] = {}
        self._updates = Updates(self)
        self._groups = TableGroups()
        self._intents = JointIntents(self.node.claims, self._clock)
        self._passes = Passes(self, comm.size)
        super().__init__(comm, timeout_seconds, shared_memory=shared_memory)

    def _shared_tables(self) -> SharedTables:
        return SharedTables(self, _SHARED, locks=True)

    # Tables

    def add_tables(self, specs: Sequence[TableSpec]) -> list[Table]:
        added = []
        with self.structure:
            for spec in specs:
                added.append(Table(spec, len(self.tables), None))
                added[-1].begin_history()
                self.tables.append(added[-1])
        others = self._add_shared(added)
        with self.structure:
            for number in self._groups.add(others):
                store = self.node.add_group(self._group_of(number)).owned.store
                for table in self._groups.members(number):
                    table.store = store
        self.barrier()  # nobody asks for rows of a table that another rank does not know yet
        return added

    def _group_of(self, number: int) -> Group:
        """Return the group of the tables that have this number."""
        tables = self._groups.members(number)
        first = tables[0]
        moves = isinstance(first.spec.rule, _ADDITIVE)

        def make(keys: np.ndarray, out: np.ndarray) -> None:
            for table, some, rows in self._groups.split(number, keys):
                dim = table.spec.dim
                values = np.empty((len(rows), dim), table.spec.dtype)
                table.spec.fill(rows, values)  # which loading a checkpoint may change
                out[some, :dim] = values
                if out.shape[1] > dim:
                    out[some, dim:] = self.initial_states(table, rows)

        def made(keys: np.ndarray, slots: np.ndarray) -> None:
            for table, some, rows in self._groups.split(number, keys):
                self._initialise_state(table, rows, slots[some])

        def take_in(slots: np.ndarray, gradients: np.ndarray) -> None:
            for table, some, _ in self._groups.split(number, self.node.holdings[number].owned.keys[slots]):
                self._updates.take_in(table, slots[some], gradients[some])

        return Group(
            number,
            sum(table.spec.rows for table in tables),
            first.spec.record_class,
            make,
            moves,
            None if moves else made,
            None if first.history is None else lambda slots: self.catch_up(first, slots),
            None if moves else take_in,
            self._groups.firsts(number),
        )

    def keys_of(self, table: Table, rows: np.ndarray) -> np.ndarray:
        """Return the keys (int64 `[n]`) of a table's rows (int64 `[n]`) in its group."""
        return self._groups.span_of(table).keys(rows)

    def holdings_of(self, table: Table) -> Holdings:
        """Return what this rank holds of a table's group."""
        return self.node.holdings[self._groups.span_of(table).group]

    def why_rule_stays(self, table: Table, *, all_made: bool) -> str:
        if table.store.is_shared or len(self._groups.members(self._groups.span_of(table).group)) > 1:
            return (
                f"with several ranks and staleness, rows trained by {table.spec.rule.name} are in one place with those "
                "of other tables"
            )
        return super().why_rule_stays(table, all_made=all_made)

    def replace_rule(self, table: Table, spec: TableSpec, *, all_made: bool = False) -> None:
        self._check_rule_may_go(table, all_made)
        self.settle()
        table.store.await_snapshot()
        number = self._groups.span_of(table).group
        with self.structure:
            old = self.holdings_of(table)
            keys, slots = old.owned.store.index.items()
            values = old.owned.values(slots)[:, : spec.dim]
            counters = old.owned.counters[slots]
            table.spec = spec
            table.begin_history()
            self.node.claims.forget_group(number)
            self.node.grants.forget_group(number)
            new = self.node.replace_group(self._group_of(number))
            table.store = new.owned.store
            records = np.empty((len(keys), new.group.width), spec.dtype)
            records[:, : spec.dim] = values
            if new.group.moves:
                records[:, spec.dim :] = self.initial_states(table, keys)
            made = new.owned.add_records(keys, records, counters)
            if new.group.made is not None:
                new.group.made(keys, made)
        self.barrier()

    def rows_owned(self, table: Table, rows: np.ndarray) -> np.ndarray:
        if table.store.is_shared:
            return super().rows_owned(table, rows)
        with self.structure:
            return rows[self.touch(table, rows) >= 0]

    def touch(self, table: Table, rows: np.ndarray) -> np.ndarray:
        if table.store.is_shared:
            return super().touch(table, rows)
        with self.structure:
            return self.node.grants.find_or_make(self.holdings_of(table), self.keys_of(table, rows))

    # Rows

    def intend(self, table: Table, rows: np.ndarray, expected: int) -> RowPlan:
        if table.store.is_shared:
            return super().intend(table, rows, expected)
        self._check_open()
        span = self._groups.span_of(table)
        plan = TablePlan(next(self._plan_numbers), table, rows, expected, rows[:0], table.store, span=span)
        with self.structure:
            self._intents.add(plan)
        return plan

    def release(self, plan: RowPlan) -> None:
        if plan.store.is_shared:
            super().release(plan)
        elif not plan.released:
            with self.structure:
                self._intents.release(plan)

    def flush_intents(self) -> None:
        """Intend what `intend` has gathered; it is acted on when it is due."""
        with self.structure:
            self._intents.flush()

    def read(self, plan: RowPlan, out: np.ndarray) -> np.ndarray:
        if plan.store.is_shared:
            return super().read(plan, out)
        return self._pull(plan.group, plan.keys, out, plan.places)

    def read_here(self, store: RecordStore, slots: np.ndarray, out: np.ndarray) -> np.ndarray:
        self._wait_to_read()
        return Manager.read_here(self, store, slots, out)

    def pull(self, table: Table, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        self.traffic.on_demand_pulls += 1
        return self._read_rows(table, rows, out)

    def pull_states(self, table: Table, rows: np.ndarray) -> np.ndarray:
        if table.store.is_shared:
            slots = self.shared.touch(table, rows)
            self._wait_to_read()
            return table.store.states(slots)
        span, width = self._groups.span_of(table), self.holdings_of(table).group.width
        records = self._pull(span.group, span.keys(rows), np.empty((len(rows), width), table.spec.dtype))
        return np.ascontiguousarray(records[:, table.spec.dim :])

    def gives_states(self, table: Table) -> bool:
        return table.store.is_shared or self.holdings_of(table).group.moves  # else only a row's home has its state

    def _read_rows(self, table: Table, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        if table.store.is_shared:
            return self.read_here(table.store, self.shared.touch(table, rows), out)
        span = self._groups.span_of(table)
        return self._pull(span.group, span.keys(rows), out)

    def _pull(self, group: int, keys: np.ndarray, out: np.ndarray, places: np.ndarray | None = None) -> np.ndarray:
        self._wait_to_read()
        started = time.perf_counter()
        operation = Operation(Action.PULL, group, keys, out, places=places)
        self.run(operation)
        self.traffic.seconds["gather"] += time.perf_counter() - started
        self.wait_for(operation)
        return out

    def run(self, operation: Operation) -> None:
        """Begin an operation."""
        with self.structure:
            self.node.claims.is_paused = False
            self.node.operations.run(operation)
            sent = self.node.flush_urgent()
        if sent or operation.remaining:
            self.transport.wake()

    def wait_for(self, operation: Operation) -> None:
        """Wait until an operation is done."""
        if operation.remaining:
            self.wait_for_rows(lambda: operation.is_done, self.peers)

    def _wait_to_read(self) -> None:
        """Wait as long as the bound on staleness demands, and for the end of an epoch that has ended here."""
        self._check_open()
        syncing, steps = self.node.syncing, self.steps
        if not syncing.may_go_on(steps):
            self._waiting.until(
                lambda: syncing.may_go_on(steps),
                lambda: self.others.missing(syncing.ranks_behind(steps), f"come near step {steps}"),
            )
        if self._passes.ranks_behind():
            self._waiting.until(
                lambda: not self._passes.ranks_behind(),
                lambda: self.others.missing(self._passes.ranks_behind(), "end its pass over the loader"),
            )

    def renorm(self, table: Table, rows: np.ndarray, max_norm: float, norm_type: float) -> None:
        values = self._read_rows(table, rows, np.empty((len(rows), table.spec.dim), table.spec.dtype))
        before = values.copy()
        changed = np.flatnonzero(cuda_ops.renorm(values, max_norm, norm_type))
        if not len(changed):
            return
        if table.store.is_shared:
            slots = self.touch(table, rows[changed])
            table.store.add(slots, values[changed] - before[changed], self._version_after_step())
            return
        holdings, span = self.holdings_of(table), self._groups.span_of(table)
        keys = span.keys(rows)
        if holdings.group.moves:
            updates = np.zeros((len(changed), holdings.group.width), values.dtype)
            updates[:, : table.spec.dim] = values[changed] - before[changed]
            operation = Operation(Action.PUSH, span.group, keys[changed], updates)
        else:
            operation = Operation(Action.SET, span.group, keys[changed], values[changed])
        self.run(operation)
        self.wait_for(operation)

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
        shared = [gradient for gradient in gradients if gradient.table.store.is_shared]
        self._apply_step(shared, groups)  # without the lock: a record may be another rank's for a while
        with self.structure:
            self.node.claims.is_paused = False
            self._updates.step([each for each in gradients if not each.table.store.is_shared], groups)
            self.steps += 1
            self._clock.now = self.steps
            for plan in finished:
                self.release(plan)
            if self.node.staleness is not None:
                self.node.syncing.clock_advanced(self.steps)
                self.node.flush_urgent()
        self._say_step(stepped)
        self.traffic.seconds["update"] += time.perf_counter() - started

    def _summing_for(self, table: Table) -> Summing:
        return self.shared.summing if table.store.is_shared else super()._summing_for(table)

    def take_what_has_gathered(self) -> None:
        """Apply what others have sent, while nobody steps."""
        with self.structure:
            self._updates.take_what_has_gathered()

    def _version_after_step(self) -> int:
        return self.steps + 1

    @property
    def applied(self) -> int:
        return self.steps

    def _say_step(self, stepped: Stepped) -> None:
        """Tell the others of a step: to follow it where they have run out of batches, and to compare."""
        message = Message(Kind.STEP, (self.steps - 1, *stepped.numbers), (stepped.vector,))
        for peer in range(self.ranks):
            self.deliver(peer, message)

    def _on_step(self, source: int, message: Message) -> None:
        """STEP(step, optimizer, batches...; hyperparameters): `source` has taken this step."""
        step, *numbers = message.numbers
        arrived = self._arrived.setdefault(step, Round())
        arrived.stepped[source] = Stepped.received(*numbers, vector=message.arrays[0])
        if len(arrived.stepped) == self.ranks:
            check_same_step(step, self.rank, arrived.stepped, self.describe_hyperparameter())
            del self._arrived[step]

    def step_of_others(self, among: Collection[int]) -> Stepped | None:
        return step_of(self._arrived.get(self.steps), among)

    def _is_urgent(self) -> bool:
        return self._waiting.waiters > 0

    def record(self, recorder: Recorder) -> None:
        super().record(recorder)
        with self.structure:
            Moves(self.node, RecorderByTable(recorder, self._groups))

    def close(self, *, linger: bool = False) -> None:
        if not self._shut and self.node.staleness is not None:
            with self.structure:  # nobody need wait for the steps of a rank that takes no more
                self.node.syncing.clock_advanced(_NEVER)
                self.node.flush()
        super().close(linger=linger)

    # Coming to rest

    @contextlib.contextmanager
    def still(self) -> Iterator[None]:
        self.settle()
        yield
        self.barrier()  # nothing moves before all are done

    def epoch_ended(self) -> None:
        self._sync()
        self._passes.ended_here()

    def _on_closed(self, source: int, message: Message) -> None:
        super()._on_closed(source, message)
        self._passes.look()

    def begin_flush(self) -> int:
        """Begin to make what this rank has changed visible everywhere; return a token."""
        with self.structure:
            token = self.node.syncing.begin()
            self.node.flush()
        self.transport.wake()
        return token

    def flush_is_over(self, token: int) -> bool:
        return self.node.syncing.is_over(token)

    def _sync(self) -> None:
        """Make what this rank has changed visible everywhere."""
        token = self.begin_flush()
        self._waiting.until(
            lambda: self.flush_is_over(token),
            lambda: "other ranks to take in this rank's changes",
            lambda: self.others.why_gone(self.peers, "an answer"),
        )

    def settle(self) -> None:
        """Wait until all ranks are here and see all changes, and let nothing move until the next step or lookup
        (collective)."""
        self.barrier()  # nobody still waits for rows that would not move any more
        with self.structure:
            self.node.claims.is_paused = True
        self._sync()
        self.barrier()
        self.take_what_has_gathered()
        self._sync()  # nor is anything under way that was asked for before
        self.barrier()

    def rewrite_ended(self) -> None:
        self._sync()
        self.barrier()

    # Whole tables

    def load_states(self, table: Table, rows: np.ndarray, states: np.ndarray) -> None:
        with self.structure:
            slots = self.touch(table, rows)
            self.catch_up(table, slots)
            table.store.set_states(slots, states)
            self.records_changed(table, slots)

    def of_table(self, table: Table, keys: np.ndarray, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if table.store.is_shared:
            return super().of_table(table, keys, slots)
        at, rows = self._groups.span_of(table).rows_among(keys)
        return rows, slots[at]

    def make_slots(self, table: Table, rows: np.ndarray) -> np.ndarray:
        return self.touch(table, rows)

    def records_changed(self, table: Table, slots: np.ndarray) -> None:
        if table.store.is_shared:  # there are no copies
            return
        with self.structure:
            self.node.grants.changed_from_afar(self.holdings_of(table), slots)

    # The background thread

    def _receive(self, source: int, message: Message) -> None:
        with self.structure:
            if self.node.handle(source, message):
                self._pace.received()
                return
        super()._receive(source, message)

    def _message_handlers(self) -> dict[Kind, Callable[[int, Message], None]]:
        of_steps = {Kind.STEP: self._on_step, Kind.EPOCH: self._passes.on_epoch}
        shared = (Kind.SHARD, Kind.CLOSED, Kind.LAST, Kind.KEEP, Kind.KEPT)
        handlers = super()._message_handlers()
        return {kind: handlers[kind] for kind in shared} | of_steps

    def _after_receiving(self) -> bool:
        if not self._pace.is_turn():
            return False
        with self.structure:
            busy = self._pace.take_turn()
            self._passes.go_on()
        if busy:
            self._waiting.notify()
        return busy

    @property
    def memory_bytes(self) -> int:
        histories = sum(table.history.memory_bytes for table in self.tables if table.history is not None)
        return histories + self.node.memory_bytes + self.shared.memory_bytes

    def counted(self) -> Traffic:
        traffic = self.traffic
        with self.structure:
            by_part = self.node.counts_by_part.copy()
            traffic.hops = self.node.counts["hops"]
            traffic.late_intents = self.node.counts["late_intents"]
        for name in ("relocations", "replications", "replica_steps"):
            of_tables = {
                self._groups.members(group)[part].number: n
                for (what, group, part), n in by_part.items()
                if what == name
            }
            setattr(traffic, name, Counter(of_tables))
        return traffic
