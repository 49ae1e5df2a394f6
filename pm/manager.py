"""The parameter manager of one rank that is alone: rows live here, are read here, and are updated here."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np

import cuda_ops
from pm.dense_rules import SWEPT_STEPS
from pm.keys import rows_of, table_of
from pm.pieces import Piece, Summing
from pm.recorder import Recorder
from pm.same_step import UNSAID, Stepped
from pm.storage.slot_index import MOST_SLOTS, SlotIndex
from pm.storage.store import RecordClass, RecordStore
from pm.storage.whole_tables import WholeTables
from pm.tables import RowPlan, Stretch, Table, TableGradient, TableSpec
from pm.together import JointGradient, apply_joint, apply_together, runs
from pm.traffic import Traffic

# Tables of so many rows together have an array of slots on each of several ranks: 16 MB.
_ARRAY_ROWS = 1 << 22
# A store reserves this many times the rows declared when it is made, so that tables added later find room in it.
_RESERVE_FACTOR = 2
_CHUNK_ROWS = 1 << 16


class Manager(WholeTables):
    """Holds the rows of all managed tables and updates them step by step.

    `steps` is the number of optimizer steps that this rank has handed over, and so the version that its lookups must
    see. Methods are called from the trainer's thread, but for `intend` and `release`, which any thread may call.
    """

    rank = 0
    ranks = 1
    machine_ranks = 1
    """Number of ranks that read each other's rows without a message, this one included."""
    recorder: Recorder | None = None
    """Where moves and copies are written, if anywhere."""
    in_lockstep = True
    """Whether no rank takes a step before all have taken the one before it."""

    def __init__(self):
        self.tables: list[Table] = []
        self.steps = 0
        self.traffic = Traffic()
        self._stores: list[tuple[RecordStore, int]] = []
        self._rows_by_table: list[int] = []  # of its own: an index that held tables would be held by what it holds
        self._plan_numbers = itertools.count()
        self._summing = Summing()
        self._structure = threading.RLock()  # guards indices and slot allocation
        self._values = threading.Lock()  # held to write values while they may be read, and to read them then

    @property
    def structure(self) -> threading.RLock:
        """The lock of indices and of which slots are in use, for the other files that a manager is made of."""
        return self._structure

    # Tables

    def add_tables(self, specs: Sequence[TableSpec]) -> list[Table]:
        """Declare tables, all of them at once where they can share stores (collective); return them in order."""
        added = []
        for spec in specs:
            added.append(Table(spec, len(self.tables), None))
            added[-1].begin_history()
            self._rows_by_table.append(spec.rows)
            self.tables.append(added[-1])
        self._give_stores(added)
        return added

    def _give_stores(self, tables: Sequence[Table]) -> None:
        """Give stores to tables that have none."""
        declared: dict[RecordClass, int] = {}
        for spec in (table.spec for table in tables):
            declared[spec.record_class] = declared.get(spec.record_class, 0) + spec.rows
        for table in tables:
            spec = table.spec
            table.store = self._store_for(spec.record_class, spec.rows, declared[spec.record_class])
            self._gave_store(table)

    def _gave_store(self, table: Table) -> None:
        """A table that was declared has its store now. For managers of several ranks, in one order on all of them."""

    def _store_for(self, record_class: RecordClass, rows: int, declared_rows: int) -> RecordStore:
        if record_class.catches_up:  # rows are caught up in turn, by slot: such a table has a store of its own
            store = self._new_store(record_class, rows * _RESERVE_FACTOR)
            self._stores.append((store, rows))
            return store
        for at, (store, declared) in enumerate(self._stores):
            if store.record_class == record_class and declared + rows <= store.capacity:
                self._stores[at] = (store, declared + rows)
                return store
        store = self._new_store(record_class, max(rows, declared_rows) * _RESERVE_FACTOR)
        self._stores.append((store, rows))
        return store

    def _new_store(self, record_class: RecordClass, capacity: int) -> RecordStore:
        return RecordStore(record_class, capacity, index=self.new_index(capacity))

    def new_index(self, capacity: int) -> SlotIndex | None:
        """Return an index of keys for a store of so many slots; None if they are too many for one of this kind."""
        array_rows = _ARRAY_ROWS if self.ranks > 1 else 0
        return SlotIndex(self._rows_by_table, array_rows) if capacity < MOST_SLOTS else None

    def why_rule_stays(self, table: Table, *, all_made: bool) -> str:
        """Return why `table` cannot be given another update rule, "" if it can.

        `all_made`: whether the records of all its rows were made.
        """
        if all_made or table.history is None or not len(table.history) or self._leaves_resting_rows(table):
            return ""
        return (
            f"its {len(table.history)} steps under {table.spec.rule.name} have moved rows too that were never looked "
            "up, and that are not held anywhere"
        )

    def _check_rule_may_go(self, table: Table, all_made: bool) -> None:
        if why := self.why_rule_stays(table, all_made=all_made):
            raise ValueError(f"table {table.spec.name!r} cannot be given another rule: {why}")

    def _leaves_resting_rows(self, table: Table) -> bool:
        """Whether the table's steps so far have left alone the rows that no gradient has reached."""
        scratch = RecordStore(table.spec.record_class, 1)
        slots, before = scratch.allocate(1), np.ones((1, table.spec.dim), table.spec.dtype)
        scratch.set_values(slots, before)
        initial = table.spec.rule.initial_state(table.spec.group)
        scratch.set_states(slots, np.full((1, table.spec.record_class.state_words), initial, table.spec.dtype))
        table.advance(scratch, slots)
        return np.array_equal(scratch.values(slots, np.empty_like(before)), before)

    def replace_rule(self, table: Table, spec: TableSpec, *, all_made: bool = False) -> None:
        """Give `table` another update rule (collective): its records move to a store of another class, and their state
        begins anew.

        Raises:
            ValueError: if it cannot be given one; see `why_rule_stays`.
        """
        self._check_rule_may_go(table, all_made)
        table.store.await_snapshot()
        with self._structure:
            held_keys, held_slots = table.store.index.items()
            mine = table_of(held_keys) == table.number
            keys, slots = held_keys[mine], held_slots[mine]
            self.catch_up(table, slots, states=False)
            old, table.store = table.store, self._store_for(spec.record_class, spec.rows, spec.rows)
            table.spec = spec
            table.begin_history()
            for start in range(0, len(keys), _CHUNK_ROWS):
                part = slice(start, start + _CHUNK_ROWS)
                values = old.values(slots[part], np.empty((len(keys[part]), spec.dim), spec.dtype))
                new_slots = table.store.allocate(len(keys[part]))
                table.store.index.add(keys[part], new_slots)
                table.store.set_values(new_slots, values)
                self._initialise_state(table, rows_of(keys[part]), new_slots)
            old.release(keys)
            self._forget(old, spec.rows)

    def _forget(self, store: RecordStore, rows: int) -> None:
        """A table of `rows` rows has left `store`: give back its room, and the store itself with its last table."""
        used = any(table.store is store for table in self.tables)
        self._stores = [
            (kept, declared - rows if kept is store else declared)
            for kept, declared in self._stores
            if used or kept is not store
        ]

    def still(self) -> contextlib.AbstractContextManager[None]:
        """Keep every row where it is inside (collective): one rank owns each, and no step is under way."""
        return contextlib.nullcontext()

    def rows_owned(self, table: Table, rows: np.ndarray) -> np.ndarray:
        """Return those of `rows` (int64 `[n]`) whose main copy is on this rank; ranks agree inside `still()`."""
        return rows

    def touch(self, table: Table, rows: np.ndarray) -> np.ndarray:
        """Return the slots (int64 `[n]`) of distinct `rows` (int64 `[n]`) owned by this rank; make absent ones."""
        keys = table.keys(rows)
        with self._structure:
            slots = table.store.index.find(keys)
            absent = np.flatnonzero(slots < 0)
            if len(absent):
                made = table.store.allocate(len(absent))
                values = np.empty((len(absent), table.spec.dim), table.spec.dtype)
                table.spec.fill(rows[absent], values)
                table.store.set_values(made, values)
                self._initialise_state(table, rows[absent], made)
                table.store.index.add(keys[absent], made)
                slots[absent] = made
        return slots

    def make_rows(self, table: Table, rows: np.ndarray) -> None:
        """Make the records of those of `rows` (int64 `[n]`, distinct) that this rank would make later."""
        with self._structure:  # no row leaves in between
            self.touch(table, self.rows_owned(table, rows))

    def all_rows_made(self, table: Table) -> None:
        """The records of all rows of `table` were made: `make_rows` was called for all of them."""

    def _initialise_state(self, table: Table, rows: np.ndarray, slots: np.ndarray) -> None:
        if table.store.record_class.state_words:
            table.store.set_states(slots, self.initial_states(table, rows))
        if table.history is not None:
            table.store.set_caught_up(slots, 0)
        cuda_ops.mark_steps(table.store.steps, table.store.record_class.record_bytes, slots, 0)

    def initial_states(self, table: Table, rows: np.ndarray) -> np.ndarray:
        """Return the states `[n, state_words]` of distinct `rows` (int64 `[n]`) before any step."""
        initial = table.spec.rule.initial_state(table.spec.group)
        states = np.full((len(rows), table.spec.record_class.state_words), initial, table.spec.dtype)
        if states.size and table.spec.fill_states is not None:
            table.spec.fill_states(rows, states)
        return states

    def initial_rows(self, table: Table, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (values `[n, dim]`, states `[n, state_words]`) of distinct `rows` (int64 `[n]`) before any step."""
        values = np.empty((len(rows), table.spec.dim), table.spec.dtype)
        table.spec.fill(rows, values)
        return values, self.initial_states(table, rows)

    # Rows that steps moved without touching them

    def catch_up(self, table: Table, slots: np.ndarray, *, states: bool = True) -> None:
        """Bring the records at `slots` (int64 `[n]`, distinct) to the table's last step. Any thread.

        Whoever reads or writes a value or a state does this before; it costs nothing where rows move only when they are
        touched. Without `states` only values are sure to be those of the last step: so it is where they are but read,
        at a time that another run may not have; then what a row becomes does not depend on it to the bit.
        """
        if table.history is not None and len(table.history):
            with self._values:
                table.advance(table.store, slots, states=states)

    def _sweep(self, table: Table) -> None:
        """Catch up the next records in turn, so that no held one is ever more than `SWEPT_STEPS` steps behind.

        This bounds what a lookup after a long gap costs where rows never come to rest by themselves (coupled weight
        decay, momentum near 1). A row of a deferred table that is made late still takes all steps since the first.
        """
        with self._structure:  # no record is being made meanwhile
            in_use = table.store.slots_in_use
            share = -(-in_use // SWEPT_STEPS)
            start = table.swept if table.swept < in_use else 0
            stop = min(start + share, in_use)
            self.catch_up(table, np.arange(start, stop, dtype=np.int64), states=False)
            table.swept = stop

    def unmade_rows(self, table: Table, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (values `[n, dim]`, states `[n, state_words]`) that `rows` have that no owner holds yet."""
        spec = table.spec
        values = np.empty((len(rows), spec.dim), spec.dtype)
        spec.fill(rows, values)
        states = self.initial_states(table, rows)
        if table.history is None or not len(table.history):
            return values, states
        scratch = RecordStore(spec.record_class, len(rows))
        slots = scratch.allocate(len(rows))
        scratch.set_values(slots, values)
        scratch.set_states(slots, states)
        table.advance(scratch, slots)
        return scratch.values(slots, values), scratch.states(slots)

    def is_cached(self, table: Table) -> bool:
        """Whether lookups and steps of `table` are made on a device, where some of its rows are (`CachedManager`)."""
        return False

    def cache_stats(self) -> dict[str, dict[str, float]]:
        """Return counts of the cache of each table that has one, by name."""
        return {}

    # Rows

    def next_plan_number(self) -> int:
        return next(self._plan_numbers)

    def intend(self, table: Table, rows: np.ndarray, expected: int) -> RowPlan:
        """Say that distinct `rows` (int64 `[U]`, in range) will be looked up at about version `expected`."""
        with self._structure:
            return RowPlan(next(self._plan_numbers), table, rows, expected, self.touch(table, rows), table.store)

    def find_together(
        self, tables: Sequence[Table], keys: np.ndarray, rows: np.ndarray, starts: Sequence[int]
    ) -> Stretch | None:
        """Return where the rows are that plans of several tables are to be made for, all of them to be read and updated
        in one store of this process; None if that cannot be. See `pm.together.intend_together`.
        """
        store = tables[0].store
        if any(table.store is not store or table.history is not None for table in tables):
            return None
        slots = store.index.find(keys)
        if len(slots) and slots.min() < 0:
            for table, first, end in zip(tables, starts, starts[1:], strict=False):
                slots[first:end] = self.touch(table, rows[first:end])
        return Stretch(slots, store)

    def read_here(self, store: RecordStore, slots: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Write to `out` `[n, dim]` the current values of records at `slots` (int64 `[n]`), all of them here."""
        started = time.perf_counter()
        store.values(slots, out)
        self.traffic.seconds["gather"] += time.perf_counter() - started
        return out

    def slots_of(self, plan: RowPlan) -> np.ndarray:
        """Return the slots of the plan's rows here; they change when its table is given another rule."""
        if plan.store is not plan.table.store:
            with self._structure:
                plan.slots = self.touch(plan.table, plan.rows)
                plan.store = plan.table.store
        return plan.slots

    def flush_intents(self) -> None:
        """Send what `intend` and `release` have gathered."""

    def release(self, plan: RowPlan) -> None:
        """The plan's batch is finished: its rows need not be kept up to date for it any more."""
        plan.released = True

    def read(self, plan: RowPlan, out: np.ndarray) -> np.ndarray:
        """Write the plan's rows at the current version to `out` `[U, dim]`, waiting for those not here yet."""
        slots = self.slots_of(plan)
        self.catch_up(plan.table, slots, states=False)
        return self.read_here(plan.table.store, slots, out)

    def pull(self, table: Table, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Write distinct `rows` (int64 `[n]`, in range) at the current version to `out` `[n, dim]`, on demand."""
        self.traffic.on_demand_pulls += 1
        slots = self.touch(table, rows)
        self.catch_up(table, slots, states=False)
        return table.store.values(slots, out)

    def pull_states(self, table: Table, rows: np.ndarray) -> np.ndarray:
        """Return the optimizer state `[n, state_words]` of distinct `rows` (int64 `[n]`, in range), on demand.

        Only of a table for which that is possible (`gives_states`).
        """
        slots = self.touch(table, rows)
        self.catch_up(table, slots)
        return table.store.states(slots)

    def gives_states(self, table: Table) -> bool:
        """Return whether any rank may ask alone for the optimizer state of rows of `table`."""
        return True

    def renorm(self, table: Table, rows: np.ndarray, max_norm: float, norm_type: float) -> None:
        """Scale down the main copies of distinct `rows` whose norm is above `max_norm`, as `embedding_renorm_` does."""
        self.renorm_own(table, rows, max_norm, norm_type)

    def renorm_own(self, table: Table, rows: np.ndarray, max_norm: float, norm_type: float) -> None:
        """As `renorm`, of rows that this rank owns; copies of those that change are stale from the next version on."""
        slots = self.touch(table, rows)
        self.catch_up(table, slots)
        values = table.store.values(slots, np.empty((len(rows), table.spec.dim), table.spec.dtype))
        changed = np.flatnonzero(cuda_ops.renorm(values, max_norm, norm_type))
        with self._values, self._writing():
            table.store.set_values(slots[changed], values[changed])
        self._mark_changed(table, slots[changed])

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        """Records are written inside, which others may be reading."""
        return contextlib.nullcontext()

    def _mark_changed(self, table: Table, slots: np.ndarray) -> None:
        record_bytes = table.store.record_class.record_bytes
        cuda_ops.mark_steps(table.store.steps, record_bytes, slots, self._version_after_step())

    # Steps

    def submit(
        self,
        gradients: Sequence[TableGradient],
        groups: Mapping[int, dict[str, object]],
        *,
        joint: Sequence[JointGradient] = (),
        finished: Sequence[RowPlan] = (),
        stepped: Stepped = UNSAID,
    ) -> None:
        """Apply one optimizer step (collective).

        Args:
            gradients: of the tables that have one on this rank; several of one table are summed.
            groups: the hyperparameters to use, by number of table, of every table that the optimizer holds.
            joint: of further tables, many in one; a rank that is alone takes them.
            finished: plans of batches that end with this step.
            stepped: which optimizer steps, and how; ranks must agree on it.
        """
        started = time.perf_counter()
        self._apply_step(gradients, groups, joint)
        for plan in finished:
            self.release(plan)
        self.steps += 1
        self.traffic.seconds["update"] += time.perf_counter() - started

    def _apply_step(
        self,
        gradients: Sequence[TableGradient],
        groups: Mapping[int, dict[str, object]],
        joint: Sequence[JointGradient] = (),
    ) -> None:
        """Apply gradients of this rank to records that are here."""
        by_table: dict[int, list[TableGradient]] = {}
        together = [each for each in joint if not apply_joint(each, groups, self._version_after_step())]
        for gradient in chain(gradients, *map(JointGradient.split, together)):
            by_table.setdefault(gradient.table.number, []).append(gradient)
        for run in runs([parts[0] for parts in by_table.values() if len(parts) == 1], groups):
            if len(run) > 1:
                apply_together(run, groups[run[0].table.number], self._version_after_step())
                for gradient in run:
                    del by_table[gradient.table.number]
        for number, parts in by_table.items():
            self._apply_gradients(self.tables[number], parts, groups[number])

    def _apply_gradients(self, table: Table, parts: list[TableGradient], group: dict[str, object]) -> None:
        pieces = []
        for part in parts:
            slots = self.slots_of(part.plan) if part.plan is not None else self.touch(table, part.rows)
            pieces.append(Piece(slots, part.values, part.scale, part.ordinal, part.counts))
        self.apply(table, pieces, group)

    def apply(self, table: Table, pieces: list[Piece], group: dict[str, object]) -> None:
        """Update records with the sum of one step's pieces of a table's gradient, at slots of this rank."""
        slots, grads, scale = self._summing_for(table).combine(pieces, table.spec.dim)
        table.gradient_steps += 1
        version, rule = self._version_after_step(), table.spec.rule
        if table.history is None:
            table.begun = True
            if len(slots):
                table.store.keep(slots)
                rule.apply(table.store, slots, grads, scale, group, table.gradient_steps, version)
            return
        with self._values:
            table.history.append(rule.entry(table, group))
            table.changed_at = version
            table.advance(table.store, slots, grads, -scale if group["maximize"] else scale, version)
        if table.history.slow:
            self._sweep(table)

    def _summing_for(self, table: Table) -> Summing:
        """Return what sums pieces of the gradients of `table`."""
        return self._summing

    def _version_after_step(self) -> int:
        return self.steps + 1

    def go_on(self) -> None:
        """Do what can be done now of steps that were handed over; the trainer's thread has time for it."""

    def settle(self) -> None:
        """Wait until every step that this rank has handed over is applied (collective)."""

    def counted(self) -> Traffic:
        """Return `traffic`, with what is counted elsewhere."""
        return self.traffic

    def epoch_ended(self) -> None:
        """This rank has had all batches of a pass over its loader."""

    @property
    def memory_bytes(self) -> int:
        """Bytes of the rows that this rank holds, with their state and index, and of tables' histories."""
        histories = sum(table.history.memory_bytes for table in self.tables if table.history is not None)
        return histories + sum(store.memory_bytes for store, _ in self._stores)

    @property
    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes sent, by kind of message."""
        return {}

    @property
    def bytes_sent(self) -> int:
        return 0

    @property
    def bytes_to_other_machines(self) -> int:
        """Bytes sent to ranks that this one shares no memory with."""
        return 0

    @property
    def bytes_received(self) -> int:
        return 0

    def record(self, recorder: Recorder) -> None:
        """Write moves and copies there from now on; whoever gives it closes it."""
        self.recorder = recorder

    def close(self) -> None:
        """This rank is done; with several, rows cannot be had afterwards."""
