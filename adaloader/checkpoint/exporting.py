"""A checkpoint as one file of plain tensors under the model's own names, written on one process piece by piece.

Rows lie ascending in each rank's file, so a window of a table is a slice of each; no table is held in memory.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

import cuda_ops
from adaloader.checkpoint.inspecting import check
from adaloader.checkpoint.layout import (
    Index,
    TableEntry,
    complete_in,
    find_checkpoint,
    held_name,
    open_file,
    read_index,
)
from adaloader.checkpoint.tensor_file import TensorFile, TensorFileWriter
from adaloader.checkpoint.tree import decode
from adaloader.deferred.program_fill import program_fill
from adaloader.errors import CheckpointError
from pm.history import History
from pm.storage.records import Records
from pm.storage.store import RecordClass, RecordStore

_WINDOW_BYTES = 8 << 20
_SEARCH_ROWS = 1 << 18
_FORMS = {"float32": "F32", "float64": "F64"}


def export(
    path: Path,
    out: Path,
    progress: Callable[[int], None] = lambda count: None,
    verifying: Callable[[Iterable[int]], Iterable[int]] = lambda numbers: numbers,
) -> int:
    """Write the model's state_dict in a checkpoint to a safetensors file, and return the file's bytes.

    The checkpoint is read whole and verified before. `out` appears when it is whole. Other entries of the state_dict
    than tensors are left out.

    Args:
        path: the folder of a checkpoint, or of several, of which the newest is taken.
        out: the file; an earlier one is replaced, but nothing else than a file, and nothing of a checkpoint.
        progress: called with the bytes of tables that were written since.
        verifying: wraps the numbers of the checkpoint's files as they are verified.

    Raises:
        CheckpointError: naming the file that is damaged, or cannot be written.
    """
    folder = find_checkpoint(path)
    index = read_index(folder)
    _check_out(out, [folder, *complete_in(path)])
    check(folder, verifying)
    files: list[TensorFile] = []
    beside = out.with_name(out.name + ".tmp")
    try:
        files += [open_file(folder, index, rank) for rank in range(index.ranks)]
        beside.unlink(missing_ok=True)
        size = _write(index, files, beside, progress)
        os.replace(beside, out)
    except OSError as error:
        _remove(beside)
        raise CheckpointError(f"{error.filename or out} cannot be written: {error.strerror}") from error
    except BaseException:
        _remove(beside)
        raise
    finally:
        for file in files:
            file.close()
    return size


def _check_out(out: Path, checkpoints: list[Path]) -> None:
    """Raise CheckpointError unless `out` names a file, there already or new, outside of all `checkpoints`."""
    if out.name in ("", ".."):
        raise CheckpointError(f"{out} is a folder: give the name of the file to write, such as model.safetensors")
    try:
        kind = stat.S_IFMT(out.lstat().st_mode)
    except FileNotFoundError:
        kind = stat.S_IFREG
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error.strerror}") from error
    if kind != stat.S_IFREG:
        what = {stat.S_IFDIR: "a folder", stat.S_IFLNK: "a link"}.get(kind, "a device, pipe or socket")
        raise CheckpointError(f"{out} is {what} and would be replaced: give the name of a file, or of none yet")
    above = out.parent.resolve().parents
    for folder in checkpoints:
        if folder.resolve() in (out.parent.resolve(), *above):
            raise CheckpointError(f"{out} lies in the checkpoint {folder}: write to a file outside of it")


def _remove(file: Path) -> None:
    with contextlib.suppress(OSError):  # what keeps it is what has failed: the name is too long, or a folder's
        file.unlink(missing_ok=True)


def _write(index: Index, files: list[TensorFile], out: Path, progress: Callable[[int], None]) -> int:
    dense = _dense_tensors(index)
    forms = {name: (files[0].entry(of).dtype, files[0].entry(of).shape) for name, of in dense.items()}
    for table in index.tables.values():
        for alias in table.aliases:
            forms[alias] = (_FORMS[table.dtype], (table.rows, table.dim))
    writer = TensorFileWriter(out, forms, {"format": "pt"})
    try:
        for name, of in dense.items():
            writer.write(name, files[0].tensor(of))
        for name, table in index.tables.items():
            for values in _windows(name, table, files):
                for alias in table.aliases:
                    writer.write(alias, values)
                progress(values.nbytes)
        writer.close()
    finally:
        writer.abandon()
    return writer.bytes


def _dense_tensors(index: Index) -> dict[str, str]:
    """Return the tensors of rank 0's file by their names in the model's state_dict."""
    try:
        return {
            name: node["tensor"]
            for name, node in index.trees["model"]["dict"]
            if isinstance(node, dict) and "tensor" in node
        }
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the index has no state of a model: {error!r}") from error


def _windows(name: str, table: TableEntry, files: list[TensorFile]) -> Iterator[np.ndarray]:
    """Yield the values of consecutive rows of a table, all of them."""
    fill = None if table.program is None else program_fill(decode(table.program, files[0].tensor))
    history = history_of(table, files[0])
    window = max(1, _WINDOW_BYTES // (table.dim * 8 + sum(table.state_widths) * 8 + 16))
    places = [0] * len(files)
    for start in range(0, table.rows, window):
        stop = min(start + window, table.rows)
        values = np.zeros((stop - start, table.dim), table.dtype)
        missing = np.ones(stop - start, bool)
        for at, file in enumerate(files):
            records, places[at] = _records_before(name, table, file, places[at], stop, window)
            values[records.rows - start] = caught_up_values(table, history, records)
            missing[records.rows - start] = False
        absent = np.flatnonzero(missing)
        if len(absent):
            values[absent] = _unmade(table, fill, history, absent + start)
        yield values


def _records_before(
    name: str, table: TableEntry, file: TensorFile, place: int, stop: int, most: int
) -> tuple[Records, int]:
    """Return the records of a file from `place` on whose rows are below `stop`, and the place of the next."""
    rows = file.rows(held_name("rows", name), place, min(place + most, file.entry(held_name("rows", name)).shape[0]))
    count = int(np.searchsorted(rows, stop))
    end = place + count
    values = file.rows(held_name("values", name), place, end)
    parts = [file.rows(held_name("state", name, state), place, end) for state in table.states]
    states = np.concatenate(parts, axis=1) if parts else np.empty((count, 0), values.dtype)
    caught_up = None if table.history is None else file.rows(held_name("caught_up", name), place, end)
    return Records(rows[:count], values, states, caught_up), end


def _unmade(table: TableEntry, fill, history: History | None, rows: np.ndarray) -> np.ndarray:
    """Return the values of rows that nobody touched."""
    if fill is None:
        raise CheckpointError(f"row {rows[0]} of a table that was not declared under deferred_init is in no file")
    values = np.empty((len(rows), table.dim), table.dtype)
    fill(rows, values)
    states = np.full((len(rows), sum(table.state_widths)), table.initial_state, table.dtype)
    return caught_up_values(
        table, history, Records(rows, values, states, np.full(len(rows), cuda_ops.caught_up_word(0)))
    )


def history_of(table: TableEntry, file: TensorFile) -> History | None:
    """Return the steps that rows of a table may still have to catch up with.

    Raises:
        CheckpointError: if they are malformed.
    """
    if table.history is None:
        return None
    try:
        saved = decode(table.history, file.tensor)
        history = History(saved["kind"], table.dtype)
        history.restore(saved["steps"], saved["bounds"], saved["slow"], saved["mu_product"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file.path}: the history of a table is malformed: {error!r}") from error
    return history


def caught_up_values(table: TableEntry, history: History | None, records: Records) -> np.ndarray:
    """Return the values `[n, dim]` of records at the last step of their table."""
    if history is None or not len(history) or not len(records.rows):
        return records.values
    words = sum(table.state_widths)
    store = RecordStore(RecordClass(table.dim, table.dtype, table.rule, words, True), len(records.rows))
    slots = store.allocate(len(records.rows))
    store.set_values(slots, records.values)
    store.set_states(slots, records.states)
    store.set_caught_up_words(slots, records.caught_up)
    arguments = (history.kind, store.words, store.stride, table.dim, store.steps, slots, None)
    cuda_ops.advance(*arguments, history.steps, history.bounds, 1.0, 0)
    return store.values(slots, np.empty_like(records.values))
