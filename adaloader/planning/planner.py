"""The thread that turns batches read ahead into intents: derives ids, dedups them, and tells the manager.

It begins when it is told to, so that it can plan several batches in a row: a step in between drives the planner's code
and data from the processor's caches, and each handing over of the interpreter's lock costs the trainer time.
"""

from __future__ import annotations

import logging
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import cuda_ops
from adaloader.lookups.batch_rows import BatchRows
from adaloader.lookups.batches import Batch
from adaloader.lookups.block_plan import blocks_of, intend_block
from adaloader.planning.kinds import features_of
from adaloader.planning.random_ids import planning
from adaloader.tables.managed_table import ManagedTable
from intents import ReplayError, contents, structure_of

if TYPE_CHECKING:
    from adaloader.model.managed_model import ManagedModel

log = logging.getLogger("adaloader")

# Lookups of one table in a batch that are compared with each other: several programs foresee the same ones.
_MOST_COMPARED = 8


class Planner:
    """Works off batches in order, on a thread of its own that ends with `close()`.

    Args:
        model: whose tables, programs and manager.
        key_functions: by table, functions batch -> ids (tensor, array or list of int) in place of derivation; they are
            called on the planner's thread.
    """

    def __init__(self, model: ManagedModel, key_functions: Mapping[ManagedTable, Callable[[Any], Any]]):
        self._model = model
        self._key_functions = key_functions
        self._given: deque[Batch] = deque()
        self._queue: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._scratch = cuda_ops.DedupScratch()
        self._said: set[str] = set()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="adaloader-planner", daemon=True)
        self._thread.start()

    def plan(self, batch: Batch) -> None:
        """Find out what `batch` needs of each table, and intend it, after the next `begin`; `batch.planned` is set when
        that is done."""
        if self._closed:
            raise RuntimeError("this loader was closed; build another one to go on")
        self._given.append(batch)

    def waits_for_begin(self, batch: Batch) -> bool:
        """Whether `batch` was given to `plan`, and not to the thread yet."""
        return any(each is batch for each in self._given)

    def begin(self) -> None:
        """Have the thread work off what it was given."""
        while self._given:
            self._queue.put(self._given.popleft())

    def close(self) -> None:
        """Let the thread end once it has worked off what it was given."""
        self._closed = True
        self.begin()
        self._queue.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while (batch := self._queue.get()) is not None:
            started = time.perf_counter()
            try:
                batch.tables = self._tables_of(batch)
            except BaseException as error:  # raised where the batch is handed out
                batch.error = error
            if self._queue.empty():
                self._flush(batch)
            self._model.manager.traffic.seconds["keys"] += time.perf_counter() - started
            batch.planned.set()
            batch = None  # waiting for the next, the thread must not keep this one alive

    def _flush(self, batch: Batch) -> None:
        """Have what is intended leave; `batch` is the last one planned."""
        try:
            self._model.manager.flush_intents()
        except BaseException as error:
            batch.error = batch.error or error

    def _tables_of(self, batch: Batch) -> dict[int, BatchRows]:
        by_table: dict[ManagedTable, list[np.ndarray]] = {}
        for table, function in self._key_functions.items():
            by_table.setdefault(table, []).append(_as_ids(table, function(batch.data)))
        self._derive(batch, by_table)
        found: dict[int, BatchRows] = {}
        for tables in blocks_of(by_table):
            needed = intend_block(self._model.manager, tables, by_table, batch.expected, self._scratch)
            found.update(needed or {})
        for table, ids in by_table.items():
            if table.table.number not in found:
                needed = self._intend(table, ids, batch.expected)
                if needed is not None:
                    found[table.table.number] = needed
        recorder = self._model.manager.recorder
        if recorder is not None:
            for number, needed in found.items():
                recorder.note("intends", number, needed.rows, start=batch.expected, end=None)
        return found

    def _derive(self, batch: Batch, by_table: dict[ManagedTable, list[np.ndarray]]) -> None:
        """Add what programs say of the batch, and note there which did."""
        found = contents(batch.data)
        batch.structure, batch.features = structure_of(found.traced), features_of(found)
        batch.foreseen, batch.underived, batch.followed = False, frozenset(), {}
        kinds = self._model.watch.kinds.get(batch.structure)
        by_name = {table.name: table for table in self._model.tables if table not in self._key_functions}
        leaves = [leaf for _, leaf in found.traced]
        for label, program in kinds.choose(batch.features) if kinds is not None else ():
            try:
                with planning(batch.iteration.stream, batch.number):
                    replayed = program.replay_leaves(leaves)
            except ReplayError as error:
                self._say_once(f"a batch's keys could not be derived ({error}); what it may look up is guessed")
                self._add_guesses(program.guess_leaves(leaves, all_sites=True), by_name, by_table)
                continue
            batch.foreseen = True
            batch.underived |= {site.table for site in program.sites if site.reason is not None}
            sites = batch.followed[label] = []
            for site, ids in replayed:
                if site.table in by_name:
                    table = by_name[site.table]
                    sites.append((table.table.number, _add(by_table.setdefault(table, []), ids)))
            self._add_guesses(program.guess_leaves(leaves), by_name, by_table)

    def _add_guesses(self, guesses, by_name: dict[str, ManagedTable], by_table) -> None:
        """Add ids that sites may look up, as far as they may be any."""
        for site, ids in guesses:
            if site.table in by_name:
                table = by_name[site.table]
                sites = by_table.setdefault(table, [])
                _add(sites, ids[(ids >= 0) & (ids < table.table.spec.rows)])
                standing = self._model.watch.standing.get(site.table)
                if standing is not None:
                    _add(sites, standing)

    def _intend(self, table: ManagedTable, ids_of_sites: list[np.ndarray], expected: int) -> BatchRows | None:
        ids_of_sites = [np.array(ids) for ids in ids_of_sites]  # the loop may change the batch under a view
        everything = ids_of_sites[0] if len(ids_of_sites) == 1 else np.concatenate(ids_of_sites)
        rows, inverse = cuda_ops.dedup(everything, self._scratch)
        try:
            table.check_range(rows)
        except IndexError as error:  # raised again, in the user's code, by the lookup of these ids
            self._say_once(f"not intended: {error}")
            return None
        plan = self._model.manager.intend(table.table, rows, expected)
        ends = np.cumsum([len(ids) for ids in ids_of_sites])
        sites = list(zip(ids_of_sites, np.split(inverse, ends[:-1]), strict=True))
        return BatchRows(rows, sites, plan)

    def _say_once(self, message: str) -> None:
        kind = re.sub(r"\d+", "#", message)
        if kind not in self._said:
            self._said.add(kind)
            log.warning(message)


def _add(sites: list[np.ndarray], ids: np.ndarray) -> int:
    """Add the ids of a lookup to those of the others, unless one of another program is equal; return its place."""
    for place, other in enumerate(sites):
        if other is ids or (len(sites) <= _MOST_COMPARED and np.array_equal(other, ids)):
            return place
    sites.append(ids)
    return len(sites) - 1


def _as_ids(table: ManagedTable, ids: Any) -> np.ndarray:
    """Return what a user's key function gave as int64 `[n]`.

    Raises:
        TypeError: if it is not made of integers.
    """
    array = ids.detach().cpu().numpy() if isinstance(ids, torch.Tensor) else np.asarray(ids)
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(
            f"keys= for table {table.name!r} returned values of dtype {array.dtype}; it must return integer ids"
        )
    return array.reshape(-1).astype(np.int64)
