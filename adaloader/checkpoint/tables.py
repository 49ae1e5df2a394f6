"""A managed table's part in a checkpoint: what the index says of it, and the rows that a rank writes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

import cuda_ops
import pm
from adaloader.checkpoint.layout import TableEntry, held_name
from adaloader.checkpoint.tree import Encoder
from adaloader.deferred.program_fill import ProgramFill
from adaloader.model.managed_model import ManagedModel
from adaloader.optimizers.held_state import state_names
from adaloader.ranks.table_values import all_texts
from adaloader.tables.managed_table import ManagedTable
from pm.history import History
from pm.storage.records import Kept, Records, in_order, keep_records, take_records
from pm.storage.store import RecordClass

_CHUNK_BYTES = 2 << 20
_CAUGHT_UP_AT_ONCE = 1 << 16
_FORMS = {"float32": "F32", "float64": "F64"}


class OwnRows:
    """The rows of one table that this rank writes, as they are when this is made, inside `still()`: those that it owns
    and somebody touched.

    Args:
        table: the table.
        kept: its store; None while the table's first step is not over, when rank 0 writes all rows from the
            parameter's own memory, which must not change meanwhile.
        steps: that of the checkpoint's history up to which all rows are caught up; None where each says it for itself.
    """

    def __init__(self, manager: pm.Manager, table: ManagedTable, kept: Kept | None, steps: int | None):
        self._manager, self._table, self._kept, self._steps = manager, table.table, kept, steps
        self.name = table.name
        self._record_class: RecordClass = table.table.store.record_class
        self._states = states_of(table.table)
        self._rows, self._slots = np.empty(0, np.int64), np.empty(0, np.int64)

    def find(self) -> None:
        """Find out which rows they are, which takes some time; to be called once, before what is below."""
        if self._kept is not None:
            keys, slots = self._kept.index.items()
            self._rows, self._slots = in_order(*self._manager.of_table(self._table, keys, slots))
        elif self._manager.rank == 0:
            self._rows = np.arange(self._table.spec.rows, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def forms(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return dtype and shape of each tensor that they become, by name."""
        name, of, n = self.name, self._record_class, len(self)
        form = _FORMS[of.dtype]
        forms = {held_name("rows", name): ("I64", (n,)), held_name("values", name): (form, (n, of.dim))}
        for state, width in zip(*self._states, strict=True):
            forms[held_name("state", name, state)] = (form, (n, width))
        if of.catches_up:
            forms[held_name("caught_up", name)] = ("I64", (n,))
        return forms

    def parts(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (name of a tensor, its next part), in chunks."""
        name, (states, widths) = self.name, self._states
        for records in self._records():
            yield held_name("rows", name), records.rows
            yield held_name("values", name), records.values
            at = 0
            for state, width in zip(states, widths, strict=True):
                yield held_name("state", name, state), np.ascontiguousarray(records.states[:, at : at + width])
                at += width
            if records.caught_up is not None:
                if self._steps is not None:
                    records.caught_up[:] = cuda_ops.caught_up_word(self._steps)
                yield held_name("caught_up", name), records.caught_up

    def _records(self) -> Iterator[Records]:
        of = self._record_class
        chunk_rows = max(1, _CHUNK_BYTES // of.record_bytes)
        if self._kept is not None:
            yield from take_records(self._kept.snapshot, of, self._rows, self._slots, chunk_rows)
            return
        count = len(self._table.history) if of.catches_up else 0
        for start in range(0, len(self), chunk_rows):
            rows = self._rows[start : start + chunk_rows]
            values, states = self._manager.initial_rows(self._table, rows)
            caught_up = np.full(len(rows), cuda_ops.caught_up_word(count), np.int64) if of.catches_up else None
            yield Records(rows, values, states, caught_up)


@dataclass(frozen=True)
class Cut:
    """What this rank has of all tables at one instant; `is_kept`: it stays so whatever steps are taken."""

    rows: list[OwnRows]
    kept: list[Kept]
    is_kept: bool

    @property
    def stall_seconds(self) -> float:
        """How long the run was kept from writing to records since."""
        return sum(each.snapshot.stall_seconds for each in self.kept)

    def end(self) -> None:
        """Nothing more of it is needed."""
        for each in self.kept:
            each.snapshot.end()


def cut(model: ManagedModel, spare_bytes: int) -> Cut:
    """Return what the rows are now that this rank writes; inside `still()` (collective)."""
    tables, manager = model.tables_in_order(), model.manager
    steps = _steps_of_rank_0_where_ranks_differ(manager, tables)
    for table in tables:
        if table.name in steps and table.probation is None:
            _catch_up(manager, table.table)
    kept = keep_records(manager, [table.table for table in tables if table.probation is None], spare_bytes)
    rows = [
        OwnRows(manager, t, None if t.probation is not None else kept[t.table.store], steps.get(t.name)) for t in tables
    ]
    return Cut(rows, list(kept.values()), all(table.probation is None for table in tables))


def _steps_of_rank_0_where_ranks_differ(manager: pm.Manager, tables: list[ManagedTable]) -> Mapping[str, int]:
    """Return how many steps rank 0 has taken of tables of which ranks have taken others, by name (collective).

    With staleness an owner takes a step of a table where gradients for rows of its own have come together. A checkpoint
    has one history, rank 0's, of which a row of another rank cannot say how far it has come.
    """
    histories = {table.name: table.table.history for table in tables if table.table.history is not None}
    if manager.in_lockstep or not histories:
        return {}
    mine = {name: [len(history), _digest(history)] for name, history in histories.items()}
    everyones = [json.loads(text) for text in all_texts(manager, json.dumps(mine))]
    return {name: everyones[0][name][0] for name in mine if any(each[name] != everyones[0][name] for each in everyones)}


def _digest(history: History) -> str:
    return hashlib.blake2b(history.steps.tobytes() + history.bounds.tobytes(), digest_size=16).hexdigest()


def _catch_up(manager: pm.Manager, table: pm.Table) -> None:
    """Bring all rows of `table` that this rank owns to its last step."""
    with manager.structure:
        _, slots = manager.of_table(table, *table.store.index.items())
        for start in range(0, len(slots), _CAUGHT_UP_AT_ONCE):
            manager.catch_up(table, slots[start : start + _CAUGHT_UP_AT_ONCE])


def states_of(table: pm.Table) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the names of the parts of a record's optimizer state, and how many numbers each has."""
    names, words = state_names(table.spec.rule), table.store.record_class.state_words
    return names, tuple([words // len(names)] * len(names)) if names else ()


def table_entry(table: ManagedTable, held: int, encoder: Encoder, aliases: list[str]) -> TableEntry:
    """Return what the index says of a table of which all ranks together write `held` rows."""
    spec, of = table.table.spec, table.table
    names, widths = states_of(of)
    is_whole = table.all_rows_held or table.probation is not None
    program = spec.fill.description() if isinstance(spec.fill, ProgramFill) and not is_whole else None
    return TableEntry(
        rows=spec.rows,
        dim=spec.dim,
        dtype=spec.dtype,
        rule=spec.rule.name,
        states=list(names),
        state_widths=list(widths),
        aliases=aliases,
        held=held,
        gradient_steps=of.gradient_steps,
        begun=of.begun,
        initial_state=float(spec.rule.initial_state(spec.group)),
        program=None if program is None else encoder.encode(program, f"program/{table.name}"),
        history_steps=0 if of.history is None else len(of.history),
        history=None if of.history is None else encoder.encode(_history(of), f"history/{table.name}"),
    )


def _history(table: pm.Table) -> dict[str, Any]:
    history = table.history
    return {
        "kind": history.kind,
        "steps": history.steps,
        "bounds": history.bounds,
        "slow": bool(history.slow),
        "mu_product": history.mu_product,
    }
