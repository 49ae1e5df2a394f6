"""Rows of tables out of a checkpoint's files into the manager: each rank takes those that it owns, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

import pm
from adaloader.checkpoint.layout import Index, TableEntry, held_name
from adaloader.checkpoint.tables import states_of
from adaloader.checkpoint.tensor_file import TensorFile
from adaloader.checkpoint.tree import decode
from adaloader.deferred.program_fill import program_fill
from adaloader.errors import CheckpointError
from adaloader.model.managed_model import ManagedModel
from adaloader.optimizers.held_state import starting_from
from adaloader.tables.candidate import CandidateParameter, decide_now
from adaloader.tables.managed_table import ManagedTable
from adaloader.tables.probation import confirm
from pm.history import History
from pm.storage.records import Records, caught_up_to, initial_records, write_records

_CHUNK_BYTES = 4 << 20


def check_tables(managed: ManagedModel, index: Index, files: list[TensorFile]) -> tuple[list[str], set[str]]:
    """Return what of the tables does not fit, a line each, and the names of those that cannot be loaded at all.

    Nothing is changed.

    Raises:
        CheckpointError: if their files or histories do not say what the index says.
    """
    parameters = dict(managed.model().named_parameters(remove_duplicate=False))
    tables = {table.name: table for table in managed.tables}
    lines, left_out = [], set()
    for name, entry in index.tables.items():
        _check_files(name, entry, files)
        problem = _misfit(name, entry, parameters.get(name), tables)
        if problem:
            lines.append(problem)
            left_out.add(name)
        elif name in tables and tables[name].table.spec.rule.name != entry.rule:
            rule = tables[name].table.spec.rule.name
            lines.append(f"table {name!r} was trained under {entry.rule!r} and its optimizer is {rule!r} now")
    lines += [f"the model's table {name!r} is not in it as one" for name in tables if name not in index.tables]
    return lines, left_out


def _check_files(name: str, entry: TableEntry, files: list[TensorFile]) -> None:
    held = sum(file.entry(held_name("rows", name)).shape[0] for file in files)
    if held != entry.held or (entry.program is None and held != entry.rows):
        raise CheckpointError(f"table {name!r} has {held} rows in its files, {entry.held} of {entry.rows} in the index")
    try:
        history = _history_in(entry, files[0])
        if history is not None and len(history["steps"]) != entry.history_steps:
            raise ValueError(f"{len(history['steps'])} steps, {entry.history_steps} in the index")
        if entry.program is not None:
            program_fill(decode(entry.program, files[0].tensor))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"table {name!r}: its history or initialisation is malformed: {error!r}") from error


def _misfit(name: str, entry: TableEntry, parameter, tables: dict[str, ManagedTable]) -> str:
    """Return why a table cannot be loaded into the model's parameter of its name, an empty text if it can."""
    if parameter is None:
        return f"its table {name!r} is not in the model"
    if tuple(parameter.shape) != (entry.rows, entry.dim):
        return f"table {name!r} has shape {[entry.rows, entry.dim]} in it and {list(parameter.shape)} in the model"
    if parameter.dtype != getattr(torch, entry.dtype):
        return f"table {name!r} has dtype {entry.dtype} in it and {parameter.dtype} in the model"
    if name not in tables and not isinstance(parameter, CandidateParameter):
        return (
            f"table {name!r} was managed when it was saved and is an ordinary parameter now: build the loader with "
            f'strategy={{{name!r}: "managed"}}, or load the file that `python -m adaloader export` makes'
        )
    return ""


def load_tables(managed: ManagedModel, index: Index, files: list[TensorFile], left_out: set[str]) -> None:
    """Set the rows of all tables in a checkpoint but those `left_out` (collective)."""
    parameters = dict(managed.model().named_parameters(remove_duplicate=False))
    for name in index.tables:
        if name not in left_out:
            decide_now(parameters[name])
    with managed.manager.still():
        for table in managed.tables_in_order():
            if table.name in index.tables and table.name not in left_out:
                _load_table(managed, table, index.tables[table.name], files)
        managed.manager.rewrite_ended()


def _load_table(managed: ManagedModel, table: ManagedTable, entry: TableEntry, files: list[TensorFile]) -> None:
    """Make a table what a checkpoint says; inside `still()`."""
    manager, of = managed.manager, table.table
    same_rule = of.spec.rule.name == entry.rule
    _begin_as_saved(of, entry, files[0], same_rule)
    if entry.held < entry.rows:
        rows, _ = manager.owned_slots(of)
        if len(rows):  # touched in this run and, as far as the checkpoint knows, not before
            write_records(manager, of, initial_records(manager, of, rows))
    for file in files:
        for records in _own_records(manager, table, entry, file, same_rule):
            write_records(manager, of, records)
    table.clear_gradient()
    table.all_rows_held = entry.held == entry.rows
    if table.probation is not None:
        confirm(table)


def _begin_as_saved(table: pm.Table, entry: TableEntry, file: TensorFile, same_rule: bool) -> None:
    """Set what is said of a table as a whole."""
    spec = table.spec
    if entry.program is not None:
        fill = program_fill(decode(entry.program, file.tensor))
        spec = replace(spec, fill=fill, fill_states=None)
    if same_rule:
        spec = replace(spec, group=starting_from(spec.group, spec.rule, entry.initial_state))
    table.spec = spec
    table.begin_history()
    if not same_rule:
        table.gradient_steps = 0
        return
    table.gradient_steps, table.begun = entry.gradient_steps, entry.begun
    if table.history is not None:
        table.history.restore(**_history_in(entry, file))


def _history_in(entry: TableEntry, file: TensorFile) -> dict[str, Any] | None:
    """Return the arguments of `History.restore`, which were tried."""
    if entry.history is None:
        return None
    saved = decode(entry.history, file.tensor)
    arguments = {name: saved[name] for name in ("steps", "bounds", "slow", "mu_product")}
    History(saved["kind"], entry.dtype).restore(**arguments)
    return arguments


def _own_records(
    manager: pm.Manager, table: ManagedTable, entry: TableEntry, file: TensorFile, same_rule: bool
) -> Iterator[Records]:
    """Yield the records in a file whose rows this rank owns."""
    name, of = table.name, table.table
    total = file.entry(held_name("rows", name)).shape[0]
    chunk_rows = max(1, _CHUNK_BYTES // of.store.record_class.record_bytes)
    states = states_of(of)[0] if same_rule else ()
    for start in range(0, total, chunk_rows):
        stop = min(start + chunk_rows, total)
        rows = file.rows(held_name("rows", name), start, stop)
        own = manager.rows_owned(of, rows)
        if not len(own):
            continue
        at = slice(None) if len(own) == len(rows) else np.searchsorted(rows, own)
        values = file.rows(held_name("values", name), start, stop)[at]
        parts = [file.rows(held_name("state", name, state), start, stop)[at] for state in states]
        caught_up = None
        if of.history is not None:
            fresh = caught_up_to(of, 0, len(own))
            caught_up = file.rows(held_name("caught_up", name), start, stop)[at] if same_rule else fresh
        held_states = _side_by_side(parts) if states else manager.initial_states(of, own)
        yield Records(own, np.ascontiguousarray(values), held_states, caught_up)


def _side_by_side(parts: list[np.ndarray]) -> np.ndarray:
    return np.ascontiguousarray(parts[0]) if len(parts) == 1 else np.concatenate(parts, axis=1)
