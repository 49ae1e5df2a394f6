"""Values that user code writes to a managed table outside of an optimizer's step.

Three kinds: all rows at once, some rows, and functions in place that treat every row alike. On several ranks each of
them is collective: all ranks run the same line, as they run the rest of the script; a rank that does not makes the
others raise an error that names it after `timeout_seconds`. A rank that has run out of batches takes its part in what
the others write (`joint_writes.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

import cuda_ops
from adaloader.errors import ManagedTableError
from adaloader.memory.device_memory import on_host
from adaloader.ranks.table_values import all_numbers, load_values
from adaloader.tables.joint_writes import Write, refused_while_following
from adaloader.tables.probation import confirm

if TYPE_CHECKING:
    from adaloader.gradients.row_sum import RowSum
    from adaloader.model.managed_model import ManagedModel
    from adaloader.tables.managed_table import ManagedTable


def overwrite(table: ManagedTable, values: torch.Tensor, operation: str) -> None:
    """Set all rows to `values`, which broadcasts to `[num_rows, dim]`; on several ranks those of the first that runs
    this line count (collective).

    Raises:
        ValueError: if the shape does not fit.
    """
    model, shape = table.owner, table.parameter.shape
    if model.importing is not None:
        model.importing[table] = values
        return
    if not isinstance(values, torch.Tensor):
        raise TypeError(f"{operation} on table {table.name!r}: expected a tensor, got {type(values).__name__}")
    exact = operation.startswith("assigning")
    if tuple(values.shape) != tuple(shape) and (exact or not _broadcasts(values, shape)):
        raise ValueError(
            f"{operation} on table {table.name!r}: expected shape {tuple(shape)}, got {tuple(values.shape)}"
        )
    writers = _writers(table, Write.ALL_VALUES)
    _agree(model)
    _overwrite(table, values.detach().expand(shape), writers[0])
    _written(model)


def _overwrite(table: ManagedTable, values: torch.Tensor | None, root: int) -> None:
    model = table.owner
    model.manager.settle()
    with model.paused():
        set_whole(model, table, values, root)
    model.writes += 1


def set_whole(model: ManagedModel, table: ManagedTable, values: torch.Tensor | None, root: int = 0) -> None:
    """Set all rows to rank `root`'s `values` `[num_rows, dim]` (collective)."""
    if table.probation is not None:
        table.probation.overwrite(model.manager, table.table, values, root)
    else:
        load_values(model.manager, table.table, values, root)
        table.all_rows_held = True


def change_rows(table: ManagedTable, ids: torch.Tensor, change: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
    """Read the rows of `ids`, have `change(rows, positions)` write them, and store them (collective).

    `change` gets the distinct rows `[U, dim]` and, shaped as `ids`, each id's position among them. Where ranks write
    the same row, the last rank's values count.

    Raises:
        IndexError: if an id is out of range.
    """
    model = table.owner
    flat = on_host(ids.reshape(-1).to(torch.int64))
    rows, positions = cuda_ops.dedup(flat)
    table.check_range(rows)
    with model.paused(), torch.inference_mode(False):
        values = np.empty((len(rows), table.table.spec.dim), table.table.spec.dtype)
        model.manager.pull(table.table, rows, values)
        here = table.here(values)
        with torch.no_grad():
            change(here, table.here(positions).view(ids.shape))
        _writers(table, Write.SOME_ROWS)
        _agree(model)
        _set_rows(table, rows, on_host(here))
    _written(model)


def add_gradient(table: ManagedTable, gradient: RowSum, factor: float) -> None:
    """Add `factor` x a row gradient, of this table or of one of its shape, to the rows that it has (collective)."""
    if gradient.table.parameter.shape != table.parameter.shape:
        raise ValueError(
            f"a gradient of table {gradient.table.name!r} {list(gradient.table.parameter.shape)} cannot be added to "
            f"table {table.name!r} {list(table.parameter.shape)}"
        )
    part = gradient.whole()
    step = part.values.detach() * factor

    def change(rows: torch.Tensor, positions: torch.Tensor) -> None:
        rows.index_add_(0, positions, step)

    change_rows(table, torch.from_numpy(part.rows), change)


def write_along(model: ManagedModel) -> None:
    """Take this rank's part in what the others write, of which it does not run the line (collective)."""
    write, name, writers = model.joint_writes.join()
    if write is Write.OPTIMIZER_STATE:
        raise refused_while_following(name, writers)
    with model.paused():
        _agree(model)
        table = next(table for table in model.tables if table.name == name)
        if write is Write.SOME_ROWS:
            spec = table.table.spec
            _set_rows(table, np.empty(0, np.int64), np.empty((0, spec.dim), spec.dtype))
            return
        if write is Write.EVERY_ROW_ALIKE:
            _leave_probation_to_change(table, "a write")
        _overwrite(table, None, writers[0])


def _writers(table: ManagedTable, write: Write) -> list[int]:
    """Return the ranks that run the line of a write that begins (collective)."""
    together = table.owner.joint_writes
    return [table.owner.manager.rank] if together is None else together.meet(write, table.name)


def _written(model: ManagedModel) -> None:
    """This rank has run the line of a write."""
    if model.follower is not None:
        model.follower.written()


def _agree(model: ManagedModel) -> None:
    """Have all ranks in the same state of probation (collective): what a write does depends on it."""
    from adaloader.tables.candidate import agree_on_candidates

    agree_on_candidates(model)


def _set_rows(table: ManagedTable, rows: np.ndarray, values: np.ndarray) -> None:
    manager = table.owner.manager
    if table.probation is not None:
        confirm(table)  # its memory no longer says what rows are
    with manager.still():
        for their_rows, their_values in _from_all_ranks(table, rows, values):
            own = np.isin(their_rows, manager.rows_owned(table.table, their_rows))
            manager.load_rows(table.table, their_rows[own], np.ascontiguousarray(their_values[own]), None)
        manager.rewrite_ended()
    table.owner.writes += 1


def _from_all_ranks(table: ManagedTable, rows: np.ndarray, values: np.ndarray):
    """Return every rank's (rows, values), in rank order (collective)."""
    manager = table.owner.manager
    if manager.ranks == 1:
        return [(rows, values)]
    counts = all_numbers(manager, len(rows))
    dim, itemsize = table.table.spec.dim, values.dtype.itemsize
    all_rows = np.empty(sum(counts), np.int64)
    all_values = np.empty((sum(counts), dim), values.dtype)
    for mine, everyones, width in ((rows, all_rows, 8), (values, all_values, dim * itemsize)):
        sizes = [count * width for count in counts]
        target = everyones.reshape(-1).view(np.uint8)
        source = np.ascontiguousarray(mine).reshape(-1).view(np.uint8)
        manager.transport.collective(
            lambda comm, s=source, t=target, n=sizes: comm.Iallgatherv(s, [t, n]), manager.timeout_seconds
        )
    ends = np.cumsum(counts)[:-1]
    return list(zip(np.split(all_rows, ends), np.split(all_values, ends), strict=True))


def change_every_row(table: ManagedTable, function: Callable, args: tuple, kwargs: dict, operation: str) -> None:
    """Apply `function(rows, *args, **kwargs)`, which works in place and row by row, to all rows (collective).

    Arguments of shape `[num_rows, ...]` are taken row by row too. Rows of a deferred table that were never touched
    change when they are.
    """
    model, spec = table.owner, table.table.spec
    manager = model.manager
    writers = _writers(table, Write.EVERY_ROW_ALIKE)
    _agree(model)
    if len(writers) < manager.ranks:  # the others do not know the function
        _leave_probation_to_change(table, operation)
        values = table.whole_values().clone()
        with model.paused(), torch.no_grad():
            function(values, *args, **kwargs)
        _overwrite(table, values, writers[0])
        _written(model)
        return
    if table.probation is not None:
        confirm(table)
    by_row = any(_is_per_row(value, spec.rows) for value in (*args, *kwargs.values()))
    manager.settle()
    if not table.all_rows_held:
        _check_untouched_rows(table, operation, by_row)

    def apply(rows: np.ndarray, values: np.ndarray) -> None:
        def part(value):
            return value.detach()[torch.from_numpy(rows)] if _is_per_row(value, spec.rows) else value

        here = table.here(values)
        with torch.no_grad():
            function(here, *map(part, args), **{name: part(value) for name, value in kwargs.items()})
        if table.memory is not None:
            values[...] = on_host(here)

    with model.paused(), torch.inference_mode(False), manager.still():
        for rows, values, _ in manager.held_rows(table.table):
            apply(rows, values)
            manager.load_rows(table.table, rows, values, None)
        if not table.all_rows_held:
            _fill_changed(table, apply)
        manager.rewrite_ended()
    model.writes += 1
    _written(model)


def _leave_probation_to_change(table: ManagedTable, operation: str) -> None:
    """Have all rows held, where one rank is to change them for all; raise on every rank if they cannot be."""
    if table.probation is not None:
        confirm(table)
    if not table.all_rows_held:
        raise ManagedTableError(
            f"{operation} on every row of table {table.name!r}, declared under deferred_init, while a rank has "
            "no batch left: give all ranks as many batches (drop_last=True), or write to rows by their ids"
        )


def _check_untouched_rows(table: ManagedTable, operation: str, by_row: bool) -> None:
    if by_row:
        raise ManagedTableError(
            f"{operation} on table {table.name!r} with a tensor of {table.table.spec.rows} rows: it was declared under "
            "deferred_init, and rows that were never touched can only be changed by numbers"
        )
    if table.table.history:
        raise ManagedTableError(
            f"{operation} on table {table.name!r}: it was declared under deferred_init, and its optimizer has moved "
            "rows that were never touched, which are not held and cannot be changed; write to rows by their ids, or "
            "build the table outside deferred_init"
        )


def _fill_changed(table: ManagedTable, apply: Callable[[np.ndarray, np.ndarray], None]) -> None:
    """Have rows that are made later start from what `apply` makes of their initial values."""
    before = table.table.spec.fill

    def fill(rows: np.ndarray, out: np.ndarray) -> None:
        before(rows, out)
        apply(rows, out)

    table.table.spec = replace(table.table.spec, fill=fill)


def _is_per_row(value, num_rows: int) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 2 and value.shape[0] == num_rows


def _broadcasts(values: torch.Tensor, shape: torch.Size) -> bool:
    try:
        return torch.broadcast_shapes(values.shape, shape) == shape
    except RuntimeError:
        return False
